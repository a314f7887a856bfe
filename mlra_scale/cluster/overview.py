"""A table of training runs: what each one is doing, how far it has come, and what went wrong last.

All of it comes from the run directories, and from one question to Slurm where there is one: a job that was killed
together with its node cannot say so in its job.json. What cannot be read is told in the row of its run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mlra_scale.cluster.job_file import JobFile
from mlra_scale.cluster.slurm import SlurmError, jobs_of_user
from mlra_scale.config import stored_yaml
from mlra_scale.files import lock
from mlra_scale.training.record import lines_from_end
from mlra_scale.training.run_directory import RunDirectory

_CURVES = ("loss", "validation_loss", "tev_mean", "tev_std", "tokens_per_second")
_UNFINISHED = ("pending", "running", "preempted", "requeued")
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
"""Slurm's states of a job in the queue, and of one that has ended (kept for MinJobAge, some minutes)."""

_JOB_FILE = TypeAdapter(JobFile)
T = TypeVar("T")


@dataclass
class Run:
    """One row.

    Attributes:
        path: The run directory.
        name: Its last part.
        state: As in job.json; or queued: it waits in Slurm's queue; suspended; vanished: its job is gone and said
            nothing. Of a run without a job: running, done, failed, preempted, interrupted (Ctrl-C) or unknown.
        waits_for: Slurm's reason, of a job that is queued.
        job_id: The Slurm job; None: started by hand.
        nodes: Of the newest attempt.
        ranks: Of the newest start, over all nodes.
        step: The last one that is recorded.
        steps: train.steps.
        loss: The last recorded one, as the next ones are.
        validation_loss: Likewise.
        tev_mean: Likewise.
        tev_std: Likewise.
        tokens_per_second: Likewise.
        restarts: Starts after the first one.
        requeues: How often Slurm has started the job again.
        started: When the newest attempt began.
        last_sign: When something was last written.
        age_seconds: Since then.
        last_error: Why the run, or the last attempt that ended badly, did.
        unreadable: Which of its files cannot be read, and why.
        job: The content of job.json.
    """

    path: str
    name: str
    state: str = "unknown"
    waits_for: str | None = None
    job_id: str | None = None
    nodes: int | None = None
    ranks: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tev_mean: float | None = None
    tev_std: float | None = None
    tokens_per_second: float | None = None
    restarts: int = 0
    requeues: int = 0
    started: str | None = None
    last_sign: str | None = None
    age_seconds: float | None = None
    last_error: str | None = None
    unreadable: list[str] = field(default_factory=list)
    job: JobFile | None = None

    @property
    def trouble(self) -> str:
        """Everything that there is to complain of, in one line."""
        return one_line("; ".join(filter(None, [*self.unreadable, self.last_error])))


def overview(folders: Sequence[Path], now: float) -> tuple[list[Run], list[str]]:
    """Looks at all runs, and asks Slurm once about their jobs.

    Args:
        folders: Run directories, or folders that hold some.
        now: The time, in seconds since the epoch.

    Returns:
        The runs, the newest start first, and what else there is to say.
    """
    notes: list[str] = []
    paths: dict[Path, Path] = {}
    for folder in folders:
        try:
            found = run_directories(folder)
        except OSError as error:
            notes.append(f"{folder}: {error.strerror}")
            continue
        if not found:
            notes.append(f"{folder} is no run directory and holds none")
        paths |= {path.resolve(): path for path in reversed(found)}
    runs = [look(path, now) for path in paths.values()]
    if shutil.which("squeue") and any(run.job_id and run.state in _UNFINISHED for run in runs):
        try:
            queue = jobs_of_user()
        except SlurmError as error:
            notes.append(f"states are those of the job files, as Slurm does not answer: {error}")
        else:
            runs = [_corrected(run, queue, now) for run in runs]
    return sorted(runs, key=lambda run: (-(timestamp(run.started or run.last_sign) or 0.0), run.name)), notes


def run_directories(folder: Path) -> list[Path]:
    """Returns the folder itself if it is a run directory, else those of its folders that are.

    Raises:
        OSError: It cannot be listed.
    """
    return [folder] if is_run(folder) else [path for path in sorted(folder.iterdir()) if is_run(path)]


