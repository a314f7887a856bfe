"""The run directory: everything a run leaves behind.

config.yaml      the resolved configuration
started_from     where a run that began with weights of another one found them
metrics.jsonl    the record: one object per step at which something was measured
rolled_back.jsonl  what the record held of steps that the guard has undone
guard.json       the guard's rollbacks: which data are not read again
events.jsonl     start, resume, checkpoints, stops, end
.lock            held by the run that is at work here
.job.lock        held by the cluster job that is
job.json         of a cluster job: its state, its attempts and their ends
logs/            of a cluster job: console.log, and per attempt a log and stacks of every rank
wandb/           wandb's files and the run's stable id
profile/         traces of torch.profiler
report/          what tools/report.py writes
checkpoints/     step-00000100/ ..., and `latest`, which names the newest complete one
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.config.json_text import read_bytes
from mlra_scale.files import lock, write_atomically

_MAX_PATH_BYTES = 65536
_TRACES_OF_A_RUN = ("config.yaml", "metrics.jsonl", "events.jsonl")


class WaitStopped(Exception):
    """A signal asked for a stop while another run held the directory."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run.

    Attributes:
        path: The directory; it need not exist yet.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the newest start."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The record."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.path / "events.jsonl"

    @property
    def rolled_back(self) -> Path:
        """Lines of the record that the guard has undone."""
        return self.path / "rolled_back.jsonl"

    @property
    def guard(self) -> Path:
        """The guard's rollbacks."""
        return self.path / "guard.json"

    @property
    def job(self) -> Path:
        """The state of a cluster job."""
        return self.path / "job.json"

    @property
    def logs(self) -> Path:
        """Logs of a cluster job."""
        return self.path / "logs"

    @property
    def wandb(self) -> Path:
        """wandb's files."""
        return self.path / "wandb"

    @property
    def profile(self) -> Path:
        """Traces."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """All checkpoints and the `latest` pointer."""
        return self.path / "checkpoints"

    def holds_a_run(self) -> bool:
        """Returns whether a run has been started here; an empty checkpoints folder, or a link to one, is no run."""
        has_checkpoints = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        return has_checkpoints or any((self.path / name).exists() for name in _TRACES_OF_A_RUN)

    def is_own(self, checkpoint: Path) -> bool:
        """Returns whether a checkpoint is one of this run, and not of another one that it began from."""
        return checkpoint.parent.resolve() == self.checkpoints.resolve()

    def source(self) -> Path | None:
        """Returns the checkpoint of another run that this one began from, or None.

        Raises:
            ValueError: The file that says so is damaged.
        """
        file = self.path / "started_from"
        if not file.is_file():
            return None
        try:
            text = read_bytes(file, _MAX_PATH_BYTES).decode("utf-8").rstrip("\n")
        except UnicodeDecodeError:
            text = ""
        if not text or "\0" in text or "\n" in text:
            raise ValueError(f"{file} names no checkpoint; write the path of the one that the run began from into it")
        return Path(text)

    def create(self, config: Config, checkpoint: Path | None = None) -> None:
        """Makes the directory and writes the resolved configuration into it.

        Args:
            config: The configuration of this start.
            checkpoint: What it goes on from; that of another run is noted.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            # Of a run that was here before and has been removed all but for this.
            (self.path / "started_from").unlink(missing_ok=True)
        elif not self.is_own(checkpoint):
            write_atomically(self.path / "started_from", f"{checkpoint.resolve()}\n")
        write_atomically(self.config, config.to_yaml())


@contextlib.contextmanager
def held(
    run: RunDirectory, seconds: float = 2.0, name: str = ".lock", is_stop_asked: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Makes the directory and keeps every other run out of it until the end of the block or of the process.

    Args:
        run: The run directory.
        seconds: How long to wait for another one, which may just be ending: killed, it is there for a moment more, and
            of a node that was lost a network file system keeps the lock for a minute or two.
        name: Of the file that is locked.
        is_stop_asked: Whether a signal has asked for a stop, which ends the wait.

    Raises:
        ConfigError: Another run holds it, or nothing can be written there.
        WaitStopped: Another run holds it, and a stop was asked for.
    """
    with contextlib.ExitStack() as stack:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run.path / name).open("a+", encoding="ascii"))
        except OSError as error:
            raise ConfigError([_unwritable(run, run.path / name, error)]) from error
        try:
            refusal = lock(file.fileno(), seconds, should_stop=is_stop_asked)
        except BlockingIOError:
            file.seek(0)
            fault = f"another run is at work here ({file.read().strip()})"
            if is_stop_asked():
                raise WaitStopped(f"{run.path}: {fault}") from None
            remedy = f"{fault}; wait for it, or name another directory"
            raise ConfigError([Problem("--run-dir", str(run.path), remedy)]) from None
        if refusal is not None:
            # Some cluster file systems are mounted without locks; that is no reason not to train.
            print(f"{run.path} cannot be locked ({refusal}): see that no other run uses it", flush=True)
        # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
        note = f"process {os.getpid()} on {socket.gethostname()}\n"
        try:
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), note.encode("ascii"))
        except OSError as error:
            raise ConfigError([_unwritable(run, run.path / name, error)]) from error
        yield


def _unwritable(run: RunDirectory, file: Path, error: OSError) -> Problem:
    place = error.filename or file
    remedy = f"{place} cannot be written ({error.strerror}); make room there, or name another directory"
    return Problem("--run-dir", str(run.path), remedy)
