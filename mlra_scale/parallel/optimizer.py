"""The optimizer object that DeepSpeed gets: parameter groups, and the AdamW that updates some of them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from mlra_scale.config import Config, offload_optimizer
from mlra_scale.model.update_rules import UpdateRule


def parameter_groups(
    named: Mapping[str, nn.Parameter],
    rules: Mapping[str, UpdateRule],
    begun_at: Mapping[str, int],
    alone: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Splits this rank's parameters by their rules, into groups as torch's optimizers take them; none is empty.

    Groups of AdamW come first, and those with weight decay before those without. The parameters `alone` get a group of
    their own, before the group that they would be in. `begun_at`: see Engine; a group has one count of updates.
    """
    members: dict[tuple[Any, ...], list[str]] = {}
    for name in named:
        rule = rules[name]
        key = (rule.optimizer, -rule.weight_decay, rule.lr_factor, rule.eps, begun_at.get(name, 0))
        members.setdefault(key, []).append(name)
    groups = []
    for key in sorted(members):
        _, decay, lr_factor, eps, begun = key
        names = members[key]
        is_adamw = rules[names[0]].is_adamw
        for of_group in (*([name] for name in names if name in alone), [name for name in names if name not in alone]):
            settings = {"weight_decay": -decay, "eps": eps, "lr_factor": lr_factor, "is_adamw": is_adamw}
            groups.append({"params": [named[name] for name in of_group], "begun_at": begun, **settings})
    return [group for group in groups if group["params"]]


def build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or DeepSpeed's CPU one (compiled on first use) when the optimizer is offloaded.

    Its step passes over the groups that another optimizer updates.
    """
    optim = config.optim
    optimizer: torch.optim.Optimizer
    if offload_optimizer(config):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    if not all(group["is_adamw"] for group in groups):
        _pass_over_other_groups(optimizer)
    return optimizer


def _pass_over_other_groups(optimizer: Any) -> None:
    step = optimizer.step

    def step_of_adamw() -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["is_adamw"]]
        try:
            step()
        finally:
            optimizer.param_groups = groups

    optimizer.step = step_of_adamw