def is_run(path: Path) -> bool:
    """Returns whether a path is a run directory, or hides whether it is: then its row says so."""
    try:
        return path.is_dir() and (RunDirectory(path).holds_a_run() or RunDirectory(path).job.exists())
    except OSError:
        return True


def look(path: Path, now: float) -> Run:
    """Returns the row of a run as its directory has it."""
    directory = RunDirectory(path)
    run = Run(str(path), path.resolve().name)

    def read(file: Path, reader: Callable[[Path], T], otherwise: T) -> T:
        try:
            return reader(file)
        except FileNotFoundError:
            return otherwise
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            run.unreadable.append(f"{file.name} cannot be read ({_why(error)})")
            return otherwise

    run.job = read(directory.job, _read_job, None)
    events: list[dict[str, Any]] = read(directory.events, lambda file: _read_events(file, run.unreadable), [])
    values: dict[str, Any] = read(directory.metrics, lambda file: _last_values(file, run.unreadable), {})
    run.step = _newest_step(values, events)
    for name in _CURVES:
        setattr(run, name, values.get(name))
    if run.job is not None:
        _take_job(run, run.job)
    else:
        _take_events(run, events, directory)
    if run.steps is None:
        run.steps = read(directory.config, _read_steps, None)
    signs = [values.get("written"), *(timestamp(event.get("time")) for event in events[:1])]
    signs += [timestamp(run.job.updated)] if run.job else []
    if known := [sign for sign in signs if sign is not None]:
        run.last_sign = datetime.fromtimestamp(max(known), UTC).isoformat(timespec="seconds")
        run.age_seconds = max(0.0, round(now - max(known), 1))
    return run


def _take_job(run: Run, job: JobFile) -> None:
    run.state, run.job_id, run.steps = job.state, job.job_id, job.steps or None
    run.restarts, run.requeues = max(0, len(job.attempts) - 1), job.num_requeues
    run.started = job.updated
    if job.attempts:
        newest = job.attempts[-1]
        run.nodes, run.ranks, run.started = len(newest.nodes), newest.num_ranks, newest.started
    bad = next((item for item in reversed(job.attempts) if item.end not in (None, "done", "preempted")), None)
    if job.state in ("failed", "requeued") and job.reason:
        run.last_error = job.reason
    elif bad is not None:
        run.last_error = f"attempt {bad.number}: {bad.reason or bad.end}"


def _take_events(run: Run, events: Sequence[dict[str, Any]], directory: RunDirectory) -> None:
    """What the event log of a run without a job tells; the newest event is the first."""
    starts = [event for event in events if event.get("event") == "start"]
    if starts:
        ranks, started = _number(starts[0].get("world_size")), starts[0].get("time")
        run.ranks = None if ranks is None else int(ranks)
        run.started = started if isinstance(started, str) else None
        run.restarts = len(starts) - 1
    errors = [event for event in events if event.get("event") in ("stopped", "failed")]
    if errors:
        run.last_error = str(errors[0].get("reason") or errors[0]["event"])
    last = events[0].get("event") if events else None
    ends = {"finished": "done", "stopped": "failed", "failed": "failed"}
    ends |= {"preempted": "preempted", "interrupted": "interrupted"}
    if last in ends:
        # The lock is not asked: where a new start is just preparing itself, a test of it could get in its way.
        run.state = ends[last]
        return
    is_running = is_held(directory)
    run.state = "running" if is_running else "unknown"
    if is_running is None:
        run.last_error = "whether it is at work cannot be told: its lock cannot be tested"
    elif not is_running:
        run.last_error = "no process is at work here, and no end was recorded"


def is_held(directory: RunDirectory, name: str = ".lock") -> bool | None:
    """Returns whether a process is at work in a run directory; None where locks cannot be tested.

    The test takes a shared lock for a moment where nobody holds one: two of them do not take each other for a run.
    """
    try:
        with (directory.path / name).open("rb") as file:
            refusal = lock(file.fileno(), is_shared=True)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False if refusal is None else None


