"""A run that is put back to a captured state continues bitwise as if nothing had happened, in every optimizer wrapper.

Captured in memory, fragment by fragment, so that nothing but the engine is under test; dropout is on.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlra_scale.config import Config
from mlra_scale.parallel import Engine, Fragment, StepResult, build_engine
from tests.distributed.steps import allow_fp16_on_cpu
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
from tests.support.pool import Pools

Captured = dict[tuple[str, int], list[torch.Tensor]]

STOP, STEPS = 3, 6

CASES = [
    (Layout(), "fp32"),
    (Layout(), "bf16"),
    (Layout(data=2), "bf16"),
    (Layout(data=2, stage=1), "fp32"),
    (Layout(data=2, stage=1), "bf16"),
    (Layout(data=2, stage=1), "fp16"),
    (Layout(tensor=2, stage=2), "fp32"),
    (Layout(tensor=2, stage=2), "bf16"),
    (Layout(tensor=2, pipeline=2), "fp32"),
    (Layout(tensor=2, pipeline=2), "bf16"),
    (Layout(pipeline=2, data=2, stage=1), "fp32"),
    (Layout(pipeline=2, data=2, stage=1), "bf16"),
    (Layout(tensor=2, data=2, stage=3), "fp32"),
    (Layout(tensor=2, data=2, stage=3), "bf16"),
    (Layout(tensor=2, data=2, stage=3), "fp16"),
]


def capture(engine: Engine) -> Captured:
    """Copies of all values that this rank holds, moments included where there are any."""
    fragments = engine.held_fragments(with_moments=True)
    found = {
        (f.name, f.start): [t.clone() for t in (f.values, f.exp_avg, f.exp_avg_sq) if t is not None] for f in fragments
    }
    assert len(found) == len(fragments)
    return found


def filler(captured: Captured) -> Callable[[Fragment], None]:
    def fill(fragment: Fragment) -> None:
        targets = [t for t in (fragment.values, fragment.exp_avg, fragment.exp_avg_sq) if t is not None]
        for target, values in zip(targets, captured[fragment.name, fragment.start], strict=False):
            target.copy_(values)

    return fill


def assert_same(first: Captured, second: Captured) -> None:
    assert first.keys() == second.keys()
    for key, tensors in first.items():
        assert len(tensors) == len(second[key]), key
        for which, one, other in zip(("weights", "exp_avg", "exp_avg_sq"), tensors, second[key], strict=False):
            assert torch.equal(one, other), (key, which)


def model_weights(engine: Any) -> list[torch.Tensor]:
    """The weights that the model computes with, as this rank keeps them between steps."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]


def steps(engine: Engine, first: int, stop: int) -> list[StepResult]:
    if engine.config.train.precision == "fp16":
        # So that the scale grows within the few steps here; this is configuration, nothing that is restored.
        engine.deepspeed_engine.optimizer.loss_scaler.scale_window = 2
    found = []
    for step in range(first, stop):
        batches = micro_batches(engine, step)
        found.append(engine.train_batch(batches, 1e-3 / (step + 1)))
    return found


def interrupt(rank: int, world_size: int, config: Config) -> list[StepResult]:
    """Six steps; then again from step 3 in the same engine and in a new one, with and without moments."""
    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    engine = start(config, world_size)
    if config.train.precision == "fp16":
        scaler = engine.deepspeed_engine.optimizer.loss_scaler
        scaler.cur_scale = 1e30  # overflows once
        results = steps(engine, 0, 1)
        scaler.cur_scale = 256.0
        results += steps(engine, 1, STOP)
    else:
        results = steps(engine, 0, STOP)
    num_applied = sum(result.applied for result in results)
    captured, state = capture(engine), json.loads(json.dumps(engine.training_state()))
    assert (state["optimizer_step"], state["num_skipped"]) == (num_applied, STOP - num_applied)
    expected = steps(engine, STOP, STEPS)
    final, final_state, computed = capture(engine), engine.training_state(), model_weights(engine)

    new = build_engine(config, engine.plan, engine.topology)
    overwrite(new, canonical_weights(config.model, seed=5))
    for candidate in (engine, new):
        candidate.restore(filler(captured), state, with_moments=True)
        assert candidate.training_state() == state
        assert_same(capture(candidate), captured)
        assert steps(candidate, STOP, STEPS) == expected
        assert_same(capture(candidate), final)
        assert candidate.training_state() == final_state
        assert all(map(torch.equal, model_weights(candidate), computed))

    # Without moments: as a new optimizer on these weights, whatever the engine has done before.
    fresh = build_engine(config, engine.plan, engine.topology)
    fresh.restore(filler(captured), None, with_moments=False)
    beginning = fresh.training_state()
    without = steps(fresh, 0, STOP)
    new.restore(filler(captured), None, with_moments=False)
    assert new.training_state() == beginning
    assert all(f.exp_avg is f.exp_avg_sq is None for f in new.owned_fragments(with_moments=True))
    assert steps(new, 0, STOP) == without
    assert_same(capture(new), capture(fresh))
    return results + expected


