"""The list of training runs: what each one does, how far it is, and what went wrong last.

All of it comes from the run directories, and from one question to Slurm where there is one: a job that was killed
together with its node cannot record that in its job.json. What cannot be read is named in the row of its run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlra_scale.cluster.job_file import JobFile
from mlra_scale.cluster.messages import first_error, printable
from mlra_scale.cluster.slurm import SlurmError, jobs_of_user
from mlra_scale.config import stored_yaml
from mlra_scale.files import lock
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.run_reader import (
    Record,
    is_number,
    last_start_or_end,
    last_values,
    read_lines,
    read_mapping,
    value_at,
)

_CURVES = ("loss", "validation_loss", "tev_mean", "tev_std", "tokens_per_second")
_UNFINISHED = ("pending", "running", "preempted", "requeued")
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
"""Slurm's states of a job in the queue, and of one that has ended (kept for MinJobAge, some minutes)."""


@dataclass
class RunRow:
    """One run of the list; its fields but `job` are the keys of --json.

    Attributes:
        path: The run directory, and `name` its last part.
        state: As in job.json; or queued: it waits in Slurm's queue; suspended; vanished: its job is gone and recorded
            no end. Of a run without a job: running, done, failed, preempted, interrupted (Ctrl-C) or unknown.
        waits_for: Slurm's reason, of a job that is queued.
        job_id: The Slurm job; None: started by hand.
        nodes: Of the newest attempt.
        ranks: Of the newest start, over all nodes.
        step: The last one that is recorded, of `steps` (train.steps); `loss` to `tokens_per_second`: last values.
        restarts: Starts after the first one; `requeues` of them by Slurm.
        started: When the newest attempt began.
        last_sign: When something was last written, `age_seconds` ago.
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


def list_runs(folders: Sequence[Path], now: float) -> tuple[list[RunRow], list[str]]:
    """Reads all runs, and asks Slurm once about their jobs.

    Args:
        folders: Run directories, or folders that hold some.
        now: The time, in seconds since the epoch.

    Returns:
        The runs, the newest start first, and remarks.
    """
    notes: list[str] = []
    paths: dict[Path, Path] = {}
    for folder in folders:
        try:
            found = [folder] if is_run(folder) else [path for path in sorted(folder.iterdir()) if is_run(path)]
        except OSError as error:
            notes.append(f"{folder}: {error.strerror}")
            continue
        if not found:
            notes.append(f"{folder} is no run directory and holds none")
        paths |= {path.resolve(): path for path in reversed(found)}
    runs = [read_run(path, now) for path in paths.values()]
    if shutil.which("squeue") and any(run.job_id and run.state in _UNFINISHED for run in runs):
        try:
            queue = jobs_of_user()
        except SlurmError as error:
            notes.append(f"states are those of the job files, as Slurm does not answer: {error}")
        else:
            runs = [_with_slurms_state(run, queue, now) for run in runs]
    return sorted(runs, key=lambda run: (-(timestamp(run.started or run.last_sign) or 0.0), run.name)), notes


def is_run(path: Path) -> bool:
    """Returns whether a path is a run directory; True where that cannot be found out: its row then names the fault."""
    try:
        return path.is_dir() and (RunDirectory(path).holds_a_run() or RunDirectory(path).job.exists())
    except OSError:
        return True


def read_run(path: Path, now: float) -> RunRow:
    """Returns the row of a run by what its directory holds; `now` is in seconds since the epoch."""
    directory, run = RunDirectory(path), RunRow(str(path), path.resolve().name)
    run.job = _read_job(directory.job, run.unreadable)
    events = read_lines(directory.events, run.unreadable, is_optional=True)
    values = last_values(directory.metrics, ("step", *_CURVES), run.unreadable)
    run.step = _newest_step(values, events)
    for name in _CURVES:
        setattr(run, name, values.get(name))
    if run.job is not None:
        _take_job(run, run.job)
    else:
        _take_events(run, events, directory)
    if run.steps is None and (config := read_mapping(directory.config, run.unreadable, stored_yaml.parse, True)):
        run.steps = _whole(value_at(config, "train.steps"))
        if run.steps is None:
            run.unreadable.append("config.yaml cannot be read (it holds no number train.steps)")
    signs = [timestamp(event.get("time")) for event in events[-1:]]
    signs += [timestamp(run.job.updated)] if run.job else []
    with contextlib.suppress(OSError):
        signs.append(directory.metrics.stat().st_mtime)
    if known := [sign for sign in signs if sign is not None]:
        run.last_sign = datetime.fromtimestamp(max(known), UTC).isoformat(timespec="seconds")
        run.age_seconds = max(0.0, round(now - max(known), 1))
    return run


def _read_job(path: Path, notes: list[str]) -> JobFile | None:
    try:
        return JobFile.read(path) if path.exists() else None
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error
        reason = first_error(cause) if isinstance(cause, ValidationError) else getattr(error, "strerror", None)
        notes.append(f"{path.name} cannot be read ({printable(reason or str(cause))[:200]})")
        return None


def _take_job(run: RunRow, job: JobFile) -> None:
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


def _take_events(run: RunRow, events: Sequence[Record], directory: RunDirectory) -> None:
    """Reads the state of a run without a job from its events."""
    starts = [event for event in events if event.get("event") == "start"]
    if starts:
        started = starts[-1].get("time")
        run.ranks, run.started = _whole(starts[-1].get("world_size")), started if isinstance(started, str) else None
        run.restarts = len(starts) - 1
    errors = [event for event in events if event.get("event") in ("stopped", "failed", "export_failed")]
    if errors:
        run.last_error = str(errors[-1].get("reason") or errors[-1]["event"])
    end = last_start_or_end(events).get("event", "start")
    if end != "start":
        # The lock is not tested: the test could get in the way of a new start that prepares itself.
        run.state = {"finished": "done", "stopped": "failed"}.get(end, end)
        return
    is_running = is_held(directory)
    run.state = "running" if is_running else "unknown"
    if is_running is None:
        run.last_error = "whether it is at work is unknown: its lock cannot be tested"
    elif not is_running:
        run.last_error = "no process is at work here, and no end was recorded"


def is_held(directory: RunDirectory, name: str = ".lock") -> bool | None:
    """Returns whether a process is at work in a run directory; None where locks cannot be tested.

    The test takes a shared lock for a moment: two tests at the same time do not take each other for a run.
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