def _corrected(run: Run, queue: dict[str, tuple[str, str]], now: float) -> Run:
    """Returns the row with the state that Slurm knows better."""
    if run.job_id is None or run.state not in _UNFINISHED:
        return run
    fresh = look(Path(run.path), now)
    if fresh.job != run.job:
        return fresh  # It has gone on since it was first read; Slurm's answer is older than that.
    state, reason = queue.get(run.job_id, ("", ""))
    was, was_at_work = fresh.state, fresh.state in ("pending", "running")
    if state in _WAITING:
        fresh.state, fresh.waits_for = "queued", reason or None
        if was_at_work:
            fresh.last_error = "killed without a word; Slurm itself has queued the job again"
    elif state in ("SUSPENDED", "STOPPED"):
        fresh.state = "suspended"
    elif state in _ENDED or (not state and _is_of_this_user(run)):
        how = ", ".join(word for word in (state, reason) if word not in ("", "None"))
        known = f"Slurm has ended job {run.job_id} ({how})" if state else f"Slurm knows job {run.job_id} no more"
        if was_at_work and is_held(RunDirectory(Path(run.path))):
            fresh.last_error = f"{known}, and yet a process is at work here"
        else:
            # Cancelled in the queue: no process of the job was there to say so.
            fresh.state = "cancelled" if state == "CANCELLED" and not was_at_work else "vanished"
            fresh.last_error = f"{'killed without a word' if was_at_work else f'{was}, but not in the queue'}: {known}"
    return fresh


def _is_of_this_user(run: Run) -> bool:
    """Returns whether the job is one of those that Slurm was asked for."""
    try:
        return RunDirectory(Path(run.path)).job.stat().st_uid == os.getuid()
    except OSError:
        return False


def _read_events(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    """Returns the events, the newest first."""
    with path.open("rb", buffering=0) as file:
        return [event for line in lines_from_end(file) if (event := _object(line, path, faults))]


def _last_values(path: Path, faults: list[str]) -> dict[str, Any]:
    """Returns the last recorded step, the last value of each curve (their cadences differ) and the time of writing."""
    found: dict[str, Any] = {}
    missing = {"step", *_CURVES}
    with path.open("rb", buffering=0) as file:
        for line in lines_from_end(file):
            # Where one of them is rare, most lines need not be parsed.
            if found and not any(f'"{key}"'.encode() in line for key in missing):
                continue
            record = _object(line, path, faults)
            found |= {key: value for key in missing if (value := _number(record.get(key))) is not None}
            missing -= set(found)
            if not missing:
                break
        found["written"] = os.fstat(file.fileno()).st_mtime
    return found


def _object(line: bytes, path: Path, faults: list[str]) -> dict[str, Any]:
    """Returns the object in a line; an empty one, and a note among the faults, if there is none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return values
    fault = f"{path.name} holds a line that is not JSON"
    if fault not in faults:
        faults.append(fault)
    return {}


def _newest_step(values: dict[str, Any], events: Sequence[dict[str, Any]]) -> int | None:
    """Returns the last step of the record, or of the events since the newest start where they are ahead of it."""
    steps = [values.get("step")]
    for event in events:
        steps += [_number(event.get("step")), _number(event.get("steps"))]
        if event.get("event") == "start":
            break
    return max((int(step) for step in steps if step is not None), default=None)


def _read_job(path: Path) -> JobFile | None:
    if not path.exists():
        return None
    # Its reader leaves the types of the fields to chance.
    return _JOB_FILE.validate_python(dataclasses.asdict(JobFile.read(path)))


def _read_steps(path: Path) -> int | None:
    steps = _number(stored_yaml.parse(path.read_text(encoding="utf-8"))["train"]["steps"])
    return None if steps is None else int(steps)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return value if is_number else None


def timestamp(text: Any) -> float | None:
    """Returns a written time in seconds since the epoch."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return one_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    return one_line(str(error.__cause__ or error))[:200] or type(error).__name__


def one_line(text: str) -> str:
    """Returns the text without line breaks, and without what a terminal would obey or cannot show."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
