"""Replay and checksums in every engine and ZeRO stage: they leave no trace, and name the rank of a flipped bit.

And in real runs: a flipped bit takes the run back, and it ends like one that nothing has disturbed.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from mlra_scale.checkpoint import saver
from mlra_scale.checkpoint.retention import checkpoint_name, latest
from mlra_scale.checkpoint.saving import Cancelled, write_share
from mlra_scale.config import Config
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.interruption import Watchdog
from mlra_scale.training.loop.checkpoints import Checkpoints
from tests.faults import corruption
from tests.support.flips import PLACES, Flip, Injector, bench
from tests.support.layouts import DROPOUT, NORMS, OFFLOADED, Layout, layout_config, pieces
from tests.support.pool import Pools
from tests.support.stored import store_of
from tests.support.training_runs import Finished, base_command, curve, events, main_on_rank, metrics

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
    (Layout(tensor=2, data=2, stage=2), "fp32", {"parallel__sequence_parallel": True}),
]


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
    named, this.named, clean = this.named[2:-1], [], this.clean
    if world_size == 1 and flips:  # as on a device that does not repeat its bits
        this.check._is_exact = False
        for flip in (None, Flip("gradient", 1, 0, 30), Flip("gradient", 1, 0, 1)):
            this.step(3, flip, lambda proposal: this.check.before_update(proposal) and False)
        assert [len(each) for each in this.named] == [0, 1, 0], "a large error is found, a small one is not"
    return SimpleNamespace(
        losses=[(each.loss, each.gradient_norm, each.loss_scale, each.applied) for each in results],
        last=(last.loss, last.gradient_norm, last.applied),
        state=state,
        is_unchanged=all(np.array_equal(a[3], b[3]) for a, b in zip(state, after, strict=True)),
        named=named,
        is_done=is_done,
        clean=clean,
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


@pytest.mark.slow_except("tp1pp1dp2-zero1-bf16")
@pytest.mark.parametrize(
    ("layout", "precision", "overrides"),
    [pytest.param(*case, id=f"{case[0]} {case[1]}".replace(" ", "-")) for case in LAYOUTS],
)
def test_checks_leave_no_trace_and_name_the_rank(
    worker_pool: Pools, layout: Layout, precision: str, overrides: dict[str, Any]
) -> None:
    world, passes = layout.world_size, 3 if layout.data > 1 else 2
    places = [place for place in PLACES if place != "message" or layout.pipeline * layout.tensor > 1]
    # The repeated pass, the exchanged one and the step's own.
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
        if flip.number == 1 and layout.data > 1:
            # It computes the micro-batches of the next data rank, and it is open which of the two is wrong.
            stride = layout.tensor
            others = (layout.data - 1) * stride if flip.rank // stride % layout.data == layout.data - 1 else -stride
            allowed |= suspects_of(layout, flip.place, flip.rank - others)
        assert named[0] and named[0] <= allowed, (flip, named[0])
    for report, control in zip(reports, controls, strict=True):
        assert report.losses == control.losses
        for mine, theirs in zip(report.state, control.state, strict=True):
            np.testing.assert_array_equal(mine[3], theirs[3], err_msg=mine[0])
        assert report.is_unchanged and report.last == control.last, "a step that was found wrong left something behind"
        assert report.clean == 3 and control.clean == 0


@pytest.mark.nightly
def test_no_flip_with_an_effect_is_missed() -> None:
    assert corruption.main(["--flips", "800", "--seed", "1"]) == 0


BATCH = 4
TRAINING = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "train.sequence_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.steps=12",
    "evaluation.every=0",
    "evaluation.batches=1",
    "tev.every=0",
    "checkpoint.every=2",
    "checkpoint.keep_last=1",
    "guard.enabled=true",
]
CHECKS = ["guard.replay_every=3", "guard.checksum_every=1"]


@contextlib.contextmanager
def corrupted(flips: dict[int, Flip], is_lasting: bool) -> Iterator[None]:
    """Flips bits in the runs of this process, by the step; each once, or every time."""
    from mlra_scale.parallel.engine import Engine

    left, train_batch = {**flips}, Engine.train_batch

    def spoiled(engine: Engine, batches: Any, *arguments: Any) -> Any:
        step = int(batches[0].sample_ids_B[0]) // BATCH + 1
        flip = left.get(step) if is_lasting else left.pop(step, None)
        if flip is None:
            return train_batch(engine, batches, *arguments)
        injector = Injector(engine, flip)
        with injector.during_passes():
            injector.before_step()
            result = train_batch(engine, batches, *arguments)
        injector.after_step()
        return result

    with mock.patch.object(Engine, "train_batch", spoiled):
        yield


def run_on_rank(
    rank: int,
    world: int,
    flips: dict[int, Flip],
    is_lasting: bool,
    has_job: bool,
    slow_save: int | None,
    arguments: list[str],
) -> Finished:
    with contextlib.ExitStack() as stack:
        if slow_save is not None:
            stack.enter_context(stopped_during_the_way_back(slow_save))
        stack.enter_context(corrupted(flips, is_lasting))
        stack.enter_context(mock.patch.object(Watchdog, "exclude", return_value=has_job))
        return main_on_rank(rank, world, tuple(arguments))


def made(
    pools: Pools,
    folder: Path,
    data: Path,
    *arguments: str,
    world: int = 1,
    flips: dict[int, Flip] | None = None,
    is_lasting: bool = False,
    has_job: bool = False,
    slow_save: int | None = None,
    code: int = 0,
) -> str:
    """Runs the command line on the ranks of a pool; returns what rank 0 has printed."""
    command = base_command(folder, data, *TRAINING, *arguments)
    finished = pools(world).run(run_on_rank, flips or {}, is_lasting, has_job, slow_save, command, timeout=300.0)
    assert {each.code for each in finished} == {code}, finished[0].stdout[-2000:] + finished[0].stderr[-2000:]
    return finished[0].stdout


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    for name in ("loss", "gradient_norm", "learning_rate", "consumed_samples"):
        assert curve(folder, name) == curve(undisturbed, name), name
    assert [item["step"] for item in metrics(folder) if item["step"]] == list(range(1, 13)), "every step once"
    one, other = store_of(folder, 12), store_of(undisturbed, 12)
    for name in one.table:
        for part in one.parts(name):
            np.testing.assert_array_equal(one.tensor(name, part), other.tensor(name, part), err_msg=f"{part} of {name}")


def returns(folder: Path) -> list[tuple[int, int, list[str]]]:
    found = [event for event in events(folder) if event["event"] == "guard_rollback"]
    return [(event["step"], event["to_step"], [*event["nodes"]]) for event in found]


def test_a_wrong_step_takes_the_run_back_to_a_confirmed_checkpoint_and_nothing_is_lost(
    worker_pool: Pools, training_data: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    made(worker_pool, whole, training_data)
    flips = {6: Flip("gradient", 1, 0, BIT), 8: Flip("second moment", 1, 0, BIT), 9: Flip("sum", 1, 0, BIT)}
    printed = made(worker_pool, folder, training_data, *CHECKS, flips=flips)
    # Checkpoints: 0, 2, ...; replayed: 3, 6, 9 and 12. At step 9 that of step 6 is not yet confirmed by a replay.
    assert returns(folder) == [(6, 2, ["0"]), (8, 4, ["0"]), (9, 4, ["0"])]
    assert "rank 0 on" in printed and "holds weights or moments that changed" in printed
    assert_same_end(folder, whole)
    assert events(whole)[-1]["event"] == "finished" and returns(whole) == []


@contextlib.contextmanager
def stopped_during_the_way_back(slow_save: int) -> Iterator[None]:
    """The save of one step lasts until it is cancelled, and the run ends before the good checkpoint is loaded."""

    def held(folder: Path, save_id: str, topology: Any, snapshot: Any, cancel: threading.Event) -> Any:
        if checkpoint_name(slow_save) not in folder.name:
            return write_share(folder, save_id, topology, snapshot, cancel)
        snapshot.read()
        assert cancel.wait(60.0), "it was waited for"
        raise Cancelled

    error = TrainingStopped("ended", {}, ExitCode.CHECKPOINT_FAILED)
    with mock.patch.object(saver, "write_share", held), mock.patch.object(Checkpoints, "roll_back", side_effect=error):
        yield


def test_a_run_that_ends_on_its_way_back_continues_from_the_good_checkpoint(
    worker_pool: Pools, training_data: Path, tmp_path: Path
) -> None:
    """Nobody would find the corruption again; the checkpoints since the good one may hold it."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    made(worker_pool, whole, training_data, "evaluation.every=9")
    flips = {9: Flip("gradient", 1, 0, BIT)}
    wanted = [*CHECKS, "checkpoint.asynchronous=true", "evaluation.every=9", "--resume", "auto"]
    code = ExitCode.CHECKPOINT_FAILED
    made(worker_pool, folder, training_data, *wanted, flips=flips, slow_save=8, code=code)
    pointer = latest(folder / "checkpoints")
    assert pointer is not None and pointer.name == "step-00000004"
    assert [event["step"] for event in events(folder) if event["event"] == "corruption"] == [9]
    assert "validation_loss" not in metrics(folder)[-1], "nothing that takes time comes before"
    made(worker_pool, folder, training_data, *wanted)
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_where_the_good_checkpoint_is_damaged_too_no_later_one_is_taken(
    worker_pool: Pools, training_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    made(worker_pool, folder, training_data, *CHECKS, "checkpoint.keep_last=9", "train.steps=8")
    file = folder / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    wanted = [*CHECKS, "checkpoint.keep_last=9", "train.steps=12", "--resume", "auto"]
    flips, code = {9: Flip("gradient", 1, 0, BIT)}, ExitCode.CHECKPOINT_FAILED
    made(worker_pool, folder, training_data, *wanted, flips=flips, code=code)
    assert "later checkpoints may hold wrong numbers" in events(folder)[-1]["reason"]
    left = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert left == [*(f"step-0000000{step}" for step in (0, 2, 4, 6)), "suspect-step-00000008"]
    printed = made(worker_pool, folder, training_data, *wanted)
    assert "resumed from" in printed and "step-00000004" in printed, printed[:2000]
    assert [item["step"] for item in metrics(folder)] == list(range(1, 13)), "every step once"


@pytest.mark.slow
def test_in_a_job_the_run_ends_at_the_good_checkpoint_to_continue_without_the_node(
    worker_pool: Pools, training_data: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    stage = 'deepspeed={"zero_optimization": {"stage": 2}}'
    made(worker_pool, whole, training_data, stage, world=2)
    flips = {9: Flip("activation", 2, 1, BIT)}
    wanted = [stage, *CHECKS, "--resume", "auto"]
    made(worker_pool, folder, training_data, *wanted, world=2, flips=flips, has_job=True, code=ExitCode.BAD_NODE)
    stopped = events(folder)[-1]
    assert (stopped["event"], stopped["exit_code"]) == ("stopped", ExitCode.BAD_NODE)
    assert "rank 1 on" in stopped["reason"]
    assert returns(folder) == [(9, 4, ["1"])]
    pointer = latest(folder / "checkpoints")
    assert pointer is not None and pointer.name == "step-00000004"
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000004"], "nothing later is left"
    made(worker_pool, folder, training_data, *wanted, world=2)
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_a_device_that_stays_wrong_ends_the_run(worker_pool: Pools, training_data: Path, tmp_path: Path) -> None:
    flips = {6: Flip("gradient", 1, 0, BIT)}
    arguments = [*CHECKS, "guard.max_rollbacks=1"]
    made(worker_pool, tmp_path / "run", training_data, *arguments, flips=flips, is_lasting=True, code=ExitCode.BAD_NODE)
    folder = tmp_path / "run"
    assert returns(folder) == [(6, 2, ["0"])] * 2
    assert "the run went back 1 time(s) and got no further" in events(folder)[-1]["reason"]
    assert [item["step"] for item in metrics(folder)] == [1, 2]
