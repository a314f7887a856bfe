"""Which checkpoint a start goes on from: the one that was asked for or, for `--resume auto`, the first good one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.retention import checkpoint_folders, complete_checkpoints, latest
from mlra_scale.checkpoint.state_contents import STATE
from mlra_scale.config import ConfigError, Problem
from mlra_scale.training.history import History
from mlra_scale.training.progress import Progress
from mlra_scale.training.resumed_data import DataHistory
from mlra_scale.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that would have come first, and why it did not do.

    Attributes:
        path: Its folder, or the file that should name it.
        reason: What is wrong with it.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Choice:
    """What a start goes on from.

    Attributes:
        checkpoint: A checkpoint's folder; None for a start at step 0.
        rejected: What would have come before it.
    """

    checkpoint: Path | None
    rejected: tuple[Rejected, ...] = ()


def choose(run: RunDirectory, resume: str, excluded: Mapping[Path, str] | None = None) -> Choice:
    """Finds what a start goes on from, without writing; checksums of weights are not compared here.

    Args:
        run: The run directory.
        resume: `none`; `auto` (the checkpoint that `latest` names, or the newest good one where that is bad, or a fresh
            start where there is none); or the path of a checkpoint, of a checkpoints folder or of a run directory. The
            path from which the run in the directory began is like `auto`: a queue starts the same command again.
        excluded: Checkpoints that were found to be bad, with the reason.

    Raises:
        ConfigError: The run directory cannot be used, or there are checkpoints and none of them is good.
    """
    shown = str(run.path)
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError([Problem("--run-dir", shown, "is a file; name a directory")])
    if not os.access(_nearest_existing(run.path), os.W_OK | os.X_OK):
        raise ConfigError([Problem("--run-dir", shown, "cannot be written; name another directory")])
    if resume == "auto":
        return _newest_good(run, excluded or {})
    if resume != "none":
        return _named(run, resume, excluded or {})
    if run.holds_a_run():
        remedy = "holds another run; continue it with --resume auto, or name another directory"
        raise ConfigError([Problem("--run-dir", shown, remedy)])
    return Choice(None)


def _newest_good(run: RunDirectory, excluded: Mapping[Path, str]) -> Choice:
    rejected = []
    pointer = latest(run.checkpoints)
    candidates = _in_order(run.checkpoints, pointer)
    if pointer is None and checkpoint_folders(run.checkpoints):
        rejected.append(Rejected(run.checkpoints / "latest", "is missing"))
    for path in candidates:
        reason = _fault(path, excluded)
        if reason is None:
            return Choice(path, tuple(rejected))
        rejected.append(Rejected(path, reason))
    if rejected:
        reasons = "; ".join(f"{item.path.name}: {item.reason}" for item in rejected)
        remedy = f"the run has checkpoints, and none of them can be used ({reasons}); mend or move {run.checkpoints}"
        raise ConfigError([Problem("--resume", "auto", remedy + " if the run is to begin anew")])
    if (source := _source(run)) is None:
        return Choice(None)
    # Stopped before its first checkpoint: the run began with another one's weights, and does so again.
    if (reason := _fault(source, excluded)) is not None:
        raise ConfigError(
            [Problem("--resume", "auto", f"the run began from {source}, which is no longer good: {reason}")]
        )
    return Choice(source)


def _in_order(checkpoints: Path, pointer: Path | None) -> list[Path]:
    """What `--resume auto` tries: what `latest` names, the ones before it, and only then those after it.

    After it come those of a branch that was given up, and one whose save was cut off before `latest` moved. Without a
    pointer the one that was saved last comes first, and those that are not complete are tried at the end, for the sake
    of their reasons.
    """
    folders = checkpoint_folders(checkpoints)[::-1]
    if pointer is None:
        complete = complete_checkpoints(checkpoints)[::-1]
        return complete + [path for path in folders if path not in complete]
    others = [path for path in folders if path != pointer]
    return [pointer, *sorted(others, key=lambda path: path.name > pointer.name)]


def _named(run: RunDirectory, resume: str, excluded: Mapping[Path, str]) -> Choice:
    given = Path(resume).resolve()
    if _began_from(run, given):
        return _newest_good(run, excluded)
    candidates = [given, latest(given), latest(given / "checkpoints")]
    path = next((path for path in candidates if path is not None and (path / "manifest.json").is_file()), None)
    if path is None:
        path = next(
            (path for path in (given, *candidates[1:]) if path is not None and path.name.startswith("step-")), None
        )
        if path is None:
            remedy = "is no checkpoint, and no run directory with one; give auto, none or a path"
            raise ConfigError([Problem("--resume", resume, remedy)])
    if (reason := _fault(path, excluded)) is not None:
        raise ConfigError([Problem("--resume", resume, reason)])
    if run.holds_a_run() and not run.is_own(path):
        remedy = (
            f"holds a run, and {path} is none of its checkpoints; name a new directory for the branch, or continue "
        )
        raise ConfigError([Problem("--run-dir", str(run.path), remedy + "the run that is here with --resume auto")])
    return Choice(path)


def _began_from(run: RunDirectory, given: Path) -> bool:
    """Returns whether the run in the directory is a branch that was begun by naming this path."""
    source = _source(run)
    if source is None or not run.holds_a_run():
        return False
    return given in (source, source.parent) or (given / "checkpoints").resolve() == source.parent


def _source(run: RunDirectory) -> Path | None:
    try:
        return run.source()
    except ValueError as error:
        raise ConfigError([Problem("--run-dir", str(run.path), str(error))]) from None


def _fault(path: Path, excluded: Mapping[Path, str]) -> str | None:
    """Says what is wrong with a checkpoint, as far as its manifest, sizes and small files tell."""
    if path in excluded:
        return excluded[path]
    try:
        store = Store.open(path)
        if store.kind == "training":
            stored_place(store)
    except CheckpointError as error:
        return str(error)
    return None


def stored_place(store: Store) -> tuple[Progress, DataHistory, History]:
    """Returns how far the run of a checkpoint has come, in steps and in its data, and what it changed on the way.

    Raises:
        CheckpointError: Its state does not say so, or cannot be loaded into an engine.
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
    for candidate in (path, *path.resolve().parents):
        if candidate.exists():
            return candidate
    return Path("/")
