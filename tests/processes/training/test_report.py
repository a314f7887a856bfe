"""What a run reports: its record, its events, the console, and what rank 0 alone writes."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlra_scale.checkpoint import FinishedSave
from mlra_scale.config import batch_plan, load_config
from mlra_scale.stability.guard import Action
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.log import report as report_module
from mlra_scale.training.log.console import suppressed_output
from mlra_scale.training.log.report import Report, report_nothing_to_do
from mlra_scale.training.log.wandb_log import WandbLog
from mlra_scale.training.record import commit, read_record
from mlra_scale.training.resume import Change
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.request import ResolvedRun
from mlra_scale.training.start.resume_choice import Rejected, ResumePoint
from tests.support.study_folders import write_run

VALUES = {"loss": 2.0, "gradient_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 10.0, "memory_gib": 0.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report_of(folder: Path, is_main: bool = True, overrides: tuple[str, ...] = (), **fields: Any) -> Report:
    config = load_config("debug", overrides=["train.steps=4", *overrides])
    directory = RunDirectory(folder / "run")
    return Report(ResolvedRun(config, batch_plan(config, 1), directory, ResumePoint(**fields)), is_main)


def test_ranks_other_than_the_first_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report_of(tmp_path, is_main=False) as report:
        report.record(Progress(1, 8, 512), VALUES)
        report.note("checkpoint", "saved")
        report.finish(Progress(4, 32, 2048), 10.0, 0.5)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_bar_is_for_terminals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stream in (("file", io.StringIO()), ("terminal", Terminal())):
        monkeypatch.setattr("sys.stderr", stream)
        with report_of(tmp_path / name) as report:
            report.open()
            report.record(Progress(1, 8, 512), {})
        assert ("| 1/4 [" in stream.getvalue() or "| 0/4 [" in stream.getvalue()) is (name == "terminal")


def test_the_last_tev_is_in_the_lines_between_and_lines_that_a_new_start_removes_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with report_of(tmp_path) as report:
            report.open()
            report.record(Progress(1, 8, 512), {"tev_mean": 0.02, "tev_std": 0.001})
            report.record(Progress(2, 16, 1024), VALUES)
    out = capsys.readouterr().out
    assert "step 2/4 | loss 2.0000" in out and "TEV 0.02000 +- 0.00100" in out and "metrics.jsonl: 2 line(s)" in out
    assert ["loss" in record for record in read_record(tmp_path / "run" / "metrics.jsonl")] == [False, True]
    (event,) = [item for item in read_record(tmp_path / "run" / "events.jsonl") if item["event"] == "begun_anew"]
    assert event["records_cut"] == 2


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (TrainingStopped("step 3: no number", {"step": 3, "loss": float("nan")}), "stopped", ExitCode.NON_FINITE),
        (TrainingStopped("as asked", {"step": 3}, ExitCode.PREEMPTED), "preempted", ExitCode.PREEMPTED),
        (KeyboardInterrupt(), "interrupted", ExitCode.INTERRUPTED),
        (OSError("disk full"), "failed", ExitCode.FAILED),
    ],
)
def test_how_a_run_ended_is_an_event(tmp_path: Path, error: BaseException, event: str, code: ExitCode) -> None:
    with pytest.raises(type(error)), report_of(tmp_path) as report:
        report.open()
        raise error
    last = read_record(tmp_path / "run" / "events.jsonl")[-1]
    assert (last["event"], last["exit_code"]) == (event, code)
    if isinstance(error, TrainingStopped):
        assert (last["step"], last["reason"]) == (3, str(error))
        assert last.get("loss") == ("nan" if event == "stopped" else None)


def test_an_end_before_the_first_step_is_an_event_of_a_run_that_is_there(tmp_path: Path) -> None:
    """Its checkpoint could not be read, say. A directory without a run stays one: the next start is the first."""
    stop = TrainingStopped("cannot be read", {"step": 1}, ExitCode.CHECKPOINT_FAILED)
    with pytest.raises(TrainingStopped), report_of(tmp_path):
        raise stop
    assert list(tmp_path.iterdir()) == []
    with report_of(tmp_path) as report:
        report.open()
    with pytest.raises(TrainingStopped), report_of(tmp_path):
        raise stop
    (*_, last) = read_record(tmp_path / "run" / "events.jsonl")
    assert (last["event"], last["reason"], last["exit_code"]) == ("stopped", "cannot be read", 4)


def test_a_record_that_cannot_be_opened_is_an_event(tmp_path: Path) -> None:
    with report_of(tmp_path) as report:
        report.open()
    (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError), report_of(tmp_path) as report:
        report.open()
    (*_, last) = read_record(tmp_path / "run" / "events.jsonl")
    assert last["event"] == "failed" and "IsADirectoryError" in last["reason"]


def test_replaced_checkpoints_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    with report_of(tmp_path) as report:
        report.open()
        checkpoints.mkdir()
        assert report.sync() is None
        checkpoints.rename(tmp_path / "moved")
        checkpoints.mkdir()
        assert report.sync() is None and report.sync() is None
    assert f"{checkpoints} was moved, removed or replaced" in capsys.readouterr().out
    events = [item["event"] for item in read_record(tmp_path / "run" / "events.jsonl")]
    assert events.count("checkpoints_replaced") == 1


def test_a_run_that_is_done_reports_what_was_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report_of(tmp_path) as report:
        report.open()
    config, run = load_config("debug", overrides=["train.steps=4"]), RunDirectory(tmp_path / "run")
    rejected = (Rejected(Path("latest"), "is missing"),)
    resume = ResumePoint(Path("step-4"), rejected, "training", is_in_place=True, progress=Progress(4, 32, 2048))
    report_nothing_to_do(ResolvedRun(config, batch_plan(config, 1), run, resume))
    assert "fallback: latest is passed over: is missing\nalready at step 4" in capsys.readouterr().out
    start, fallback, finished = read_record(run.events)
    assert [start["event"], fallback["event"], finished["event"]] == ["start", "fallback", "finished"]
    assert start["commit"] == commit(), "which code ran"


def test_the_summary_of_a_resumed_run_begins_where_the_whole_run_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with report_of(tmp_path) as report:
        report.open()
        report.record(Progress(2, 16, 1024), {**VALUES, "loss": 6.0})
        report.record(Progress(3, 24, 1536), {**VALUES, "loss": 5.5})
    with report_of(tmp_path, checkpoint=Path("x"), kind="training", progress=Progress(2, 16, 1024)) as report:
        report.open()
        report.record(Progress(4, 32, 2048), {**VALUES, "loss": 5.0})
        report.finish(Progress(4, 32, 2048), 10.0, 0.5)
    assert "6.0000 -> 5.0000 (perplexity 148.4)" in capsys.readouterr().out
    assert [record["step"] for record in read_record(tmp_path / "run" / "metrics.jsonl")] == [2, 4]


def test_where_a_run_resumes_and_its_changes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields: dict[str, Any] = {
        "checkpoint": Path("step-1"),
        "rejected": (Rejected(Path("step-2"), "is missing"),),
        "kind": "training",
        "progress": Progress(1, 8, 512),
        "changes": (Change("optim.lr", 0.1, 0.2), Change("number of ranks", 4, 2)),
    }
    with report_of(tmp_path, **fields) as report:
        report.open()
    out = capsys.readouterr().out
    change = "changed from here on: optim.lr: 0.1 -> 0.2"
    assert all(part in out for part in ("step-2 is passed over: is missing", "resumed from step-1", change)), out
    events = [{**event, "time": ""} for event in read_record(tmp_path / "run" / "events.jsonl")]
    assert [event["event"] for event in events] == ["start", "fallback", "resume", "changed", "changed"]
    fallback = {"passed_over": "step-2", "reason": "is missing", "used": "step-1"}
    assert events[1] == {"time": "", "event": "fallback", **fallback}
    assert events[4] == {"time": "", "event": "changed", "field": "number of ranks", "was": 4, "now": 2}
    weights = tmp_path / "imported"
    with report_of(tmp_path / "new", kind="weights", checkpoint=weights) as report:
        report.open()
    assert f"begins with the weights of {weights}" in capsys.readouterr().out
    run = RunDirectory(tmp_path / "new" / "run")
    assert [event["event"] for event in read_record(run.events)] == ["start", "initialized_from"]
    assert run.origin() == weights


def test_suppressed_output_is_shown_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with suppressed_output():
        print("chatter")
    with pytest.raises(ValueError, match="broken"), suppressed_output():
        print("the last words")
        raise ValueError("broken")
    assert capsys.readouterr() == ("", "the last words\n")


def test_copies_that_differ_are_an_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report_of(tmp_path) as report:
        report.open()
        report.on_saved(FinishedSave(1, tmp_path / "step-00000001", 9, 0.1, 0.2))
        report.on_saved(FinishedSave(2, tmp_path / "step-00000002", 9, 0.1, 0.2, drift="copies of x differ"))
    events = [event for event in read_record(tmp_path / "run" / "events.jsonl") if "cop" in event["event"]]
    assert [(event["step"], event["reason"]) for event in events] == [(2, "copies of x differ")]
    assert "copies of x differ" in capsys.readouterr().out


def test_a_lost_record_leaves_no_event_unsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with report_of(tmp_path) as report:
        report.open()
        run, fsync, synced = RunDirectory(tmp_path / "run"), os.fsync, list[int]()

        def noted(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        events = run.events.stat().st_ino
        run.metrics.unlink()
        lost = report.sync()
        assert lost is not None and lost.startswith(f"{run.metrics} is gone") and synced == [events]
        run.events.unlink()
        assert f"; {run.events} is gone" in (report.sync() or ""), "both are named"


def guarded_run(folder: Path) -> RunDirectory:
    """A run whose guard does all that it can."""
    with report_of(folder) as report:
        report.open()
        report.record(Progress(1, 8, 512), VALUES)
        lowered, lower = {"factor": 0.5, "until": 203}, {"factor": 0.25, "until": 201}
        rollback = Action("rollback", 3, "2 bad updates", 1, (8, 24))
        report.on_guard_actions([Action("skip", 2, "loss 9"), Action("lower_rate", 2, "2 bad updates")], lowered)
        report.on_guard_actions([Action("skip", 3, "loss 9"), rollback], lowered)
        report.on_rollback(rollback, 2, Progress(1, 8, 512), lower)
        report.on_guard_actions([Action("give_up", 2, "in vain")], lower)
    return RunDirectory(folder / "run")


def test_decisions_of_the_guard_are_reported_with_the_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {event["event"]: event for event in read_record(guarded_run(tmp_path).events) if "guard" in event["event"]}
    assert list(found) == ["guard_skip", "guard_lower_rate", "guard_rollback", "guard_give_up"]
    assert (found["guard_lower_rate"]["factor"], found["guard_lower_rate"]["until"]) == (0.5, 203)
    assert (found["guard_rollback"]["factor"], found["guard_rollback"]["until"]) == (0.25, 201)
    out = capsys.readouterr().out
    assert "step 2: learning rate times 0.5: 2 bad updates" in out
    assert "back to step 1, samples 8 to 23 are not read again, learning rate times 0.25: 2 bad updates" in out


def test_reports_are_tried_with_the_events_that_a_guard_writes(tmp_path: Path) -> None:
    def keys(events: Path) -> dict[str, set[str]]:
        return {event["event"]: set(event) for event in read_record(events) if event["event"].startswith("guard_")}

    real, invented = keys(guarded_run(tmp_path / "real").events), keys(write_run(tmp_path / "study") / "events.jsonl")
    assert invented == {event: real[event] for event in invented} and len(invented) == 3


def test_what_the_guard_does_goes_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    wandb: Any = SimpleNamespace(
        offline=True, finish=lambda **_: None, log=lambda numbers, step: logged.append((step, dict(numbers)))
    )
    monkeypatch.setattr(report_module, "open_wandb", lambda *_: WandbLog(wandb))
    guarded_run(tmp_path)
    assert [entry for entry in logged if "loss" not in entry[1]] == [
        (2, {"guard/skip": 1}), (2, {"guard/lower_rate": 0.5}), (3, {"guard/skip": 1}),
        (3, {"guard/rollback": 2, "guard/to_step": 1}), (2, {"guard/give_up": 1}),
    ]  # fmt: skip
