"""The gate before an update, initialization and ownership, for every kind of DeepSpeed optimizer wrapper."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.parallel.fragments import Fragment
from tests.distributed.steps import allow_fp16_on_cpu
from tests.support.layouts import (
    Layout,
    assemble,
    initial_state,
    layout_config,
    micro_batches,
    overwrite,
    pieces,
    start,
)
from tests.support.pool import Pools

# One layout per wrapper: plain AdamW, the bf16 one, ZeRO 1 and 2, ZeRO 3, and both pipelines.
WRAPPERS = [
    (Layout(tensor=2), "fp32"),
    (Layout(tensor=2), "bf16"),
    (Layout(data=2, stage=1), "fp32"),
    (Layout(data=2, stage=2), "fp32"),
    (Layout(data=2, stage=2), "bf16"),
    (Layout(data=2, stage=1), "bf16"),
    (Layout(data=2, stage=3), "fp32"),
    (Layout(data=2, stage=3), "bf16"),
    (Layout(pipeline=2), "fp32"),
    (Layout(pipeline=2), "bf16"),
    (Layout(pipeline=2, stage=1), "fp32"),
    (Layout(pipeline=2, stage=1), "bf16"),
    (Layout(data=2, stage=2), "fp16"),
    (Layout(data=2, stage=3), "fp16"),
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def survey(rank: int, world_size: int, config: Any) -> dict[str, Any]:
    """Initial weights; three updates of which the second is refused; the same with it left out; a non-finite one."""
    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    engine = start(config, world_size)
    report: dict[str, Any] = {"initial": pieces(engine, engine.owned_fragments())}
    batches = [micro_batches(engine, step) for step in range(3)]
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
    report["moments"] = moments(engine)
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


def moments(engine: Any) -> list[list[Any]]:
    """This rank's pieces of Adam's first and second moments."""
    owned = engine.owned_fragments(with_moments=True)
    return [
        pieces(engine, [Fragment(f.name, f.start, getattr(f, moment)) for f in owned])
        for moment in ("exp_avg", "exp_avg_sq")
    ]


def without_refusal(rank: int, world_size: int, config: Any) -> tuple[list[Any], list[list[Any]]]:
    """The same run that never sees the refused batch: weights and moments."""
    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    engine = start(config, world_size)
    for step in (0, 2):
        engine.train_batch(micro_batches(engine, step), 1e-3)
    return pieces(engine, engine.owned_fragments()), moments(engine)


@pytest.mark.slow_except("tp1pp1dp2-zero3-bf16", "tp1pp2dp1-zero1-bf16")
@pytest.mark.parametrize(("layout", "precision"), WRAPPERS, ids=lambda value: str(value).replace(" ", "-"))
def test_the_gate_holds_for_every_wrapper(worker_pool: Pools, layout: Layout, precision: str) -> None:
    config = layout_config(layout, train__precision=precision)
    reports = worker_pool(layout.world_size).run(survey, config)
    for report in reports:
        assert report["refused"] == (False, False, 1)
        assert report["unchanged"], "a refused update changed weights or moments"
        assert report["proposal"] == reports[0]["proposal"], "ranks decide on different numbers"
        assert report["broken"] == (False, True)
        assert report["broken_unchanged"], "a non-finite gradient changed the weights"

    initial = assemble(config, [report["initial"] for report in reports])
    for name, tensor in initial_state(config.model, config.train.seed).items():
        expected = tensor.to(PRECISIONS[precision]).float()
        np.testing.assert_array_equal(initial[name], expected.numpy().astype(np.float64), err_msg=name)

    final = assemble(config, [report["final"] for report in reports])
    ranks = worker_pool(layout.world_size).run(without_refusal, config)
    control = assemble(config, [weights for weights, _ in ranks])
    for name in final:
        np.testing.assert_array_equal(final[name], control[name], err_msg=name)
    for index in range(2):
        found = assemble(config, [report["moments"][index] for report in reports])
        expected_moments = assemble(config, [both[index] for _, both in ranks])
        for name in final:
            np.testing.assert_array_equal(found[name], expected_moments[name], err_msg=name)
            assert found[name].any() or name.endswith((".k.up.bias", ".k.bias")), name


def overflow_and_grow(rank: int, world_size: int, config: Any) -> dict[str, Any]:
    """A row of fp16 overflows down to the smallest scale; then a scale that grows with every update."""
    allow_fp16_on_cpu()
    engine = start(config, world_size)
    scaler = engine.deepspeed_engine.optimizer.loss_scaler
    batches = micro_batches(engine, 0)
    scaler.cur_scale, scaler.min_scale = 1e30, 1e28
    row = [engine.train_batch(batches, 1e-3) for _ in range(12)]
    report: dict[str, Any] = {"row": [(r.applied, r.overflow) for r in row], "scales": [r.loss_scale for r in row]}
    scaler.cur_scale, scaler.scale_window = 256.0, 1
    results = [engine.train_batch(micro_batches(engine, step), 1e-3) for step in range(3)]
    report["grown"] = [r.loss_scale for r in results]
    report["norms"] = [r.gradient_norm for r in results]
    report["moments"] = moments(engine)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_loss_scale(worker_pool: Pools, stage: int) -> None:
    config = layout_config(Layout(data=2, stage=stage), train__precision="fp16", optim__grad_clip=0.0)
    reports = worker_pool(2).run(overflow_and_grow, config)
    first = reports[0]
    assert first["row"] == [(False, True)] * 12, "a row of overflows is reported, not raised"
    assert first["scales"][0] == 1e30 and first["scales"][-1] == 1e28
    assert first["grown"] == [256.0, 256.0, 512.0]  # it grew while the second update was made
    # The scale that grew did not take anything from the gradients: the moments are those of fp32.
    plain = layout_config(Layout(data=2, stage=stage), optim__grad_clip=0.0)
    ranks = worker_pool(2).run(three_updates, plain)
    found = assemble(config, [report["moments"][0] for report in reports])
    expected = assemble(config, [both[0] for both in ranks])
    name = "blocks.1.mlp.fc_in.weight"
    assert np.linalg.norm(found[name] - expected[name]) < 0.02 * np.linalg.norm(expected[name])


def three_updates(rank: int, world_size: int, config: Any) -> list[list[Any]]:
    """Moments after the updates that `overflow_and_grow` ends with."""
    engine = start(config, world_size)
    for step in range(3):
        engine.train_batch(micro_batches(engine, step), 1e-3)
    return moments(engine)


def test_initial_weights_are_whole_draws_of_seed_and_name() -> None:
    config = layout_config(Layout())
    state, again = initial_state(config.model, 1), initial_state(config.model, 1)
    other = initial_state(config.model, 2)
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name])
