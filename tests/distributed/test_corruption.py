"""Replay and checksums in every engine and ZeRO stage: they leave no trace, and name the rank of a flipped bit."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlra_scale.config import Config
from mlra_scale.stability.watcher import Step
from tests.distributed.steps import allow_fp16_on_cpu
from tests.support.flips import PLACES, Flip, Injector
from tests.support.layouts import DROPOUT, NORMS, OFFLOADED, Layout, layout_config, make_batch, micro_batches, pieces, start
from tests.support.pool import Pools

BIT = 29
"""Of the exponent: smaller changes of an activation may be rounded away by the next sum, and leave nothing to find."""
LAYOUTS = [
    (Layout(), "fp32", {}),
    (Layout(data=2), "fp32", {**DROPOUT, **NORMS}),
    (Layout(tensor=2), "bf16", {}),
    (Layout(data=2, stage=1), "fp32", {}),
    (Layout(data=2, stage=1), "bf16", DROPOUT),
    (Layout(data=2, stage=2), "fp16", {}),
    (Layout(data=2, stage=2), "bf16", {"deepspeed__zero_optimization": OFFLOADED["zero-2"]}),
    (Layout(data=2, stage=3), "fp32", DROPOUT),
    (Layout(data=2, stage=3), "bf16", {"deepspeed__zero_optimization": OFFLOADED["zero-3"]}),
    (Layout(pipeline=2), "fp32", {}),
    (Layout(pipeline=2, stage=1), "bf16", {**DROPOUT, **NORMS}),
    (Layout(pipeline=2, data=2, stage=1), "bf16", {}),
    (Layout(pipeline=2, tensor=2), "fp32", {}),
    (Layout(tensor=2, data=2, stage=2), "fp32", {"parallel__sequence": True}),
]


@dataclass
class Bench:
    """What stands in for the guard, and one rank's account of the steps."""

    engine: Any
    check: Any = None
    named: list[dict[int, str]] = field(default_factory=list)
    clean: int = 0

    def go_back(self, step: int, reason: str, nodes: dict[int, str]) -> None:
        self.named[-1] = {rank: reason for rank in nodes}

    def note_clean_check(self) -> None:
        self.clean += 1

    def read(self, data_rank: int, first_sample: int) -> list[Any]:
        """The micro-batches of a data rank, as the trainer would read them."""
        plan = self.engine.plan
        size = plan.micro_batch_size
        starts = [first_sample + (m * plan.data + data_rank) * size for m in range(plan.accumulation_steps)]
        return [make_batch(self.engine.config, range(start, start + size)) for start in starts]

    def step(self, number: int, flip: Flip | None = None) -> Any:
        """Makes a step that is checked; returns its result."""
        engine, check, injector = self.engine, self.check, Injector(self.engine, flip or Flip("none", 0, -1, 0))
        batches = micro_batches(engine, number)
        step = Step(number + 1, True, number * engine.plan.global_batch_size, batches, 1e-3)
        self.named.append({})
        vectors = [norm.vector for norm in engine._spectral_norms]
        with injector.during_passes():
            check.before_step(step)
            injector.before_step()
            result = engine.train_batch(batches, 1e-3, check.before_update)
        injector.after_step()
        check.after_step(step, result)
        if self.named[-1]:  # what a rollback does
            for norm, vector in zip(engine._spectral_norms, vectors, strict=True):
                norm.vector = vector
        return result, injector.is_done


def bench(config: Config, world_size: int) -> Bench:
    from mlra_scale.stability.corruption import CorruptionCheck

    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    made = Bench(start(config, world_size))
    rank = made.engine.topology.rank
    made.check = CorruptionCheck(made.engine, config, made, f"node-{rank}", made.read, print)  # type: ignore[arg-type]
    return made


def run(rank: int, world_size: int, config: Config, flips: list[Flip]) -> SimpleNamespace:
    """Two steps, and then one that is never made: with every one of the flips, and last without any."""
    this = bench(config, world_size)
    results = [this.step(number)[0] for number in range(2)]
    assert not any(this.named), this.named
    engine = this.engine
    state = [piece for part in ("values", "exp_avg", "exp_avg_sq") for piece in parts_of(engine, part)]
    is_done = [this.step(2, flip)[1] for flip in flips]
    after = [piece for part in ("values", "exp_avg", "exp_avg_sq") for piece in parts_of(engine, part)]
    last = this.step(2)[0]
    named, this.named = this.named[2:-1], []
    return SimpleNamespace(
        losses=[(each.loss, each.gradient_norm, each.loss_scale, each.applied) for each in results],
        last=(last.loss, last.gradient_norm, last.applied),
        state=state,
        is_unchanged=all(np.array_equal(a[3], b[3]) for a, b in zip(state, after, strict=True)),
        named=named,
        is_done=is_done,
        clean=this.clean,
    )


def parts_of(engine: Any, part: str) -> list[Any]:
    from mlra_scale.parallel import Fragment

    return pieces(
        engine, [Fragment(f.name, f.start, getattr(f, part)) for f in engine.owned_fragments(with_moments=True)]
    )


def suspects_of(layout: Layout, place: str, rank: int) -> set[int]:
    """The ranks that may be named for a flip on a rank: tensor ranks exchange sums in every block."""
    if place in ("activation", "message") and layout.tensor > 1:
        return set(range(rank - rank % layout.tensor, rank - rank % layout.tensor + layout.tensor))
    return {rank}


@pytest.mark.slow_except("tp1pp1dp2-zero3-fp32", "tp1pp2dp1-zero1-bf16")
@pytest.mark.parametrize(
    ("layout", "precision", "overrides"),
    [pytest.param(*case, id=f"{case[0]} {case[1]}".replace(" ", "-")) for case in LAYOUTS],
)
def test_checks_leave_no_trace_and_name_the_rank(
    worker_pool: Pools, layout: Layout, precision: str, overrides: dict[str, Any]
) -> None:
    world, passes = layout.world_size, 3 if layout.data > 1 else 2
    places = [place for place in PLACES if place != "message" or layout.pipeline * layout.tensor > 1]
    # The repeated pass, the exchanged one and the step's own; of those in the middle some other rank is outvoted.
    where = [(place, passes - 1) for place in places] + [("gradient", number) for number in range(passes - 1)]
    flips = [Flip(*where[i], world - 1 - i % 2 * (world - 1), BIT, seed=i) for i in range(len(where))]
    checked = {"guard__enabled": True, "guard__replay_every": 1, "guard__checksum_every": 1}
    plain = layout_config(layout, train__precision=precision, **overrides)
    config = layout_config(layout, train__precision=precision, **overrides, **checked)
    reports = worker_pool(world).run(run, config, flips)
    controls = worker_pool(world).run(run, plain, [])
    for index, flip in enumerate(flips):
        named = [set(report.named[index]) for report in reports]
        assert all(each == named[0] for each in named), "decided on every rank alike"
        if not any(report.is_done[index] for report in reports):
            assert flip.place == "message", flip
            continue
        allowed = suspects_of(layout, flip.place, flip.rank)
        assert named[0] and named[0] <= allowed, (flip, named[0])
    for report, control in zip(reports, controls, strict=True):
        assert report.losses == control.losses
        for mine, theirs in zip(report.state, control.state, strict=True):
            np.testing.assert_array_equal(mine[3], theirs[3], err_msg=mine[0])
        assert report.is_unchanged and report.last == control.last, "a step that was found wrong left something behind"
        assert report.clean == 3 and control.clean == 0
