"""DeepSpeed's own Muon at the pinned version, by the measure that ours is held to: weights after 5 updates in fp64.

By its definition, which is another one: an update is scaled by sqrt(max(1, m / n)), positions are updated by Muon too,
and gradients are clipped after orthogonalising. Newton-Schulz computes in fp32 here. What is asserted is what was
measured, so that another version shows its changes: `pytest tests/distributed/test_deepspeed_muon.py -m "" -s` prints
the table of docs/equality.md.
"""

import contextlib
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from mlra_scale.config import Config, batch_plan
from tests.distributed.oracle_runs import Options, Pools, in_layout
from tests.support.layouts import Layout, canonical_weights, make_batch
from tests.support.optimizers import ReferenceOptimizer, newton_schulz_values
from tests.support.oracle import build_reference, reference_loss
from tests.support.reference import ReferenceGPT

STEPS, RATE = 5, 1e-2
OPTIONS: Options = {
    "optim__name": "muon",
    "optim__lr": RATE,
    "optim__grad_clip": 0.0,
    "optim__rules": [
        {"kind": "positions", "optimizer": "muon"},
        {"kind": "bias", "weight_decay": 0.1},
        {"kind": "norm", "weight_decay": 0.1},
    ],
}


@dataclass(frozen=True)
class Case:
    """A way to run DeepSpeed's Muon on two data ranks, and how far off its weights are."""

    zero: dict[str, Any]
    micro_batch_size: int = 4  # the global batch has 8 samples
    uses_zero_init: bool = False
    ns_method: str = "standard"
    grad_clip: float = 0.0
    at_most: float = 1e-5
    at_least: float = 0.0


