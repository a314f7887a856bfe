"""The run directory: everything that a run leaves behind.

config.yaml      the resolved configuration
started_from     the checkpoint of another run whose weights this one began with
metrics.jsonl    the record: one object per step at which something was measured
rolled_back.jsonl  lines of the record that rollbacks have undone
guard.json       the guard's rollbacks: which data are skipped
events.jsonl     start, resume, checkpoints, stops, end
.lock            locked by the run at work in this directory
.job.lock        locked by the cluster job at work in this directory
job.json         of a cluster job: its state, its attempts and how they ended
logs/            of a cluster job: console.log, and per attempt a log and stacks of every rank
wandb/           wandb's files and the run's stable id
tensorboard/     event files of TensorBoard
profile/         traces of torch.profiler
report/          what mlra-scale report writes
exported/        the last checkpoint in Hugging Face's format (export.format)
checkpoints/     step-00000100/ ..., and `latest`, which names the newest complete one
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.config.json_text import read_bytes, read_json_object
from mlra_scale.files import lock, write_atomically

_MAX_PATH_BYTES = 65536
_TRACES_OF_A_RUN = ("config.yaml", "metrics.jsonl", "events.jsonl")
_ROLLBACKS_VERSION = 2
"""Version 1 has no key `version`, and is otherwise the same."""
_logger = logging.getLogger(__name__)


class WaitStopped(Exception):
    """A signal requested a stop while another run held the lock of the directory."""


@dataclass(unsafe_hash=True)
class RunDirectory:
    """The paths of one run; the directory at `path` need not exist yet."""

    path: Path

    def __post_init__(self) -> None:
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.rolled_back = self.path / "rolled_back.jsonl"
        self.guard = self.path / "guard.json"
        self.job = self.path / "job.json"
        self.logs = self.path / "logs"
        self.wandb = self.path / "wandb"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.checkpoints = self.path / "checkpoints"
        self.exported = self.path / "exported"

    def attempt_logs(self, number: int) -> Path:
        """Returns the folder for the logs of a cluster job's attempt, counted from 1."""
        return self.logs / f"attempt-{number:03d}"

    def holds_a_run(self) -> bool:
        """Returns whether a run was started here; an empty checkpoints folder, or a link to one, is no run."""
        has_checkpoints = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        return has_checkpoints or any((self.path / name).exists() for name in _TRACES_OF_A_RUN)

    def is_own(self, checkpoint: Path) -> bool:
        """Returns whether a checkpoint belongs to this run, and not to another one that it began from."""
        return checkpoint.parent.resolve() == self.checkpoints.resolve()

    def origin(self) -> Path | None:
        """Returns the checkpoint of another run that this one began from, or None.

        Raises:
            ValueError: The file started_from is damaged.
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
        """Makes the directory with the configuration and, of another run, the checkpoint that this one begins from."""
        self.path.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            (self.path / "started_from").unlink(missing_ok=True)  # of an earlier run of which all else was removed
        elif not self.is_own(checkpoint):
            write_atomically(self.path / "started_from", f"{checkpoint.resolve()}\n")
        write_atomically(self.config, config.to_yaml())

    def write_rollbacks(self, rollbacks: Sequence[Mapping[str, Any]]) -> None:
        """Replaces guard.json, which outlives the checkpoints that its rollbacks lead to."""
        content = {"version": _ROLLBACKS_VERSION, "rollbacks": [*rollbacks]}
        write_atomically(self.guard, json.dumps(content, indent=1) + "\n")

    def read_rollbacks(self) -> tuple[Mapping[str, Any], ...]:
        """Returns the rollbacks in guard.json, the oldest first; none where the file is missing.

        Raises:
            ValueError: The file is not a list of rollbacks.
        """
        if not self.guard.exists():
            return ()
        content = read_json_object(self.guard)
        version, rollbacks = content.get("version", 1), content.get("rollbacks")
        if type(version) is int and version > _ROLLBACKS_VERSION:
            raise ValueError(
                f"{self.guard} has version {version}, this program reads 1 to {_ROLLBACKS_VERSION}; use the one that "
                "wrote it"
            )
        is_sound = type(version) is int and version >= 1 and isinstance(rollbacks, list)
        if not is_sound or not all(isinstance(item, dict) and _is_rollback(item) for item in rollbacks or ()):
            raise ValueError(f"{self.guard} is no record of the guard; move it away to read all data again")
        return tuple(rollbacks or ())


def _is_rollback(item: Mapping[str, Any]) -> bool:
    numbers = [item.get(key) for key in ("step", "to_step", "skipped_from", "skipped_to")]
    return all(type(number) is int and number >= 0 for number in numbers) and isinstance(item.get("reason"), str)


@contextlib.contextmanager
def run_lock(
    run: RunDirectory, seconds: float = 2.0, name: str = ".lock", is_stop_requested: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Makes the directory and locks a file in it against other runs until the end of the block or of the process.

    Args:
        run: The run directory.
        seconds: How long to wait for another holder. A killed process holds its lock a moment longer; a network file
            system keeps the lock of a lost node for a minute or two.
        name: Of the file.
        is_stop_requested: Ends the wait early when it returns True.

    Raises:
        ConfigError: Another run holds the lock, or nothing can be written there.
        WaitStopped: Another run holds the lock, and a stop was requested.
    """
    path = run.path / name
    with contextlib.ExitStack() as stack:
        with _write_errors_as_problems(run, path):
            run.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+", encoding="ascii"))
        try:
            refusal = lock(file.fileno(), seconds, should_stop=is_stop_requested)
        except BlockingIOError:
            file.seek(0)
            fault = f"another run is at work here ({file.read().strip()})"
            if is_stop_requested():
                raise WaitStopped(f"{run.path}: {fault}") from None
            remedy = f"{fault}; wait for it, or name another directory"
            raise ConfigError([Problem("--run-dir", str(run.path), remedy)]) from None
        if refusal is not None:  # some cluster file systems are mounted without locks
            _logger.warning("%s cannot be locked (%s): make sure that no other run uses it", run.path, refusal)
        with _write_errors_as_problems(run, path):
            # Unbuffered: closing the file must not write again what a full disk has refused.
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode("ascii"))
        yield


@contextlib.contextmanager
def _write_errors_as_problems(run: RunDirectory, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = f"{error.filename or path} cannot be written ({error.strerror}); make room there, or name another "
        raise ConfigError([Problem("--run-dir", str(run.path), remedy + "directory")]) from error
