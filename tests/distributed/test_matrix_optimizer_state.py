"""What Muon and Spectron keep from update to update: left alone by a refused update, and resumed bitwise.

Through the store: tests/distributed/test_checkpoint_layouts.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mlra_scale.config import Config
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.step import StepResult
from tests.distributed.oracle_runs import Options, Pools, identify
from tests.distributed.steps import allow_fp16_on_cpu
from tests.distributed.test_restore import assert_same, capture, filler
from tests.support.layouts import (
    DROPOUT,
    OFFLOADED,
    Layout,
    canonical_weights,
    layout_config,
    micro_batches,
    overwrite,
    start,
)
from tests.support.oracle import VECTOR

RATE = 1e-2
SMALL: Options = {"model__num_layers": 2, "optim__lr": RATE}
OPTIMIZERS: dict[str, Options] = {
    "muon": {**SMALL, "optim__name": "muon", "model__attention": "dense"},
    "spectron": {**SMALL, "optim__name": "spectron"},
    "both-and-adamw": {
        **SMALL,
        "optim__name": "spectron",
        "optim__rules": [
            {"names": "blocks.0.*.v.*.weight", "optimizer": "muon"},
            {"names": "blocks.*.mlp.fc_in.weight", "optimizer": "adamw"},
        ],
    },
}
# One layout per wrapper of DeepSpeed's, as in test_gate.py.
WRAPPERS = [
    (Layout(tensor=2), "fp32"),
    (Layout(tensor=2), "bf16"),
    (Layout(data=2, stage=1), "fp32"),
    (Layout(data=2, stage=2), "bf16"),
    (Layout(data=2, stage=2), "fp16"),
    (Layout(data=2, stage=3), "fp32"),
    (Layout(data=2, stage=3), "bf16"),
    (Layout(data=2, stage=3), "fp16"),
    (Layout(tensor=2, pipeline=2), "fp32"),
    (Layout(pipeline=2), "bf16"),
    (Layout(pipeline=2, stage=1), "fp32"),
    (Layout(pipeline=2, stage=1), "bf16"),
]

Vectors = dict[str, torch.Tensor]


def vectors_of(engine: Any) -> Vectors:
    """What rank 0 stores beside weights and moments, on every rank."""
    box = [engine.buffers()]
    dist.broadcast_object_list(box, src=0, group=engine.topology.control_group)
    return {name: vector.clone() for name, vector in box[0].items()}


def assert_same_vectors(first: Vectors, second: Vectors) -> None:
    assert first.keys() == second.keys()
    for name, vector in first.items():
        assert torch.equal(vector, second[name]), name


def steps(engine: Any, first: int, stop: int) -> list[StepResult]:
    return [engine.train_batch(micro_batches(engine, step), RATE / (step + 1)) for step in range(first, stop)]


def survive(rank: int, world_size: int, config: Config) -> None:
    """One step; a refused one, one with a non-finite gradient, in fp16 one that overflows; then two more.

    The engine must stay what it was after the first, and end as one that has seen neither of the others.
    """
    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    engine = start(config, world_size)
    assert steps(engine, 0, 1)[0].applied
    before, vectors, state = capture(engine), vectors_of(engine), engine.training_state()
    kept = {name.removeprefix(f"{VECTOR}/") for name in vectors}
    spectron = {name for name, rule in engine.rules.items() if rule.optimizer == "spectron"}
    assert kept == spectron and (config.optim.name == "spectron") is bool(spectron)
    for name, rule in engine.rules.items():
        held = [tensors for (held_name, _), tensors in before.items() if held_name == name]
        # Weights and both moments, or weights and momentum.
        assert {len(tensors) for tensors in held} <= {3 if rule.optimizer == "adamw" else 2}, name

    refused = engine.train_batch(micro_batches(engine, 1), RATE, lambda _: False)
    assert not refused.applied
    assert_same(capture(engine), before)
    assert_same_vectors(vectors_of(engine), vectors)

    def poison(fragment: Fragment) -> None:
        filler(before)(fragment)
        if fragment.name == "positions.weight":
            fragment.values.fill_(float("nan"))

    engine.restore(poison, state, with_moments=True)
    engine.load_buffers(vectors)
    assert not engine.train_batch(micro_batches(engine, 1), RATE).applied
    found = capture(engine)
    for key in before:
        if key[0] != "positions.weight":
            assert all(map(torch.equal, found[key], before[key])), key
    assert_same_vectors(vectors_of(engine), vectors)

    engine.restore(filler(before), state, with_moments=True)
    engine.load_buffers(vectors)
    if config.train.precision == "fp16":
        scaler = engine.deepspeed_engine.optimizer.loss_scaler
        scale, scaler.cur_scale = scaler.cur_scale, 1e30
        overflow = engine.train_batch(micro_batches(engine, 1), RATE)
        assert overflow.overflow and not overflow.applied
        assert_same(capture(engine), before)
        assert_same_vectors(vectors_of(engine), vectors)
        scaler.cur_scale = scale
    results = steps(engine, 2, 4)

    control = start_again(engine, config)
    steps(control, 0, 1)
    expected = steps(control, 2, 4)
    assert [(r.loss, r.gradient_norm) for r in results] == [(r.loss, r.gradient_norm) for r in expected]
    assert_same(capture(engine), capture(control))
    assert_same_vectors(vectors_of(engine), vectors_of(control))


def start_again(engine: Any, config: Config) -> Any:
    """A new engine on the process groups of another one."""
    from mlra_scale.parallel import build_engine

    return build_engine(config, engine.plan, engine.topology)


@pytest.mark.slow_except("tp2pp2dp1-zero0-fp32-spectron", "tp1pp1dp2-zero3-bf16-both-and-adamw")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("layout", "precision"), WRAPPERS, ids=identify)
def test_an_update_that_is_left_out_leaves_no_trace(
    worker_pool: Pools, layout: Layout, precision: str, optimizer: str
) -> None:
    worker_pool(layout.world_size).run(
        survive, layout_config(layout, train__precision=precision, **OPTIMIZERS[optimizer])
    )


STOP, MORE = 5, 5
RESUMED = [
    (Layout(), "fp32"),
    (Layout(data=2), "bf16"),
    (Layout(data=2, stage=1), "fp32"),
    (Layout(data=2, stage=1), "bf16"),
    (Layout(tensor=2, stage=2), "bf16"),
    (Layout(tensor=2, pipeline=2), "fp32"),
    (Layout(pipeline=2, data=2, stage=1), "bf16"),
    (Layout(tensor=2, data=2, stage=3), "fp32"),
    (Layout(tensor=2, data=2, stage=3), "bf16"),
]


def interrupt(rank: int, world_size: int, config: Config) -> None:
    """Ten steps; then again from step 5, in the same engine and in one that has trained from other weights."""
    engine = start(config, world_size)
    steps(engine, 0, STOP)
    captured, vectors, state = capture(engine), vectors_of(engine), engine.training_state()
    expected = steps(engine, STOP, STOP + MORE)
    final, final_vectors = capture(engine), vectors_of(engine)
    for name, vector in final_vectors.items():
        assert not torch.equal(vector, vectors[name]), name
    other = start_again(engine, config)
    overwrite(other, canonical_weights(config.model, seed=5))
    steps(other, 0, 2)
    for candidate in (engine, other):
        candidate.restore(filler(captured), state, with_moments=True)
        candidate.load_buffers(vectors)
        assert_same(capture(candidate), captured)
        assert_same_vectors(vectors_of(candidate), vectors)
        assert steps(candidate, STOP, STOP + MORE) == expected
        assert_same(capture(candidate), final)
        assert_same_vectors(vectors_of(candidate), final_vectors)

    # Without moments and vectors: as a new optimizer on these weights, whatever the engine has done before.
    fresh = start_again(engine, config)
    fresh.restore(filler(captured), None, with_moments=False)
    fresh.load_buffers({})
    without = steps(fresh, 0, 2)
    other.restore(filler(captured), None, with_moments=False)
    other.load_buffers({})
    assert not any(name.startswith(VECTOR) for name in vectors_of(other))
    assert steps(other, 0, 2) == without
    assert_same(capture(other), capture(fresh))
    assert_same_vectors(vectors_of(other), vectors_of(fresh))


@pytest.mark.slow_except("tp1pp1dp2-zero1-bf16-muon")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("layout", "precision"), RESUMED, ids=identify)
def test_five_and_five_steps_are_ten(worker_pool: Pools, layout: Layout, precision: str, optimizer: str) -> None:
    """Bitwise, in the engine alone and with dropout on."""
    config = layout_config(layout, train__precision=precision, **OPTIMIZERS[optimizer], **DROPOUT)
    worker_pool(layout.world_size).run(interrupt, config)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_optimizers_continue_bitwise(worker_pool: Pools, name: str, optimizer: str) -> None:
    config = layout_config(Layout(data=2), **OPTIMIZERS[optimizer], **DROPOUT)
    config = config.model_copy(update={"deepspeed": {"zero_optimization": OFFLOADED[name]}})
    # DeepSpeed compiles its CPUAdam at first use: a minute or two, once per machine.
    worker_pool(2).run(interrupt, config, timeout=420.0)


def momenta(rank: int, world_size: int, config: Config) -> list[list[np.ndarray]]:
    """After each of two updates, before which the loss scale is 2^8 and 2^12 in fp16."""
    if is_scaled := config.train.precision == "fp16":
        allow_fp16_on_cpu()
    engine = start(config, world_size)
    found = []
    for step, scale in enumerate((256.0, 4096.0)):
        if is_scaled:
            engine.deepspeed_engine.optimizer.loss_scaler.cur_scale = scale
        result = engine.train_batch(micro_batches(engine, step), RATE)
        assert result.applied and result.loss_scale == (scale if is_scaled else None)
        held = engine.held_fragments(with_moments=True)
        found.append([f.exp_avg.numpy().copy() for f in held if f.exp_avg is not None and f.exp_avg_sq is None])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "spectron"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_scale_is_in_no_momentum(worker_pool: Pools, stage: int, optimizer: str) -> None:
    """An orthogonalised update does not show the scale of its gradient; a momentum over two scales would be wrong."""
    options = {**OPTIMIZERS[optimizer], "train__precision": "fp16", "optim__grad_clip": 0.0}
    plain = layout_config(Layout(data=2, stage=stage), **{**options, "train__precision": "fp32"})
    found = worker_pool(2).run(momenta, layout_config(Layout(data=2, stage=stage), **options))
    expected = worker_pool(2).run(momenta, plain)
    for of_rank, expected_of_rank in zip(found, expected, strict=True):
        for step, (scaled, whole) in enumerate(zip(of_rank, expected_of_rank, strict=True)):
            assert len(scaled) == len(whole) > 0, step
            difference = np.linalg.norm(np.concatenate(scaled) - np.concatenate(whole))
            assert difference < 0.02 * np.linalg.norm(np.concatenate(whole)), step
