"""The run directory: everything a run leaves behind, and the checks before anything is written.

config.yaml      the resolved configuration
metrics.jsonl    the record: one object per step at which something was measured
events.jsonl     start, resume, checkpoints, stops, end
.lock            held by the run that is at work here
wandb/           wandb's files and the run's stable id
profile/         traces of torch.profiler
checkpoints/     step-00000100/ ..., and `latest`, which names the newest complete one
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.training.record import write_atomically
from mlra_scale.training.resume import changed_fields, is_checkpoint

_TRACES_OF_A_RUN = ("config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints")


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
        """Returns whether a run has been started here."""
        return any((self.path / name).exists() for name in _TRACES_OF_A_RUN)

    def create(self, config: Config) -> None:
        """Makes the directory and writes the resolved configuration into it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, config.to_yaml())


@contextlib.contextmanager
def held(run: RunDirectory) -> Iterator[None]:
    """Makes the directory and keeps every other run out of it until the end of the block or of the process.

    Raises:
        ConfigError: Another run holds it.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / ".lock").open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            remedy = f"another run is at work here ({file.read().strip()}); wait for it, or name another directory"
            raise ConfigError([Problem("--run-dir", str(run.path), remedy)]) from None
        except OSError as error:
            # Some cluster file systems are mounted without locks; that is no reason not to train.
            print(f"{run.path} cannot be locked ({error.strerror}): see that no other run uses it", flush=True)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def checkpoint_name(step: int) -> str:
    """Returns the name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Returns the checkpoint that `latest` names, or None where none was completed.

    Args:
        checkpoints: A run's checkpoints folder.
    """
    pointer = checkpoints / "latest"
    if not pointer.is_file():
        return None
    return checkpoints / pointer.read_text(encoding="utf-8").strip()


def find_checkpoint(run: RunDirectory, resume: str) -> Path | None:
    """Returns the checkpoint to resume from.

    Args:
        run: The run directory.
        resume: `none`, `auto` (the newest of this run, or a fresh start where there is none), or the path of a
            checkpoint, of a checkpoints folder or of a run directory.

    Returns:
        A checkpoint's folder, or None for a fresh start.

    Raises:
        ConfigError: The path leads to no complete checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = latest_checkpoint(run.checkpoints)
        if found is not None and not is_checkpoint(found):
            raise ConfigError(
                [Problem("--resume", "auto", f"{run.checkpoints / 'latest'} names {found.name}, which is not complete")]
            )
        return found
    given = Path(resume).resolve()
    for candidate in (given, latest_checkpoint(given), latest_checkpoint(given / "checkpoints")):
        if candidate is not None and is_checkpoint(candidate):
            return candidate
    raise ConfigError(
        [Problem("--resume", resume, "is no checkpoint, and no run directory with one; give auto, none or a path")]
    )


def check_run_directory(config: Config, run: RunDirectory, resume: str) -> tuple[list[Problem], Path | None]:
    """Finds everything that is wrong with the run directory and with what is to be resumed, without writing.

    Args:
        config: The configuration of this start.
        run: The run directory.
        resume: The value of --resume.

    Returns:
        The problems, and the checkpoint to resume from (None: a fresh start).
    """
    shown = str(run.path)
    if run.path.exists() and not run.path.is_dir():
        return [Problem("--run-dir", shown, "is a file; name a directory")], None
    if not os.access(_nearest_existing(run.path), os.W_OK | os.X_OK):
        return [Problem("--run-dir", shown, "cannot be written; name another directory")], None
    if resume == "none":
        if run.holds_a_run():
            remedy = "holds another run; continue it with --resume auto, or name another directory"
            return [Problem("--run-dir", shown, remedy)], None
        return [], None
    try:
        checkpoint = find_checkpoint(run, resume)
    except ConfigError as error:
        return error.problems, None
    if checkpoint is None:
        # Killed before its first checkpoint: the same run may begin anew here, another one may not.
        return (changed_fields(config, run.config) if run.holds_a_run() else []), None
    if run.holds_a_run() and checkpoint.parent.resolve() != run.checkpoints.resolve():
        remedy = f"holds another run than the one {checkpoint} belongs to; name a new directory for the branch"
        return [Problem("--run-dir", shown, remedy)], None
    return changed_fields(config, checkpoint / "config.yaml"), checkpoint


def _nearest_existing(path: Path) -> Path:
    """Returns the path itself or the closest of its parents that exists."""
    for candidate in (path, *path.resolve().parents):
        if candidate.exists():
            return candidate
    return Path("/")
