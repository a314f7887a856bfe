"""The guard in real runs whose data or learning rate are poisoned at known places: every layout decides the same."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.guard import Poison, poisoned
from mlra_scale.checkpoint import Store, complete_checkpoints, latest
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.log.report import Report
from mlra_scale.training.loop.checkpoints import Checkpoints
from mlra_scale.training.loop.session import Session
from mlra_scale.training.record import read_record
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start import request
from tests.distributed.steps import allow_fp16_on_cpu
from tests.support.pool import Pools
from tests.support.stored import assert_bitwise_equal, store_of
from tests.support.training_runs import Finished, base_command, curve, events, main_on_rank, metrics

BATCH = 8
TRAINING = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "train.sequence_length=32",
    "train.micro_batch_size=1",
    "train.steps=72",
    "evaluation.every=0",
    "evaluation.batches=1",
    "tev.every=0",
    "optim.schedule=constant",
    "optim.lr=3e-3",
    "checkpoint.every=8",
]
GUARD = [
    "guard.enabled=true",
    "guard.window=16",
    "guard.min_window=8",
    "guard.sigmas=5",
    "guard.calm_steps=4",
    "guard.max_skips=1",
    "guard.rate_steps=8",
    "guard.max_lowerings=1",
    "guard.skip_before=1",
    "guard.max_rollbacks=2",
]
LAYOUTS = {
    "one process": (1, []),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "zero3 dp2": (2, ['deepspeed={"zero_optimization": {"stage": 3}}']),
}
# Steps, counted from 0 in places of the data: shuffled labels twice on their own, repeated tokens for longer.
SHUFFLED, REPEATED = (24, 33), range(44, 50)
POISONS = {
    "rate": Poison(rate=range(30, 33), rate_factor=300.0),
    "fp16": Poison(rate=[30], rate_factor=1e6),
    "step 5": Poison(nan=[4], batch=BATCH),
    "steps 6 and 7": Poison(nan=[5, 6], batch=BATCH),
    "nan": Poison(nan=[SHUFFLED[0], *REPEATED], batch=BATCH),
    "none": Poison(),
}
DATA = Poison(labels=SHUFFLED, tokens=REPEATED, vocab_size=512, batch=BATCH)


def deadly(*arguments: Any) -> Any:
    """Something after which the process is gone."""
    roll_back(*arguments)
    raise MemoryError("killed")


roll_back = Session.roll_back


save = Checkpoints.save


def after_a_sync(calls: list[str]) -> Callable[..., None]:
    """Saves, if the record was put on disk since the last time."""

    def checked(*arguments: Any, **options: Any) -> None:
        assert calls == ["sync"], calls
        calls.clear()
        save(*arguments, **options)

    return checked


@contextlib.contextmanager
def injected(poison: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(poisoned(POISONS.get(poison, DATA)))
        if poison == "fp16":
            allow_fp16_on_cpu()
            stack.enter_context(mock.patch.object(request, "resolve_device", return_value="cuda"))
        if poison == "order":
            calls: list[str] = []
            stack.enter_context(mock.patch.object(Report, "sync", lambda report: calls.append("sync")))
            stack.enter_context(mock.patch.object(Checkpoints, "save", after_a_sync(calls)))
        if poison == "after the note":
            stack.enter_context(mock.patch.object(Session, "roll_back", deadly))
        if poison == "before the note":
            stack.enter_context(mock.patch.object(RunDirectory, "write_rollbacks", side_effect=MemoryError("killed")))
        yield


def run_on_rank(rank: int, world_size: int, poison: str, arguments: tuple[str, ...]) -> Finished:
    with injected(poison):
        try:
            return main_on_rank(rank, world_size, arguments)
        except MemoryError as error:
            return Finished(ExitCode.FAILED, "", str(error))


Start = Callable[..., Finished]
Run = Callable[..., Path]
Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def start(worker_pool: Pools, training_data: Path) -> Start:
    def start(folder: Path, layout: str, *arguments: str, poison: str = "data", code: int = 0) -> Finished:
        processes, degrees = LAYOUTS[layout]
        command = base_command(folder, training_data, *TRAINING, *degrees, *arguments)
        finished: list[Finished] = worker_pool(processes).run(run_on_rank, poison, tuple(command), timeout=400.0)
        assert {result.code for result in finished} == {code}, finished[0].stdout[-2000:] + finished[0].stderr[-3000:]
        return finished[0]

    return start


@pytest.fixture(scope="module")
def run(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Run:
    def run(layout: str, *arguments: str, folder: Path | None = None, **options: Any) -> Path:
        folder = folder or tmp_path_factory.mktemp("guarded") / "run"
        start(folder, layout, *arguments, **options)
        return folder

    return run


def decisions(folder: Path) -> list[tuple[Any, ...]]:
    """What the guard did, without the numbers in its words."""
    keys = ("event", "step", "to_step", "skipped_from", "skipped_to", "factor", "until")
    return [tuple(event.get(key) for key in keys) for event in events(folder) if event["event"].startswith("guard_")]


@pytest.fixture(scope="module")
def whole(run: Run) -> Whole:
    """The run that nobody disturbs, once for every layout."""
    return functools.cache(lambda layout: run(layout, *GUARD))


@pytest.fixture(scope="module")
def alone(whole: Whole) -> Path:
    return whole("one process")


def test_poisoned_data_lead_to_skips_then_a_rollback_and_are_not_read_again(alone: Path) -> None:
    names = [(event[0], event[1]) for event in decisions(alone)]
    assert names[:2] == [("guard_skip", 25), ("guard_skip", 34)], "single bad updates are left out, and that is all"
    rollback = next(event for event in events(alone) if event["event"] == "guard_rollback")
    assert names[2:] == [
        ("guard_skip", 45),
        ("guard_skip", 46),
        ("guard_lower_rate", 46),
        ("guard_skip", 47),
        ("guard_skip", 48),
        ("guard_rollback", 48),
        # Places 48 and 49 of the data are bad too.
        ("guard_skip", 44),
        ("guard_skip", 45),
        ("guard_lower_rate", 45),
    ]
    assert (rollback["to_step"], rollback["skipped_from"], rollback["skipped_to"]) == (40, 43 * BATCH, 48 * BATCH)
    record = metrics(alone)
    assert [item["step"] for item in record] == list(range(1, 73)), "every step once"
    ends = {item["step"]: item["consumed_samples"] // BATCH for item in record}
    assert [ends[step] for step in (40, 43, 44, 72)] == [40, 43, 49, 77]
    undone = read_record(alone / "rolled_back.jsonl")
    assert [item["step"] for item in undone] == list(range(41, 49)) and {item["rollback"] for item in undone} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2pp2", "zero3 dp2"])
def test_every_layout_decides_the_same(whole: Whole, alone: Path, layout: str) -> None:
    other = whole(layout)
    assert decisions(other) == decisions(alone)
    ours, theirs = curve(other, "loss"), curve(alone, "loss")
    assert ours == pytest.approx(theirs, rel=1e-4), "the weights are the same but for rounding"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_requeue_in_the_middle_changes_nothing(run: Run, whole: Whole, tmp_path: Path, layout: str) -> None:
    """Stopped while all is well, in the trouble, and behind the return: what is skipped stays skipped."""
    folder = tmp_path / "run"
    for steps in (30, 47, 50):
        run(layout, *GUARD, f"train.steps={steps}", "--resume", "auto", folder=folder)
    state = Store.open(folder / "checkpoints" / "step-00000050").state
    assert [item["to_step"] for item in state["windows"]["guard"]["rollbacks"]] == [40]
    assert state["progress"]["consumed_samples"] == 55 * BATCH, "past what is skipped"
    (folder / "guard.json").unlink()  # the checkpoint knows it too
    run(layout, *GUARD, "train.steps=72", "--resume", "auto", folder=folder)
    undisturbed = whole(layout)
    assert decisions(folder) == decisions(undisturbed)
    for name in ("loss", "gradient_norm", "learning_rate", "consumed_samples", "spike_scores"):
        assert curve(folder, name) == curve(undisturbed, name), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one process", "zero3 dp2"])
def test_in_bf16_a_loss_that_is_not_finite_leads_to_skips_and_a_rollback(run: Run, layout: str) -> None:
    """With the precision, and the guard on, as in the files of slurm/."""
    folder = run(layout, *GUARD, "guard.sigmas=1e6", "train.precision=bf16", "train.steps=56", poison="nan")
    found = [event for event in events(folder) if event["event"].startswith("guard_")]
    assert [(event["event"].removeprefix("guard_"), event["step"]) for event in found] == [
        ("skip", 25),
        *(("skip", 45), ("skip", 46), ("lower_rate", 46), ("skip", 47), ("skip", 48), ("rollback", 48)),
        # Places 48 and 49 of the data are no better.
        *(("skip", 44), ("skip", 45), ("lower_rate", 45)),
    ]
    assert {event["reason"] for event in found if event["event"] == "guard_skip"} == {"loss nan"}
    bad = [item["step"] for item in metrics(folder) if item["loss"] is None]
    assert bad == [25, 44, 45], "no update that was left out has spoilt what comes after it"


@pytest.mark.slow
@pytest.mark.parametrize("death", ["after the note", "before the note"])
def test_killed_in_a_return_the_run_comes_to_the_same(run: Run, alone: Path, tmp_path: Path, death: str) -> None:
    """After guard.json is written, its data stay skipped; before, the same trouble leads to the same return."""
    folder = tmp_path / "run"
    run("one process", *GUARD, poison=death, code=ExitCode.FAILED, folder=folder)
    run("one process", *GUARD, "--resume", "auto", folder=folder)
    resumed = next(event for event in events(folder) if event["event"] == "resume")
    assert resumed["step"] == 40, "the checkpoint that it went back to, and not a later one"
    names = [event[0] for event in decisions(folder)]
    assert names.count("guard_rollback") == [event[0] for event in decisions(alone)].count("guard_rollback")
    for name in ("loss", "gradient_norm", "learning_rate", "consumed_samples"):
        assert curve(folder, name) == curve(alone, name), name


@pytest.mark.slow
def test_no_checkpoint_of_undone_steps_is_left(run: Run, tmp_path: Path) -> None:
    """One of step 46, in the trouble, was there when the run went back to 44."""
    folder = tmp_path / "run"
    fields = ["checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.asynchronous=false"]
    run("one process", *GUARD, *fields, poison="after the note", code=ExitCode.FAILED, folder=folder)
    assert 46 in [event["step"] for event in events(folder) if event["event"] == "checkpoint"]
    left = [path.name for path in complete_checkpoints(folder / "checkpoints")]
    assert left[-1] == "step-00000044" and latest(folder / "checkpoints") == folder / "checkpoints" / left[-1]


@pytest.mark.slow
def test_a_good_checkpoint_that_somebody_has_removed_is_done_without(run: Run, tmp_path: Path) -> None:
    """The run finds out when it starts: from then on it would go back to where it started."""
    folder = tmp_path / "run"
    run("one process", *GUARD, "train.steps=47", folder=folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000040")
    run("one process", *GUARD, "train.steps=52", "guard.max_lowerings=0", "--resume", "auto", folder=folder)
    (rollback,) = (event for event in events(folder) if event["event"] == "guard_rollback")
    assert (rollback["step"], rollback["to_step"]) == (49, 47)


def test_the_record_is_on_disk_before_every_checkpoint(run: Run) -> None:
    """The first one, of step 0, too."""
    folder = run("one process", *GUARD, "train.steps=9", poison="order")
    assert [event["step"] for event in events(folder) if event["event"] == "checkpoint"] == [0, 8, 9]


@pytest.mark.slow
def test_qk_clip_looks_at_the_samples_that_were_read_past_what_is_skipped(run: Run) -> None:
    """And does nothing to weights whose update was left out."""
    folder = run("one process", *GUARD, "qk_clip.threshold=0.01", "qk_clip.samples=4", "train.steps=60")
    places = curve(folder, "consumed_samples")
    assert places[60] > 60 * BATCH, "data were skipped"
    left_out = {event["step"] for event in events(folder) if event["event"] == "guard_skip" and event["step"] <= 43}
    clips = {item["step"]: item["qk_clip"] for item in metrics(folder) if "qk_clip" in item}
    assert left_out == {25, 34} and not left_out & set(clips)
    after = [clips[step] for step in range(50, 61)]
    assert all(clip["largest_logit"] is not None and clip["clipped_heads"] > 0 for clip in after), after


@pytest.mark.slow
def test_a_learning_rate_spike_is_survived(run: Run) -> None:
    guarded = run("one process", *GUARD, "guard.divergence=1.0", "guard.divergence_steps=8", poison="rate")
    unguarded = run("one process", poison="rate")
    assert "guard_rollback" in [event[0] for event in decisions(guarded)]
    assert decisions(unguarded) == []
    print("last losses:", curve(guarded, "loss")[72], "guarded,", curve(unguarded, "loss")[72], "unguarded")


@pytest.mark.slow
def test_weights_that_overflow_fp16_lead_to_a_rollback(run: Run) -> None:
    """At steps 31 to 34, as the limit says; a checkpoint after 32 is none to go back to. Spikes are none of it."""
    fp16 = ["train.precision=fp16", "train.max_consecutive_overflows=4", "train.steps=40"]
    folder = run("one process", *GUARD, *fp16, 'deepspeed={"zero_optimization": {"stage": 1}}', poison="fp16")
    (rollback,) = (event for event in events(folder) if event["event"] == "guard_rollback")
    assert (rollback["step"], rollback["to_step"]) == (34, 24) and "4 loss-scale overflows" in rollback["reason"]
    undone = read_record(folder / "rolled_back.jsonl")
    assert [item["step"] for item in undone if item["overflow"]] == [31, 32, 33, 34]
    assert {score for item in undone for score in item["spike_scores"].values()} == {0.0}
    assert metrics(folder)[-1]["step"] == 40 and not metrics(folder)[-1]["overflow"]


@pytest.mark.slow
def test_a_batch_that_was_made_smaller_on_purpose_is_no_instability(run: Run, tmp_path: Path) -> None:
    """Its gradients are noisier, and their norm higher, for good."""
    folder, watch = tmp_path / "run", [*GUARD, "guard.min_window=16", "train.micro_batch_size=2"]
    run("one process", *watch, "train.steps=24", "train.global_batch_size=32", poison="none", folder=folder)
    smaller = ["train.steps=40", "train.global_batch_size=2", "--resume", "auto"]
    run("one process", *watch, *smaller, poison="none", folder=folder)
    norms = curve(folder, "gradient_norm")
    assert min(norms[step] for step in range(25, 29)) > 1.2 * max(norms[step] for step in range(21, 25))
    assert decisions(folder) == []


def test_it_gives_up_with_a_report(run: Run) -> None:
    folder = run("one process", *GUARD, "guard.max_rollbacks=0", code=ExitCode.UNSTABLE)
    last = events(folder)[-1]
    assert (
        last["event"] == "stopped" and last["exit_code"] == ExitCode.UNSTABLE and "the guard gives up" in last["reason"]
    )


@pytest.mark.slow
def test_without_a_guard_a_run_is_what_it_was(run: Run, tmp_path: Path) -> None:
    """Its thresholds out of reach, an enabled guard changes no digit."""
    watched = run("one process", *GUARD, "guard.sigmas=1e9", "guard.divergence=null", poison="none")
    free = run("one process", poison="none")
    for name in ("loss", "gradient_norm", "learning_rate", "consumed_samples"):
        assert curve(watched, name) == curve(free, name), name


CHANGED = [*GUARD, "guard.calm_steps=50", "guard.max_lowerings=0", "--resume", "auto"]
"""Two bad updates are one too many, and the episode does not end."""


@pytest.mark.slow
def test_a_run_whose_first_update_with_another_optimizer_was_skipped_saves_and_continues_bitwise(
    run: Run, tmp_path: Path
) -> None:
    """Spectron's power iterations have not begun then."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    run("one process", *CHANGED, "optim.name=adamw", "train.steps=4", folder=parts, poison="none")
    shutil.copytree(parts, whole)
    run("one process", *CHANGED, "optim.name=spectron", "train.steps=8", folder=whole, poison="step 5")
    run("one process", *CHANGED, "optim.name=spectron", "train.steps=5", folder=parts, poison="step 5")
    assert [event[:2] for event in decisions(parts)] == [("guard_skip", 5)]
    store = store_of(parts, 5)
    assert store.manifest.momentum_only and not store.buffer_names
    run("one process", *CHANGED, "train.steps=8", folder=parts, poison="none")
    assert_bitwise_equal(store_of(parts, 8), store_of(whole, 8))
    assert store_of(parts, 8).buffer_names and curve(parts, "loss") == curve(whole, "loss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("was", "now"), [("adamw", "spectron"), ("muon", "adamw")], ids=["adamw-spectron", "muon-adamw"]
)
def test_a_rollback_to_another_optimizer_begins_as_a_start_does_and_prints_the_same(
    start: Start, tmp_path: Path, was: str, now: str
) -> None:
    """After an update with the new optimizer, whose state is dropped."""
    folder, again = tmp_path / "run", tmp_path / "again"
    start(folder, "one process", *CHANGED, f"optim.name={was}", "train.steps=4", poison="none")
    shutil.copytree(folder, again)
    arguments = ["one process", *CHANGED, f"optim.name={now}", "train.steps=8"]
    printed = start(folder, *arguments, poison="steps 6 and 7").stdout
    assert [event[:3] for event in decisions(folder)][-1] == ("guard_rollback", 7, 4)
    before, after = printed.split("back to step 4")
    (notice,) = [line for line in before.splitlines() if line.startswith("another optimizer than in the checkpoint")]
    assert notice in after.splitlines()
    shutil.copy(folder / "guard.json", again)  # what the rollback skipped
    assert notice in start(again, *arguments, poison="steps 6 and 7").stdout
    assert_bitwise_equal(store_of(folder, 8), store_of(again, 8))