CPU = {"device": "cpu"}
CASES = {
    **{f"zero-{stage}": Case({"stage": stage}) for stage in range(4)},
    **{f"zero-{stage}-accumulating": Case({"stage": stage}, 1) for stage in range(4)},
    **{
        f"zero-{stage}-offload{suffix}": Case({"stage": stage, "offload_optimizer": CPU}, size)
        for stage in (1, 2, 3)
        for suffix, size in (("", 4), ("-accumulating", 1))
    },
    "zero-3-offload-all": Case({"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, 1),
    "zero-3-zero-init": Case({"stage": 3}, 1, uses_zero_init=True),
    "zero-3-small-groups": Case({"stage": 3, "sub_group_size": 3000, "stage3_param_persistence_threshold": 0}, 1),
    "zero-2-gram": Case({"stage": 2}, ns_method="gram"),
    "zero-2-clipping": Case({"stage": 2}, grad_clip=0.1, at_most=1.0, at_least=1e-3),
}


class Theirs(ReferenceOptimizer):
    """The oracle with DeepSpeed's split and scale, which adds 1e-7 to the norm that a matrix is divided by."""

    def _step_size(self, name: str, rate: float) -> float:
        rows, columns = self._table[name].shape
        return rate * math.sqrt(max(1.0, rows / columns))

    def orthogonalised(self, direction: torch.Tensor) -> torch.Tensor:
        left_MR, values_R, right_RN = torch.linalg.svd(direction * (1 - self._optim.momentum), full_matrices=False)
        values_R = values_R / (values_R.square().sum().sqrt() + 1e-7)
        steps, coefficients = self._optim.newton_schulz_steps, self._optim.newton_schulz_coefficients
        return left_MR * newton_schulz_values(values_R, steps, coefficients) @ right_RN


class Model(nn.Module):
    """The reference model with its loss, in fp32."""

    def __init__(self, config: Config, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.gpt = build_reference(config, weights).float()

    def forward(self, tokens_BS: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
        return self.gpt.loss(self.gpt(tokens_BS), targets_BS)


@dataclass
class Result:
    """What a rank reports."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    by_muon: list[str] = field(default_factory=list)


def settings_of(case: Case, config: Config) -> dict[str, Any]:
    optim = config.optim
    params = {
        "lr": optim.lr,
        "momentum": optim.momentum,
        "weight_decay": optim.weight_decay,
        "ns_method": case.ns_method,
    }
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "gradient_clipping": case.grad_clip,
        "optimizer": {"type": "Muon", "params": {**params, "betas": list(optim.betas), "eps": optim.eps}},
        # Its ZeRO 3 refuses Muon with reduce_scatter, which is the default.
        "zero_optimization": {**case.zero, "reduce_scatter": False},
    }


def train_theirs(rank: int, world_size: int, config: Config, case: Case, weights: dict[str, torch.Tensor]) -> Result:
    import deepspeed
    from deepspeed.runtime.zero.muon import original_muon

    from mlra_scale.parallel import initialize_distributed

    initialize_distributed("cpu", 3.0)
    settings = settings_of(case, config)
    with contextlib.ExitStack() as stack:
        # Its functions are compiled at their first call, which takes minutes here and changes no result.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(mock.patch.object(original_muon, "ns_compute_dtype", lambda ns_method="": torch.float32))
        model = in_zero_init(settings, config, weights) if case.uses_zero_init else Model(config, weights)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
        plan, size = batch_plan(config, world_size), case.micro_batch_size
        result = Result()
        for step in range(STEPS):
            losses = []
            for number in range(plan.global_batch_size // (size * world_size)):
                first = step * plan.global_batch_size + (number * world_size + rank) * size
                batch = make_batch(config, range(first, first + size))
                loss = engine(batch.tokens_BS, batch.targets_BS)
                engine.backward(loss)
                engine.step()
                losses.append(float(loss))
            result.losses.append(float(np.mean(losses)))
        for name, parameter in engine.module.gpt.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=case.zero["stage"] == 3):
                result.weights[name] = parameter.detach().float().cpu().numpy().copy()
            if getattr(parameter, "use_muon", False):
                result.by_muon.append(name)
    return result


def in_zero_init(settings: dict[str, Any], config: Config, weights: dict[str, torch.Tensor]) -> Model:
    """The model, partitioned while it is built, and then given its weights."""
    import deepspeed

    nothing = mock.Mock(return_value=None)
    with (
        mock.patch.object(ReferenceGPT, "double", lambda self: self),
        mock.patch.object(ReferenceGPT, "load_state_dict", nothing),
        deepspeed.zero.Init(config_dict_or_path=settings),
    ):
        model = Model(config, weights)
    for name, parameter in model.gpt.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                parameter.copy_(weights[name][: len(parameter)])
    return model


@cache
def expected_of(grad_clip: float) -> tuple[dict[str, torch.Tensor], list[float], dict[str, np.ndarray]]:
    """Initial weights, losses and weights after the last step, of the oracle."""
    config = in_layout(Layout(), **OPTIONS)
    weights = canonical_weights(config.model)
    reference = build_reference(config, weights)
    optimizer, losses = Theirs(config, reference, {}), []
    for step in range(STEPS):
        reference.zero_grad()
        loss = reference_loss(config, reference, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), grad_clip or math.inf)
        optimizer.step()
        losses.append(loss.item())
    return weights, losses, {name: parameter.detach().numpy() for name, parameter in reference.named_parameters()}


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_its_error_is_what_was_measured(worker_pool: Pools, name: str) -> None:
    case = CASES[name]
    config = in_layout(Layout(data=2), **OPTIONS, train__micro_batch_size=case.micro_batch_size)
    weights, losses, expected = expected_of(case.grad_clip)
    results = worker_pool(2).run(train_theirs, config, case, weights, timeout=420.0)
    worst: dict[bool, float] = {True: 0.0, False: 0.0}
    for parameter, value in expected.items():
        off = np.linalg.norm(results[0].weights[parameter] - value) / np.linalg.norm(value)
        by_muon = parameter in results[0].by_muon
        worst[by_muon] = max(worst[by_muon], float(off))
    of_ranks = np.mean([result.losses for result in results], axis=0)
    of_losses = float(np.max(np.abs(of_ranks / losses - 1)))
    print(f"\n| {name} | {len(results[0].by_muon)} | {worst[True]:.1e} | {worst[False]:.1e} | {of_losses:.1e} |")
    assert case.at_least <= max(worst.values()) <= case.at_most
