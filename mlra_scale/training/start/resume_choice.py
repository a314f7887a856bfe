"""Which checkpoint a start resumes from: the one that was named or, for `--resume auto`, the first good one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.contents import STATE
from mlra_scale.checkpoint.retention import checkpoint_folders, complete_checkpoints, latest
from mlra_scale.config import ConfigError, Problem
from mlra_scale.training.resume import History
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.resumed_data import DataHistory


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that takes precedence but cannot be used.

    Attributes:
        path: Its folder, or the file that should name it.
        reason: What is wrong with it.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class ResumeChoice:
    """The checkpoint of a start.

    Attributes:
        checkpoint: Its folder; None for a start at step 0.
        rejected: Checkpoints that were passed over.
    """

    checkpoint: Path | None
    rejected: tuple[Rejected, ...] = ()


def choose_checkpoint(run: RunDirectory, resume: str, excluded: Mapping[Path, str] | None = None) -> ResumeChoice:
    """Finds the checkpoint to resume from, without writing; checksums of weights are not compared here.

    Args:
        run: The run directory.
        resume: `none`; `auto` (the checkpoint that `latest` names, or the newest good one where that is bad, or a fresh
            start where there is none); or the path of a checkpoint, of a checkpoints folder or of a run directory. The
            path from which the run in the directory began means `auto`, since a queue repeats the same command.
        excluded: Checkpoints that were found to be bad, with the reason.

    Raises:
        ConfigError: The run directory cannot be used, or there are checkpoints and none of them is good.
    """
    if run.path.exists() and not run.path.is_dir():
        raise _refused(run, "is a file; name a directory")
    if not os.access(_nearest_existing(run.path), os.W_OK | os.X_OK):
        raise _refused(run, "cannot be written; name another directory")
    if resume == "auto":
        return _newest_good(run, excluded or {})
    if resume != "none":
        return _named(run, resume, excluded or {})
    if run.holds_a_run():
        raise _refused(run, "holds another run; continue it with --resume auto, or name another directory")
    return ResumeChoice(None)


def _newest_good(run: RunDirectory, excluded: Mapping[Path, str]) -> ResumeChoice:
    rejected = []
    pointer = latest(run.checkpoints)
    if pointer is None and checkpoint_folders(run.checkpoints):
        rejected.append(Rejected(run.checkpoints / "latest", "is missing"))
    for path in _in_order(run.checkpoints, pointer):
        reason = _fault(path, excluded)
        if reason is None:
            return ResumeChoice(path, tuple(rejected))
        rejected.append(Rejected(path, reason))
    if rejected:
        reasons = "; ".join(f"{item.path.name}: {item.reason}" for item in rejected)
        remedy = f"the run has checkpoints, and none of them can be used ({reasons}); mend or move {run.checkpoints}"
        raise ConfigError([Problem("--resume", "auto", remedy + " if the run is to begin anew")])
    origin = _origin(run)
    # Stopped before its first checkpoint, a run that began with weights of another one begins with them again.
    if origin is not None and (reason := _fault(origin, excluded)) is not None:
        remedy = f"the run began from {origin}, which is no longer good: {reason}"
        raise ConfigError([Problem("--resume", "auto", remedy)])
    return ResumeChoice(origin)


def _in_order(checkpoints: Path, pointer: Path | None) -> list[Path]:
    """Returns the candidates of `--resume auto`: what `latest` names, the earlier ones, then the later ones.

    Later ones are those of an abandoned branch, and one whose save was cut off before `latest` moved. Without a pointer
    complete checkpoints come first, the last one saved before the others; the incomplete ones only give their reasons.
    """
    folders = checkpoint_folders(checkpoints)[::-1]
    if pointer is None:
        complete = complete_checkpoints(checkpoints)[::-1]
        return complete + [path for path in folders if path not in complete]
    others = [path for path in folders if path != pointer]
    return [pointer, *sorted(others, key=lambda path: path.name > pointer.name)]


def _named(run: RunDirectory, resume: str, excluded: Mapping[Path, str]) -> ResumeChoice:
    given = Path(resume).resolve()
    if _began_from(run, given):
        return _newest_good(run, excluded)
    candidates = [path for path in (given, latest(given), latest(given / "checkpoints")) if path is not None]
    path = next((path for path in candidates if (path / "manifest.json").is_file()), None)
    path = path or next((path for path in candidates if path.name.startswith("step-")), None)
    if path is None:
        remedy = "is no checkpoint, and no run directory with one; give auto, none or a path"
        raise ConfigError([Problem("--resume", resume, remedy)])
    if (reason := _fault(path, excluded)) is not None:
        raise ConfigError([Problem("--resume", resume, reason)])
    if run.holds_a_run() and not run.is_own(path):
        fault = f"holds a run, and {path} is none of its checkpoints; name a new directory for the branch, or continue "
        raise _refused(run, fault + "the run that is here with --resume auto")
    return ResumeChoice(path)


def _began_from(run: RunDirectory, given: Path) -> bool:
    """Returns whether the run in the directory is a branch that was begun by naming this path."""
    origin = _origin(run)
    if origin is None or not run.holds_a_run():
        return False
    return given in (origin, origin.parent) or (given / "checkpoints").resolve() == origin.parent


def _origin(run: RunDirectory) -> Path | None:
    try:
        return run.origin()
    except ValueError as error:
        raise _refused(run, str(error)) from None


def _refused(run: RunDirectory, remedy: str) -> ConfigError:
    return ConfigError([Problem("--run-dir", str(run.path), remedy)])


def _fault(path: Path, excluded: Mapping[Path, str]) -> str | None:
    """Returns what is wrong with a checkpoint, according to its manifest, file sizes and small files."""
    if path in excluded:
        return excluded[path]
    try:
        store = Store.open(path)
        if store.kind == "training":
            read_progress(store)
    except CheckpointError as error:
        return str(error)
    return None


def read_progress(store: Store) -> tuple[Progress, DataHistory, History]:
    """Returns the counters, the data and the changes of the run that a checkpoint belongs to.

    Raises:
        CheckpointError: They are missing or garbled, or the state cannot be loaded into an engine.
    """
    try:
        for name in ("optimizer_step", "num_skipped"):
            if type(number := store.state["engine"][name]) is not int or number < 0:
                raise ValueError(f"engine has {name} {number!r}")
        if not isinstance(store.state["windows"], dict):
            raise ValueError(f"windows is {store.state['windows']!r}")
        progress = Progress(**store.state["progress"])
        return progress, DataHistory.from_dict(store.state["data"]), History.of(store.state, progress.step)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{store.folder / STATE} is not sound ({reason}); use another checkpoint") from error


def _nearest_existing(path: Path) -> Path:
    """Returns the path itself or the closest of its parents that exists."""
    return next(candidate for candidate in (path, *path.resolve().parents) if candidate.exists())