@pytest.mark.slow
def test_a_start_whose_guard_could_not_roll_back_across_two_changes_is_refused(start: Start, tmp_path: Path) -> None:
    """The good checkpoint is of step 4: from there AdamW would begin anew for the factors and continue for the rest."""
    folder, branch = tmp_path / "run", tmp_path / "branch"
    rules = "optim.rules=[{kind: factor, optimizer: muon}]"
    start(folder, "one process", *CHANGED, "optim.name=adamw", rules, "train.steps=4", poison="none")
    arguments = ["one process", *CHANGED, "optim.rules=[]"]
    start(folder, *arguments, "optim.name=muon", "train.steps=5", poison="step 5")
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "events.jsonl"}
    arguments += ["optim.name=adamw", "train.steps=7"]
    refused = start(folder, *arguments, poison="none", code=ExitCode.BAD_INPUT).stderr
    good, newest = (folder / "checkpoints" / f"step-0000000{step}" for step in (4, 5))
    assert f"optim.name = 'adamw': the guard could not roll back: {good} is older than two changes" in refused
    assert f"--resume {good}, or from {newest} in a new --run-dir" in refused
    assert files == {path: path.read_bytes() for path in files}
    start(branch, *arguments, "--resume", str(newest), poison="none")
    start(folder, *arguments, "--resume", str(good), poison="none")
    assert all(store_of(path, 7).state["engine"]["optimizer_step"] for path in (branch, folder))
