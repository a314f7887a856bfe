"""job.json in the run directory: the state of the job, how its attempts ended, and why; and what the run recorded."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from mlra_scale.cluster.messages import first_error
from mlra_scale.config import ConfigError, Problem
from mlra_scale.config.json_text import read_json_object
from mlra_scale.files import write_atomically
from mlra_scale.training.record import read_record
from mlra_scale.training.run_directory import RunDirectory

VERSION = 2
_BLOCK_BYTES = 4096

JobState = Literal["pending", "running", "preempted", "requeued", "cancelled", "failed", "done"]


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(config=ConfigDict(extra="forbid"))
class JobAttempt:
    """One start of all ranks.

    Attributes:
        number: Counted from 1 over the whole life of the run directory.
        job_id: The Slurm job.
        nodes: Names, in order of their ranks.
        num_ranks: Over all nodes.
        started, ended: Times; `ended` None: it runs, or the job was killed with it.
        end, reason: How it ended: the kind (policy.EndKind), and in words.
        has_progressed: Whether a checkpoint was completed in it.
        failures: What single ranks ended with, the first one first.
        first_step_seconds: From its start until a rank began its first step.
    """

    number: int
    job_id: str
    nodes: list[str]
    num_ranks: int
    started: str = field(default_factory=now)
    ended: str | None = None
    end: str | None = None
    reason: str | None = None
    has_progressed: bool = False
    failures: list[str] = field(default_factory=list)
    first_step_seconds: float | None = None


@dataclass(config=ConfigDict(extra="forbid"))
class JobFile:
    """The content of job.json.

    Attributes:
        path: The file.
        job_id, name: The Slurm job that is or was last at work here.
        command: Arguments of the training.
        state, reason: pending: it has nodes, and checks them and starts the ranks; running: they train; preempted or
            requeued: it is back in the queue, after a signal or a failure; cancelled: Slurm has ended it, by scancel or
            at its time limit; failed, done: it has ended.
        updated: When the file was written.
        steps: train.steps.
        num_requeues: How often Slurm has started the job again.
        console: Path of the merged output of all ranks.
        excluded: Nodes that are not used any more, with the reason.
        first_counted: How many of the attempts belong to earlier jobs: their failures do not count any more.
        attempts: All of them, the newest last.
        version: Of the format.
    """

    path: Path
    job_id: str = ""
    name: str = ""
    command: list[str] = field(default_factory=list)
    state: JobState = "pending"
    reason: str = ""
    updated: str = ""
    steps: int = 0
    num_requeues: int = 0
    console: str = ""
    excluded: dict[str, str] = field(default_factory=dict)
    first_counted: int = 0
    attempts: list[JobAttempt] = field(default_factory=list)
    version: int = VERSION

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """Reads the file; a missing one is a job without attempts. A ValueError says that it is not one of ours."""
        if not path.exists():
            return cls(path)
        try:
            values: dict[str, Any] = read_json_object(path)
            # Version 1 had no such key, and is otherwise the same.
            if (version := values.pop("version", 1)) not in range(1, VERSION + 1):
                raise ValueError(f"its version is {version!r}, this program reads 1 to {VERSION}")
            return cls(path=path, attempts=values.pop("attempts", None), **values)
        except (TypeError, ValueError) as error:
            fault = first_error(error) if isinstance(error, ValidationError) else str(error)
            raise ValueError(f"{path} is no job file of this program ({fault}); move it away") from error

    def write(self) -> None:
        """Replaces the file atomically; where the disk has no room for a second file, it is overwritten in its place.

        It has blanks at its end for this, so that a job that ends because of a full disk can still write the reason. A
        file that cannot be written at all does not end a job.
        """
        self.updated = now()
        text = json.dumps({key: value for key, value in asdict(self).items() if key != "path"}, indent=1)
        blanks = _BLOCK_BYTES + -len(text) % _BLOCK_BYTES - 1
        try:
            write_atomically(self.path, f"{text}{' ' * blanks}\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                if self._overwrite(text):
                    return
            with contextlib.suppress(OSError):
                print(f"{self.path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def _overwrite(self, text: str) -> bool:
        """Writes into the file as it is; returns False where it is too small."""
        file = os.open(self.path, os.O_WRONLY)
        try:
            size = os.fstat(file).st_size
            data = text.encode("ascii").ljust(size - 1) + b"\n"
            # In one call: a reader sees the old content or the new one.
            if len(data) == size and os.pwrite(file, data, 0) == size:
                os.fsync(file)
                return True
        finally:
            os.close(file)
        return False

    def become(self, state: JobState, reason: str = "") -> None:
        """Changes the state and writes the file."""
        self.state, self.reason = state, reason
        self.write()

    @property
    def ends(self) -> list[tuple[str, bool]]:
        """(kind, has_progressed) of the attempts of this job; one that was killed with its job counts as failed."""
        return [(attempt.end or "failed", attempt.has_progressed) for attempt in self.attempts[self.first_counted :]]


def read_job_file(run: RunDirectory) -> JobFile:
    """Reads job.json of a run directory; a ConfigError says that it cannot be read or is not one of ours."""
    try:
        return JobFile.read(run.job)
    except OSError as error:
        raise ConfigError([Problem("--run-dir", str(run.job), f"cannot be read ({error.strerror})")]) from error
    except ValueError as error:
        raise ConfigError([Problem("--run-dir", str(run.path), str(error))]) from error


def events_of(run: RunDirectory) -> list[dict[str, Any]]:
    """Returns the events that a run has recorded, in their order; none where they cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return [
            event
            for event in read_record(run.events)
            if isinstance(event.get("event"), str) and isinstance(event.get("time"), str)
        ]
    return []


def num_checkpoints(events: Iterable[Mapping[str, Any]], since: str = "") -> int:
    """Returns how many of some events are checkpoints since a time; that of step 0 does not count."""
    steps = [event.get("step") for event in events if event["event"] == "checkpoint" and event["time"] >= since]
    return sum(isinstance(step, int) and step > 0 for step in steps)


def reason_of(run: RunDirectory, kind: str, attempt: JobAttempt, events: Iterable[Mapping[str, Any]]) -> str | None:
    """Returns what the run recorded of its end in an attempt, or wrote to the log of rank 0 before it could record.

    Args:
        run: The run.
        kind: How the attempt has ended.
        attempt: The attempt.
        events: Those that were recorded in the attempt. Their times do not tell: clocks may differ or be moved.
    """
    if kind == "bad_input":
        with contextlib.suppress(OSError):
            log = run.attempt_logs(attempt.number) / "rank-00000.log"
            if message := " ".join(log.read_text(errors="replace").partition("bad input")[2].split()):
                return message[:2000]
    if kind not in ("bad_input", "non_finite", "unstable", "failed"):
        return None
    stops = [event for event in events if event["event"] == "stopped"]
    return stops[-1].get("reason") if stops else None
