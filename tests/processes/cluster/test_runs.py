"""mlra_scale/cluster/runs.py and tools/jobs.py: what is shown of runs, and what of damaged ones."""

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.cli import jobs
from mlra_scale.cluster import runs as module
from mlra_scale.cluster import runs_text
from mlra_scale.cluster.job_file import JobAttempt, JobFile
from mlra_scale.training import record
from mlra_scale.training.record import EventLog, JsonLines, lines_from_end
from mlra_scale.training.run_directory import RunDirectory, run_lock

ROOT = Path(__file__).resolve().parents[3]
NOW = float(int(time.time()) + 86400)
"""The time of the tables: after everything that the tests write."""

Tool = Callable[..., tuple[int, str, str]]
Slurm = Callable[[str], Path]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    def run(*arguments: Any) -> tuple[int, str, str]:
        code = jobs.COMMAND.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def commands(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No command is found but those that a test puts here."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("COLUMNS", raising=False)
    return folder


@pytest.fixture
def slurm(commands: Path) -> Slurm:
    """Makes a squeue from Python code; it notes its calls in the file that is returned."""

    def make(code: str) -> Path:
        calls, script = commands / "calls", commands / "squeue"
        note = (
            "import json, os, sys\n" + f"open({str(calls)!r}, 'a').write(json.dumps([sys.argv[1:], dict(os.environ)])"
        )
        script.write_text(f"#!{sys.executable} -I\n{note} + '\\n')\n{code}\n")
        script.chmod(0o755)
        return calls

    return make


def at(minutes: float) -> str:
    """The time so many minutes before NOW."""
    return datetime.fromtimestamp(NOW - 60 * minutes, UTC).isoformat(timespec="seconds")


def write_job(path: Path, state: Any, attempts: Sequence[JobAttempt] = (), **values: Any) -> JobFile:
    path.mkdir(parents=True, exist_ok=True)
    job = JobFile(path / "job.json", job_id="7", name="train", steps=100, attempts=list(attempts), **values)
    job.become(state, values.get("reason", ""))
    return job


def attempt(number: int, end: str | None = None, reason: str | None = None, **values: Any) -> JobAttempt:
    ended = None if end is None else at(60 - 10 * number)
    started = values.pop("started", at(70 - 10 * number))
    return JobAttempt(number, "7", ["n1", "n2"], 16, started=started, end=end, reason=reason, ended=ended, **values)


def write_record(path: Path, *records: dict[str, Any], minutes: float = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(path / "metrics.jsonl")
    for item in records:
        lines.write(item)
    lines.close()
    os.utime(path / "metrics.jsonl", (NOW - 60 * minutes,) * 2)


def write_events(path: Path, *events: str | dict[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    log = EventLog(path / "events.jsonl")
    for event in events:
        name, values = (event, {}) if isinstance(event, str) else (event["event"], event)
        log.event(name, **{key: value for key, value in values.items() if key != "event"})
    log.close()


def only_row(folder: Path) -> module.RunRow:
    runs, notes = module.list_runs([folder], NOW)
    assert len(runs) == 1 and notes == []
    return runs[0]


def test_the_row_of_a_job(tmp_path: Path) -> None:
    """Every curve has a cadence of its own: its last value may stand some lines before the last one."""
    run = tmp_path / "first"
    write_job(
        run,
        "running",
        [attempt(1, "preempted", "a signal"), attempt(2, "hung", "rank 3 on n1 is silent"), attempt(3)],
        num_requeues=1,
    )
    write_record(
        run,
        {"step": 8, "tev_mean": 0.01, "tev_std": 0.001, "loss": 9.0},
        {"step": 10, "tev_mean": 0.02, "tev_std": 0.002, "validation_loss": 5.0},
        {"step": 11, "loss": 4.25, "tokens_per_second": 12345.6},
        {"step": 12, "loss": None, "tev_mean": "none"},
        minutes=3,
    )
    write_events(run, {"event": "start", "step": 9, "world_size": 16})
    # The job file and the events were written a day before NOW: the record is the last sign.
    row = only_row(tmp_path)
    assert (row.name, row.state, row.job_id) == ("first", "running", "7")
    assert (row.nodes, row.ranks, row.step, row.steps) == (2, 16, 12, 100)
    assert (row.loss, row.validation_loss, row.tev_mean, row.tev_std) == (4.25, 5.0, 0.02, 0.002)
    assert (row.tokens_per_second, row.restarts, row.requeues) == (12345.6, 2, 1)
    assert row.last_error == "attempt 2: rank 3 on n1 is silent" and row.unreadable == []
    assert row.age_seconds == 180.0 and row.last_sign == at(3)
    head, line = runs_text.table([row]).splitlines()
    assert " ".join(head.split()) == "RUN STATE JOB NODES x RANKS STEP LOSS TEV TOKENS/S RESTARTS AGE LAST ERROR"
    wanted = "first running 7 2 x 8 12/100 4.2500 0.02000 +- 0.00200 12,346 2 (1 requeued) 3 min"
    assert " ".join(line.split()) == f"{wanted} attempt 2: rank 3 on n1 is silent"
    assert line.index("attempt 2") == head.index("LAST ERROR")


def test_the_age_is_that_of_the_newest_sign(tmp_path: Path) -> None:
    write_job(tmp_path / "x", "running")
    write_record(tmp_path / "x", {"step": 1}, minutes=600_000_000 / 60)
    now = time.time()
    row = module.read_run(tmp_path / "x", now)
    assert row.age_seconds is not None and row.age_seconds < 60  # job.json, and not the old record
    assert module.read_run(tmp_path / "x", now - 1000).age_seconds == 0  # a clock that goes behind
    (tmp_path / "x" / "job.json").unlink()
    age = module.read_run(tmp_path / "x", NOW).age_seconds
    assert age == pytest.approx(600_000_000, abs=2)
    assert "  6944 d  " in runs_text.table([module.read_run(tmp_path / "x", NOW)])


@pytest.mark.parametrize(
    ("state", "reason", "attempts", "error"),
    [
        ("failed", "5 failures in a row", [attempt(1, "failed", "rank 0 died")], "5 failures in a row"),
        ("requeued", "no usable node in the allocation", [], "no usable node in the allocation"),
        ("preempted", "a signal", [attempt(1, "preempted", "a signal")], None),
        ("done", "all steps are done", [attempt(1, "done", "all steps are done")], None),
        ("done", "", [attempt(1, "lost_node", "n2 is lost"), attempt(2, "done", "all")], "attempt 1: n2 is lost"),
        ("running", "", [attempt(1, "hung", "silent"), attempt(2, "failed"), attempt(3)], "attempt 2: failed"),
        ("pending", "", [], None),
    ],
)
def test_the_last_error(tmp_path: Path, state: str, reason: str, attempts: list[JobAttempt], error: str | None) -> None:
    write_job(tmp_path, state, attempts, reason=reason)
    row = only_row(tmp_path)
    assert (row.state, row.last_error) == (state, error)
    assert row.restarts == max(0, len(attempts) - 1)


START = {"event": "start", "step": 0, "world_size": 4}


@pytest.mark.parametrize(
    ("events", "state", "error"),
    [
        (["start", {"event": "finished", "steps": 20}], "done", None),
        (["start", {"event": "finished"}, {"event": "export_failed", "reason": "no quota"}], "done", "no quota"),
        (["start", {"event": "stopped", "reason": "the loss is nan", "step": 9}], "failed", "the loss is nan"),
        (["start", {"event": "failed", "reason": "OSError: full", "step": 9}], "failed", "OSError: full"),
        (["start", {"event": "preempted", "reason": "after step 9"}], "preempted", None),
        (["start", {"event": "interrupted", "step": 9}], "interrupted", None),
        ([{"event": "failed", "reason": "full"}, "start", {"event": "finished", "steps": 20}], "done", "full"),
        ([{"event": "failed", "reason": "full"}, "start"], "unknown", "no process is at work here, and no end was rec"),
        (["start", {"event": "checkpoint", "step": 5}], "unknown", "no process is at work here, and no end was recor"),
        ([], "unknown", "no process is at work here, and no end was recorded"),
    ],
)
def test_a_run_started_by_hand(tmp_path: Path, events: list[Any], state: str, error: str | None) -> None:
    (tmp_path / "config.yaml").write_text("train:\n  steps: 20\n")
    write_events(tmp_path, *events)
    row = only_row(tmp_path)
    assert (row.state, row.job_id, row.steps) == (state, None, 20)
    assert row.last_error == error or (error and row.last_error and row.last_error.startswith(error))
    assert "Traceback" not in runs_text.table([row])


def test_numbers_of_a_run_started_by_hand(tmp_path: Path) -> None:
    """The step is that of the newest start's events and of the record; what was done before it is cut away."""
    (tmp_path / "config.yaml").write_text("train:\n  steps: 300\n")
    checkpoint = {"event": "checkpoint", "step": 200}
    write_events(tmp_path, START, checkpoint, {**START, "step": 100, "world_size": 2}, {"event": "resume", "step": 100})
    row = only_row(tmp_path)
    assert (row.step, row.steps, row.nodes, row.ranks, row.restarts, row.requeues) == (100, 300, None, 2, 1, 0)
    assert runs_text.table([row]).splitlines()[1].split()[:5] == [tmp_path.name, "unknown", "-", "2", "100/300"]
    write_events(tmp_path, {"event": "checkpoint", "step": 150})
    assert only_row(tmp_path).step == 150
    write_record(tmp_path, {"step": 160, "loss": 1.0})
    assert only_row(tmp_path).step == 160
    write_events(tmp_path, {"event": "finished", "steps": 170})
    assert only_row(tmp_path).step == 170


def test_a_lock_that_is_held_is_a_run_at_work(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run_lock(run):
        write_events(tmp_path, START)
        assert only_row(tmp_path).state == "running" and module.is_held(run) is True
    assert only_row(tmp_path).state == "unknown" and module.is_held(run) is False


def test_the_test_of_a_lock_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a run afterwards, nor another such test at the same time; and it cannot always be made."""
    run = RunDirectory(tmp_path)
    assert module.is_held(run) is False and not (tmp_path / ".lock").exists()
    with run_lock(run):
        pass
    with (tmp_path / ".lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert module.is_held(run) is False
    with run_lock(run):
        pass

    def refuse(*arguments: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_events(tmp_path, START)
    row = only_row(tmp_path)
    assert row.state == "unknown" and "its lock cannot be tested" in (row.last_error or "")


@pytest.mark.parametrize(
    ("state", "answer", "shown", "error"),
    [
        ("running", "7 RUNNING None", "running", None),
        ("pending", "7 CONFIGURING None", "pending", None),
        ("running", "7 COMPLETING None", "running", None),
        ("running", "70 RUNNING None", "vanished", "killed without a record: Slurm no longer knows job 7"),
        ("pending", "", "vanished", "killed without a record: Slurm no longer knows job 7"),
        ("running", "7 TIMEOUT TimeLimit", "vanished", "Slurm has ended job 7 (TIMEOUT, TimeLimit)"),
        ("running", "7 CANCELLED None", "vanished", "Slurm has ended job 7 (CANCELLED)"),
        ("requeued", "7 PENDING Resources", "queued (Resources)", "the reason"),
        ("preempted", "7 PENDING BeginTime", "queued (BeginTime)", None),
        ("preempted", "7 PENDING launch failed requeued held", "queued (launch failed requeued held)", None),
        ("preempted", "7 REQUEUE_HOLD", "queued", None),
        ("preempted", "7 COMPLETING None", "preempted", None),
        ("requeued", "7 RUNNING None", "requeued", "the reason"),
        ("preempted", "", "vanished", "preempted, but not in the queue: Slurm no longer knows job 7"),
        ("preempted", "7 CANCELLED None", "cancelled", "preempted, but not in the queue: Slurm has ended job 7"),
        ("requeued", "7 CANCELLED None", "cancelled", "requeued, but not in the queue: Slurm has ended job 7"),
        ("running", "7 PENDING BeginTime", "queued (BeginTime)", "Slurm itself has queued the job again"),
        ("running", "7 SUSPENDED None", "suspended", None),
        ("done", "", "done", None),
        ("failed", "7 RUNNING None", "failed", "the reason"),
        ("running", "CLUSTER: one\n7 RUNNING None\n\n8 PENDING Priority", "running", None),
    ],
)
def test_slurms_state_of_a_job_wins(
    tmp_path: Path, slurm: Slurm, state: str, answer: str, shown: str, error: str | None
) -> None:
    write_job(tmp_path / "x", state, [attempt(1, None)], reason="the reason")
    slurm(f"print({answer!r})")
    row = only_row(tmp_path)
    assert f"{row.state} ({row.waits_for})".removesuffix(" (None)") == shown
    assert row.last_error is None if error is None else error in (row.last_error or "")
    assert f"  {shown}  " in runs_text.table([row])


def test_slurm_is_asked_once_and_for_everything(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, commands: Path
) -> None:
    calls = slurm("print('7 RUNNING None')")
    write_job(tmp_path / "over", "done")
    write_events(tmp_path / "hand", START)
    module.list_runs([tmp_path], NOW)
    assert not calls.exists()  # there is nothing to ask
    for name in ("one", "two", "three"):
        write_job(tmp_path / name, "running")
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SQUEUE_FORMAT", "%j")
    monkeypatch.setenv("SLURM_CONF", "elsewhere")
    runs, _ = module.list_runs([tmp_path], NOW)
    assert sorted(run.state for run in runs) == ["done", "running", "running", "running", "unknown"]
    (call,) = calls.read_text().splitlines()
    arguments, environment = json.loads(call)
    assert {"--me", "--noheader", "--all", "--states=all"} < set(arguments)
    assert not any(argument.startswith("--jobs") for argument in arguments)
    assert environment["SLURM_CONF"] == "elsewhere" and not any(name.startswith("SQUEUE_") for name in environment)
    (commands / "squeue").unlink()
    assert module.list_runs([tmp_path], NOW)[1] == []  # no Slurm, no remark


def test_slurm_that_does_not_answer_is_a_remark(tmp_path: Path, slurm: Slurm, tool: Tool) -> None:
    write_job(tmp_path / "x", "running")
    slurm("sys.exit('slurm_load_jobs error: Unable to contact\\n  slurm controller')")
    code, out, err = tool(tmp_path)
    assert code == 0 and "  running  " in out
    assert err == (
        "jobs: states are those of the job files, as Slurm does not answer: squeue --noheader --me --all --states=all "
        "--format=%A %T %r: slurm_load_jobs error: Unable to contact slurm controller\n"
    )
    assert json.loads(tool(tmp_path, "--json")[1])["runs"][0]["state"] == "running"


def test_a_job_that_slurm_does_not_know_has_vanished_unless_something_speaks_against_it(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(tmp_path / "x", "running")
    slurm("")
    assert only_row(tmp_path).state == "vanished"
    with run_lock(RunDirectory(tmp_path / "x")):
        row = only_row(tmp_path)
    at_work = "Slurm no longer knows job 7, and yet a process is at work here"
    assert (row.state, row.last_error) == ("running", at_work)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "getuid", lambda: 4_000_001)
        assert only_row(tmp_path).state == "running", "a job of another user"
    file = tmp_path / "x" / "job.json"
    slurm(f"file = {str(file)!r}\ntext = open(file).read()\nopen(file, 'w').write(text.replace('running', 'done'))")
    row = only_row(tmp_path)
    assert (row.state, row.last_error) == ("done", None), "it has ended while Slurm was asked"


class CountingFile(io.FileIO):
    """A file that counts what is read of it."""

    bytes_read = 0

    def read(self, size: int | None = -1, /) -> Any:
        content = super().read(-1 if size is None else size)
        self.bytes_read += len(content)
        return content


def test_a_huge_record_is_read_at_its_end_only(tmp_path: Path) -> None:
    """Of 50 MB, whose beginning would be named as damaged if it were read."""
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        for _ in range(50):
            file.write(b'not JSON, but of the right "step", "loss" and "validation_loss"\n'.ljust(100) * 10_000)
    values = {"tev_mean": 0.5, "tev_std": 0.25, "validation_loss": 3.0}
    write_record(tmp_path, {"step": 1, **values}, *({"step": step, "loss": 2.0} for step in range(2, 2001)))
    assert path.stat().st_size > 50_000_000
    with CountingFile(path) as counted:
        lines = lines_from_end(counted)
        assert json.loads(next(lines)) == {"step": 2000, "loss": 2.0}
        assert 0 < counted.bytes_read <= 256 * 1024
        assert sum(1 for _ in lines) > 2000 and counted.bytes_read <= 4 * 1024 * 1024
    row = only_row(tmp_path)
    assert (row.step, row.loss, row.tev_mean, row.validation_loss) == (2000, 2.0, 0.5, 3.0)
    # Only tokens_per_second is nowhere: what was looked through for it are lines without its name, unparsed.
    assert row.tokens_per_second is None and row.unreadable == []


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize(
    "content", [b"", b"a", b"\n", b"a\n", b"one\ntwo\n", b"one\n\ntwo\nto", b"\n\n\nlonger line\n"]
)
def test_lines_from_the_end(block: int, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_BLOCK_BYTES", block)
    whole = content[: content.rfind(b"\n") + 1]
    lines = [line.rstrip(b"\n") for line in whole.splitlines(keepends=True)]
    assert list(lines_from_end(io.BytesIO(content))) == lines[::-1]
    for limit in range(len(content)):
        found = list(lines_from_end(io.BytesIO(content), limit))
        assert found == lines[::-1][: len(found)]
        assert limit < 1 or len(b"\n".join(found)) <= limit


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("job.json", b"", "job.json cannot be read ("),
        ("job.json", b"[" * 100_000, "job.json cannot be read ("),
        ("job.json", b'{"excluded": [1]}', "job.json cannot be read (excluded: "),
        ("metrics.jsonl", b'{"step": 9, "loss": 1.5}\n\0\0\0\n', "metrics.jsonl: 1 line(s) are no JSON objects"),
        ("metrics.jsonl", b'{"step": 9, "loss": 1.5}\n7\n[]\n', "metrics.jsonl: 2 line(s) are no JSON objects"),
        ("metrics.jsonl", b'{"step": 9, "loss": 1.5}\n{"loss": ' + b"9" * 400 + b"}\n", "metrics.jsonl: 1 line(s) are"),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read (Is a directory)"),
        ("events.jsonl", b'\xff\n{"event": 5, "time": 6, "step": []}\n', "events.jsonl: 1 line(s) are no JSON objects"),
        ("events.jsonl", None, "events.jsonl cannot be read (Is a directory)"),
        ("config.yaml", b"train: {steps: 9", "config.yaml cannot be read ("),
        ("config.yaml", b"- 1\n", "config.yaml cannot be read ("),
        ("config.yaml", b"model: 1\n", "config.yaml cannot be read ("),
    ],
)
def test_damage_is_named_in_the_row(tmp_path: Path, tool: Tool, name: str, content: Any, fault: str) -> None:
    damaged = tmp_path / "damaged"
    write_events(damaged, START)
    write_record(damaged, {"step": 9, "loss": 1.5})
    (damaged / "config.yaml").write_text("train:\n  steps: 20\n")
    write_job(tmp_path / "well", "done")
    (damaged / name).unlink(missing_ok=True)
    if content is None:
        (damaged / name).mkdir()
    else:
        (damaged / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = tool(tmp_path)
    assert (code, err) == (0, "") and len(out.splitlines()) == 3
    (line,) = [line for line in out.splitlines() if line.startswith("damaged ")]
    assert fault in line
    row = next(run for run in json.loads(tool(tmp_path, "--json")[1])["runs"] if run["name"] == "damaged")
    assert len(row["unreadable"]) == 1 and row["unreadable"][0].startswith(fault)
    # The other files are shown as ever.
    assert row["loss"] == (None if content is None and name == "metrics.jsonl" else 1.5)
    assert row["steps"] == (None if name == "config.yaml" else 20)
    assert tool(tmp_path, "--attempts", "damaged")[0] == 0


def test_odd_values_and_torn_lines_are_no_damage(tmp_path: Path) -> None:
    write_events(tmp_path, {**START, "world_size": "many", "reason": None}, {"event": "stopped"})
    huge = b'{"step": 8, "loss": 1e400, "tev_mean": NaN, "tokens_per_second": true}\n'
    (tmp_path / "metrics.jsonl").write_bytes(huge + b'{"step": 9, "lo')
    row = only_row(tmp_path)
    assert (row.state, row.last_error, row.step, row.loss) == ("failed", "stopped", 8, None)
    assert (row.tev_mean, row.tokens_per_second, row.ranks, row.unreadable) == (None, None, None, [])
    json.dumps(runs_text.as_json([row]), allow_nan=False)


def test_the_newest_start_comes_first_and_no_run_twice(tmp_path: Path, tool: Tool) -> None:
    for name, minutes in (("a", 30), ("b", 10), ("c", 20)):
        write_job(
            tmp_path / "runs" / name,
            "done",
            [attempt(1, "done", started=at(500)), attempt(2, "done", started=at(minutes))],
        )
    write_events(tmp_path / "hand", START)  # started today, which is before NOW
    (tmp_path / "runs" / "data").mkdir()
    (tmp_path / "runs" / "note").write_text("")
    (tmp_path / "runs" / "z").symlink_to("b")
    code, out, err = tool(tmp_path / "runs", tmp_path / "hand", tmp_path / "runs" / "a", tmp_path / "none")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["RUN", "b", "c", "a", "hand"]
    assert err == f"jobs: {tmp_path / 'none'}: No such file or directory\n"


def test_the_default_is_the_folder_of_runs_here(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tool() == (2, "", "jobs: error: no runs found: runs: No such file or directory\n")
    (tmp_path / "runs" / "empty" / "checkpoints").mkdir(parents=True)
    assert tool() == (2, "", "jobs: error: no runs found: runs is no run directory and holds none\n")
    write_job(tmp_path / "runs" / "x", "done")
    assert tool()[1].splitlines()[1].split()[:3] == ["x", "done", "7"]
    monkeypatch.chdir(tmp_path / "runs" / "x")
    assert tool(".")[1].splitlines()[1].split()[:3] == ["x", "done", "7"]


def test_errors_are_cut_to_the_terminal_and_nowhere_else(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "rank 3\n died\x1b[2J: " + "x" * 300 + " the end;"
    write_job(tmp_path / "x", "failed", [attempt(1, "failed", reason)], reason=reason)
    write_job(tmp_path / "y", "done")
    shown = "rank 3 died?[2J: " + "x" * 300 + " the end;"
    assert tool(tmp_path)[1].splitlines()[1].endswith(f"  {shown}")  # into a pipe
    monkeypatch.setenv("COLUMNS", "160")
    head, line, other = tool(tmp_path)[1].splitlines()
    assert len(line) == 160 and line.endswith("xxx...") and line.index("rank 3 died") == head.index("LAST ERROR")
    monkeypatch.setenv("COLUMNS", "80")
    head, line, error, other = tool(tmp_path)[1].splitlines()
    assert head.endswith("AGE") and len(line) == len(head) == len(other)
    assert error.startswith("    rank 3 died") and len(error) == 80 and error.endswith("...")
    assert json.loads(tool(tmp_path, "--json")[1])["runs"][0]["last_error"] == reason
    assert tool(tmp_path, "--attempts", "x")[1].count(shown) == 2


def test_the_attempts_of_a_run(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = ["rank 3 on n2 was killed by SIGKILL", "rank 0 on n1 ended with exit code 1"]
    attempts = [
        attempt(
            1, "failed", "rank 3 on n2 was killed", failures=failures, has_progressed=True, first_step_seconds=41.25
        ),
        attempt(2),
    ]
    write_job(tmp_path / "x", "running", attempts, excluded={"n9": "its GPU 3 has errors"})
    write_job(tmp_path / "y", "done")
    monkeypatch.setattr(jobs.time, "time", lambda: NOW)  # the age is the same in every table
    code, out, err = tool(tmp_path, "--attempts", "x")
    assert (code, err) == (0, "") and tool(tmp_path / "x", "--attempts") == tool("--attempts", tmp_path / "x")
    lines = out.splitlines()
    assert lines[1].startswith("x  ") and lines[3].split("  ")[0] == "ATTEMPT"
    assert lines[4].split() == ["1", at(60), "10", "min", "41.2", "s", "failed", "yes", "16", "n1", "n2"]
    assert [line.strip() for line in lines[5:8]] == ["rank 3 on n2 was killed", *failures]
    assert lines[8].split()[:2] == ["2", at(50)] and lines[8].split()[-5:] == ["-", "no", "16", "n1", "n2"]
    assert lines[9:] == ["", "nodes that are not used any more", "    n9: its GPU 3 has errors"]
    found = json.loads(tool(tmp_path, "--attempts", "x", "--json")[1])
    assert found["name"] == "x" and found["excluded"] == {"n9": "its GPU 3 has errors"}
    first, second = found["attempts"]
    assert first["failures"] == failures and first["duration_seconds"] == 600.0 and first["reason"]
    assert second["end"] is None


def test_the_duration_of_an_attempt_without_an_end(tmp_path: Path) -> None:
    """It runs on as long as its job does; of one that was killed it is not known."""
    write_job(tmp_path, "running", [attempt(1)])
    row = only_row(tmp_path)
    assert runs_text.attempts_as_json(row, NOW)["attempts"][0]["duration_seconds"] == 3600.0
    row.state = "vanished"
    assert runs_text.attempts_as_json(row, NOW)["attempts"][0]["duration_seconds"] is None
    assert runs_text.attempts_as_text(row, NOW).splitlines()[4].split()[2] == "-"


def test_attempts_need_one_run(tmp_path: Path, tool: Tool) -> None:
    for path in ("a/x", "b/x", "b/y"):
        write_job(tmp_path / path, "done")
    folders = (tmp_path / "a", tmp_path / "b")
    for name, mistake in (("x", "x: 2 runs have"), ("none", "none: 0 runs have"), ("", "needs the name of one run")):
        code, out, err = tool(*folders, "--attempts", name)
        assert (code, out) == (2, "") and err.startswith(f"jobs: error: --attempts {mistake}")
        assert all(str(tmp_path / path) in err for path in ("a/x", "b/x", "b/y"))
    write_events(tmp_path / "b" / "hand", START)
    code, out, _ = tool(*folders, "--attempts", "hand")
    assert code == 0 and out.splitlines()[-1].startswith("no attempts are recorded")
    assert json.loads(tool(*folders, "--attempts", "hand", "--json")[1])["attempts"] == []


def test_watching(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until Ctrl-C; every look is a new one."""
    job, waits = write_job(tmp_path / "x", "pending"), []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        job.become("running")
        if len(waits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", sleep)
    code, out, err = tool(tmp_path, "--watch", "2.5", "--json")
    states = [json.loads(line)["runs"][0]["state"] for line in out.splitlines()]
    assert (code, err, states, waits) == (0, "", ["pending", "running"], [2.5, 2.5])
    waits.clear()
    assert "\033" not in tool(tmp_path, "--watch", "1")[1]  # this is no terminal
    waits.clear()
    monkeypatch.setattr(jobs.sys.stdout, "isatty", lambda: True)
    assert tool(tmp_path, "--watch", "1")[1].count("\033[H\033[2JRUN ") == 2


@pytest.mark.parametrize("arguments", [["--watch", "0"], ["--watch", "often"], ["--watch", "nan"], ["--tidy"]])
def test_bad_command_lines(tool: Tool, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool(*arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(("length", "read"), [(500_000, 100), (10, 0)], ids=["head", "true"])
@pytest.mark.parametrize("more", [[], ["--json"], ["--watch", "0.01"]], ids=str)
def test_a_closed_pipe_ends_the_tool_well(tmp_path: Path, more: list[str], length: int, read: int) -> None:
    """The tool ends without a traceback, and well, also where all it prints still fits into its buffer."""
    write_job(tmp_path / "x", "failed", reason="x" * length)
    command = [sys.executable, str(ROOT / "tools" / "jobs.py"), str(tmp_path), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        with contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            assert len(process.stdout.read(read)) == read
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait(60) == 0


def test_no_torch_is_loaded() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mlra_scale.cluster.runs"
    code += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "False\n"