def _with_slurms_state(run: RunRow, queue: dict[str, tuple[str, str]], now: float) -> RunRow:
    """Returns the row with the state that Slurm knows better."""
    if run.job_id is None or run.state not in _UNFINISHED:
        return run
    fresh = read_run(Path(run.path), now)
    if fresh.job != run.job:
        return fresh  # It has changed since it was first read, and Slurm's answer is older.
    state, reason = queue.get(run.job_id, ("", ""))
    before, was_at_work = fresh.state, fresh.state in ("pending", "running")
    if state in _WAITING:
        fresh.state, fresh.waits_for = "queued", reason or None
        if was_at_work:
            fresh.last_error = "killed without a record; Slurm itself has queued the job again"
    elif state in ("SUSPENDED", "STOPPED"):
        fresh.state = "suspended"
    elif state in _ENDED or (not state and _is_of_this_user(run)):
        how = ", ".join(word for word in (state, reason) if word not in ("", "None"))
        known = f"Slurm has ended job {run.job_id} ({how})" if state else f"Slurm no longer knows job {run.job_id}"
        if was_at_work and is_held(RunDirectory(Path(run.path))):
            fresh.last_error = f"{known}, and yet a process is at work here"
        else:
            # Cancelled in the queue: no process of the job was there to record it.
            fresh.state = "cancelled" if state == "CANCELLED" and not was_at_work else "vanished"
            what = "killed without a record" if was_at_work else f"{before}, but not in the queue"
            fresh.last_error = f"{what}: {known}"
    return fresh


def _is_of_this_user(run: RunRow) -> bool:
    """Returns whether the job is one of those that Slurm was asked for."""
    try:
        return RunDirectory(Path(run.path)).job.stat().st_uid == os.getuid()
    except OSError:
        return False


def _newest_step(values: Record, events: Sequence[Record]) -> int | None:
    """Returns the last step of the record, or of the events since the newest start where they are ahead of it."""
    steps = [values.get("step")]
    for event in reversed(events):
        steps += [event.get("step"), event.get("steps")]
        if event.get("event") == "start":
            break
    return max((int(step) for step in steps if is_number(step)), default=None)


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) else None


def timestamp(text: Any) -> float | None:
    """Returns a written time in seconds since the epoch; None: it is no time."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
