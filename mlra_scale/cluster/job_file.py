"""job.json in the run directory: what the job is doing, what became of its attempts, and why."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mlra_scale.config.json_text import read_json_object
from mlra_scale.files import write_atomically

VERSION = 2
_BLOCK_BYTES = 4096

JobState = Literal["pending", "running", "preempted", "requeued", "cancelled", "failed", "done"]


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Attempt:
    """One start of all ranks.

    Attributes:
        number: Counted from 1 over the whole life of the run directory.
        job_id: The Slurm job.
        nodes: Names, in order of their ranks.
        num_ranks: Over all nodes.
        started: Time.
        ended: Time; None: it runs, or the job was killed with it.
        end: Of which kind (policy.EndKind).
        reason: How it ended, in words.
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


@dataclass
class JobFile:
    """The content of job.json.

    Attributes:
        path: The file.
        job_id: The Slurm job that is or was at work here last.
        name: Its name.
        command: Arguments of the training.
        state: pending: it has nodes, and checks them and starts the ranks; running: they train; preempted or requeued:
            it has gone back to the queue, after a signal or a failure; cancelled: Slurm has ended it, by scancel or at
            its time limit; failed, done: it has ended.
        reason: Why it is in this state.
        updated: When the file was written.
        steps: train.steps.
        num_requeues: How often Slurm has started the job again.
        console: The merged output of all ranks.
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
    attempts: list[Attempt] = field(default_factory=list)
    version: int = VERSION

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """Reads the file of a run directory; a missing one is a job without attempts.

        Raises:
            ValueError: It is not one of ours.
        """
        if not path.exists():
            return cls(path)
        try:
            values: dict[str, Any] = read_json_object(path)
            # The first version had no such key; nothing else has changed.
            if (version := values.pop("version", 1)) not in range(1, VERSION + 1):
                raise ValueError(f"its version is {version!r}, this program reads 1 to {VERSION}")
            attempts = [Attempt(**attempt) for attempt in values.pop("attempts")]
            return cls(path=path, attempts=attempts, **values)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no job file of this program ({error}); move it away") from error

    def write(self) -> None:
        """Replaces the file at once; where the disk has no room for another one, it is written over in its place.

        It has blanks at its end for this, so that a job that ends because of a full disk can still say so. A file
        that cannot be written at all does not end a job.
        """
        self.updated = now()
        values = {key: value for key, value in asdict(self).items() if key != "path"}
        text = json.dumps(values, indent=1)
        blanks = _BLOCK_BYTES + -len(text) % _BLOCK_BYTES - 1
        try:
            write_atomically(self.path, f"{text}{' ' * blanks}\n")
        except OSError as error:
            fault = error.strerror
            with contextlib.suppress(OSError):
                fault = "" if self._write_over(text) else fault
            if fault:
                with contextlib.suppress(OSError):
                    print(f"{self.path} cannot be written: {fault}", file=sys.stderr, flush=True)

    def _write_over(self, text: str) -> bool:
        """Writes into the file as it is; returns False where it is too small."""
        file = os.open(self.path, os.O_WRONLY)
        try:
            size = os.fstat(file).st_size
            data = text.encode("ascii").ljust(size - 1) + b"\n"
            # In one call: who reads it meanwhile sees the old content or the new one.
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
        """(kind, has_progressed) of the attempts of this job that have ended, for the policy.

        One that was killed together with its job has no end: it failed, as far as anybody knows.
        """
        return [(attempt.end or "failed", attempt.has_progressed) for attempt in self.attempts[self.first_counted :]]