@pytest.mark.slow_except("tp1pp1dp2-zero1-bf16", "tp1pp1dp2-zero1-fp16")
@pytest.mark.parametrize(("layout", "precision"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_a_restored_engine_continues_bitwise(worker_pool: Pools, layout: Layout, precision: str) -> None:
    config = layout_config(layout, train__precision=precision, model__num_layers=2, **DROPOUT)
    reports = worker_pool(layout.world_size).run(interrupt, config)
    assert len(set(map(str, reports))) == 1, "ranks disagree"  # as text: the norm of an overflow is not equal to itself
    if precision == "fp16":
        assert [r.loss_scale for r in reports[0]] == [1e30, 256.0, 256.0, 256.0, 512.0, 512.0]


@pytest.mark.slow_except("bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_continues_bitwise_where_nothing_is_kept_whole(worker_pool: Pools, precision: str) -> None:
    # By default weights as small as these stay gathered, and all of them are updated as one group.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
    config = layout_config(Layout(data=2, stage=3), train__precision=precision, model__num_layers=2, **DROPOUT)
    config = config.model_copy(update={"deepspeed": {"zero_optimization": zero}})
    worker_pool(2).run(interrupt, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_optimizer_continues_bitwise(worker_pool: Pools, name: str) -> None:
    # With this beta, the fourth power by multiplication in fp32 (as CPUAdam has it) is not that of `pow`.
    config = layout_config(Layout(data=2), model__num_layers=2, optim__betas=(0.9, 0.952), **DROPOUT)
    config = config.model_copy(update={"deepspeed": {"zero_optimization": OFFLOADED[name]}})
    # DeepSpeed compiles its CPUAdam at first use: a minute or two, once per machine.
    worker_pool(2).run(interrupt, config, timeout=420.0)


def ownership(rank: int, world_size: int, config: Config) -> tuple[set[str], set[str]]:
    engine = start(config, world_size)
    held = engine.held_fragments()
    owned = {(f.name, f.start) for f in engine.owned_fragments()}
    assert owned == {(f.name, f.start) for f in held if engine.owns(f.name)}
    return {f.name for f in held}, {name for name, _ in owned}


def test_copies_are_held_and_not_owned(worker_pool: Pools) -> None:
    ranks = worker_pool(4).run(ownership, layout_config(Layout(tensor=2, pipeline=2)))
    for rank, (held, owned) in enumerate(ranks):
        tensor_rank, stage = rank % 2, rank // 2
        assert "embedding.weight" in held and ("embedding.weight" in owned) == (stage == 0)
        norm = f"blocks.{2 * stage}.mlp_norm.weight"
        assert norm in held and (norm in owned) == (tensor_rank == 0)


def weights(engine: Engine) -> dict[tuple[str, int], list[float]]:
    """Copies of the weights that this rank holds."""
    return {key: tensors[0].tolist() for key, tensors in capture(engine).items()}


def changes(rank: int, world_size: int, config: Any) -> list[int]:
    """Counts, after each of four calls, how often somebody who reads the weights was asked."""
    engine, asked, counts = start(config, world_size), list[bool](), list[int]()
    before = weights(engine)
    step, weight = micro_batches(engine, 0), "blocks.0.attention.q.up.weight"

    def ask() -> None:
        assert weights(engine) == before
        asked.append(True)

    engine.before_change = ask
    calls: list[Callable[[], object]] = [
        lambda: engine.train_batch(step, 1e-3, lambda _: False),
        lambda: engine.train_batch(step, 1e-3),
        lambda: engine.scale_rows({weight: torch.full((engine.table[weight].shape[0],), 0.5)}),
        lambda: engine.restore(lambda fragment: None, engine.training_state(), with_moments=True),
    ]
    for call in calls:
        call()
        counts.append(len(asked))
        before = weights(engine)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(data=2, stage=1), Layout(pipeline=2)], ids=str)
def test_who_reads_weights_is_asked_before_they_change(worker_pool: Pools, layout: Layout) -> None:
    assert worker_pool(2).run(changes, layout_config(layout)) == [[0, 1, 2, 3]] * 2
