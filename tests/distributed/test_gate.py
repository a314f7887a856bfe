"""The gate before an update, initialization and ownership, for every kind of DeepSpeed optimizer wrapper."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.model.initialization import initial_state
from mlra_scale.model.parameters import ParameterTable
from tests.support.layouts import Layout, assemble, layout_config, micro_batches, overwrite, pieces, start
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]

# One layout per wrapper: plain AdamW, the unfused 16-bit one, ZeRO 1 and 2, the bf16 one, ZeRO 3, and both pipelines.
WRAPPERS = [
    (Layout(tensor=2), "fp32"),
    (Layout(tensor=2), "bf16"),
    (Layout(data=2, stage=1), "fp32"),
    (Layout(data=2, stage=2), "fp32"),
    (Layout(data=2, stage=2), "bf16"),
    (Layout(data=2, stage=1), "bf16"),
    (Layout(data=2, stage=3), "fp32"),
    (Layout(data=2, stage=3), "bf16"),
    (Layout(pipeline=2, stage=1), "fp32"),
    (Layout(pipeline=2, stage=1), "bf16"),
]


def survey(rank: int, world_size: int, config: Any) -> dict[str, Any]:
    """Initial weights; three updates of which the second is refused; the same with it left out; a non-finite one."""
    engine, plan = start(config, world_size)
    report: dict[str, Any] = {"initial": pieces(engine, engine.owned_fragments())}
    batches = [micro_batches(config, plan, engine.topology.data_rank, step) for step in range(3)]
    proposals = []

    def refuse(proposal: Any) -> bool:
        proposals.append((proposal.loss, proposal.gradient_norm))
        return False

    assert engine.train_batch(batches[0], 1e-3).applied
    before = pieces(engine, engine.owned_fragments(with_moments=True))
    refused = engine.train_batch(batches[1], 1e-3, refuse)
    after = pieces(engine, engine.owned_fragments(with_moments=True))
    report["refused"] = (refused.applied, refused.overflow, engine.num_skipped)
    report["unchanged"] = all(np.array_equal(a[3], b[3]) for a, b in zip(before, after, strict=True))
    report["proposal"] = proposals[0]
    third = engine.train_batch(batches[2], 1e-3)
    report["losses"] = (refused.loss, third.loss)
    report["moments"] = [
        (f.name, engine.topology.tensor_rank, f.start, m.cpu().numpy().copy())
        for f in engine.owned_fragments(with_moments=True)
        if (m := f.exp_avg_sq) is not None
    ]
    report["final"] = pieces(engine, engine.owned_fragments())

    poison = initial_state(config.model, 5)
    poison["positions.weight"][0, 0] = math.nan
    overwrite(engine, poison)
    before = pieces(engine, engine.owned_fragments())
    broken = engine.train_batch(batches[0], 1e-3)
    after = pieces(engine, engine.owned_fragments())
    report["broken"] = (broken.applied, math.isnan(broken.loss))
    report["broken_unchanged"] = all(
        np.array_equal(a[3], b[3], equal_nan=True) for a, b in zip(before, after, strict=True)
    )
    return report


def without_refusal(rank: int, world_size: int, config: Any) -> list[Any]:
    """The same run that never sees the refused batch."""
    engine, plan = start(config, world_size)
    for step in (0, 2):
        engine.train_batch(micro_batches(config, plan, engine.topology.data_rank, step), 1e-3)
    return pieces(engine, engine.owned_fragments())


@pytest.mark.parametrize(("layout", "precision"), WRAPPERS, ids=lambda value: str(value).replace(" ", "-"))
def test_the_gate_holds_for_every_wrapper(worker_pool: Pools, layout: Layout, precision: str) -> None:
    config = layout_config(layout, train__precision=precision)
    table = ParameterTable(config.model)
    reports = worker_pool(layout.world_size).run(survey, config)
    for report in reports:
        assert report["refused"] == (False, False, 1)
        assert report["unchanged"], "a refused update changed weights or moments"
        assert report["proposal"] == reports[0]["proposal"], "ranks decide on different numbers"
        assert report["broken"] == (False, True)
        assert report["broken_unchanged"], "a non-finite gradient changed the weights"

    initial = assemble(table, layout.tensor, [report["initial"] for report in reports])
    for name, tensor in initial_state(config.model, config.train.seed).items():
        expected = tensor if precision == "fp32" else tensor.bfloat16().float()
        np.testing.assert_array_equal(initial[name], expected.numpy().astype(np.float64), err_msg=name)

    final = assemble(table, layout.tensor, [report["final"] for report in reports])
    ranks = worker_pool(layout.world_size).run(without_refusal, config)
    control = assemble(table, layout.tensor, ranks)
    for name in table:
        np.testing.assert_array_equal(final[name], control[name], err_msg=name)
    moments = assemble(table, layout.tensor, [report["moments"] for report in reports])
    assert all(np.isfinite(values).all() and (values >= 0).all() for values in moments.values())
    assert moments["blocks.0.mlp.fc_in.weight"].any()


def test_initial_weights_are_whole_draws_of_seed_and_name() -> None:
    config = layout_config(Layout())
    state, again = initial_state(config.model, 1), initial_state(config.model, 1)
    other = initial_state(config.model, 2)
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name])
