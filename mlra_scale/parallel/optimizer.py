"""The optimizer of a rank: which parameters it updates how. AdamW is the only one."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from mlra_scale.config import Config, OptimConfig, offload_optimizer
from mlra_scale.model.parameters import ParameterInfo, ParameterTable


def has_weight_decay(info: ParameterInfo, optim: OptimConfig) -> bool:
    """Returns whether a parameter decays: matrices, and by policy factors and embeddings; never biases and norms."""
    decays = {
        "matrix": True,
        "factor": optim.decay_factors,
        "embedding": optim.decay_embedding,
        "positions": optim.decay_embedding,
        "bias": False,
        "norm": False,
    }
    return decays[info.kind]


def parameter_groups(
    named: dict[str, nn.Parameter], table: ParameterTable, optim: OptimConfig, alone: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Splits this rank's parameters by weight decay, into groups as torch's optimizers take them; none is empty.

    The parameters `alone` get a group of their own, before the group that they would be in.
    """
    groups = []
    for decay in (True, False):
        members = [name for name in named if has_weight_decay(table[name], optim) is decay]
        for names in (*([name] for name in members if name in alone), [name for name in members if name not in alone]):
            parameters = [named[name] for name in names]
            groups.append({"params": parameters, "weight_decay": optim.weight_decay if decay else 0.0})
    return [group for group in groups if group["params"]]


def build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or DeepSpeed's CPU one (compiled on first use) when the optimizer is offloaded."""
    optim = config.optim
    if offload_optimizer(config):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
