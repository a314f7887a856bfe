"""Which checkpoints of a run there are, which one is the newest, and which ones go."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path

from mlra_scale import files
from mlra_scale.checkpoint import points
from mlra_scale.checkpoint.contents import now
from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import faults_told
from mlra_scale.checkpoint.manifest import Manifest, read_complete_manifest

LATEST = "latest"
UNFINISHED, REMOVED, REPLACED = ".unfinished-", ".removed-", ".replaced-"
"""How the names begin of folders that are being written, deleted, and replaced by a later save of the same step."""


def checkpoint_name(step: int) -> str:
    """Returns the name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """Returns the checkpoint that `latest` names, whether it is there or not; None where there is no such file.

    Args:
        folder: A run's checkpoints.
    """
    try:
        name = (folder / LATEST).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UnicodeDecodeError, OSError):
        return folder / LATEST  # damaged, a folder, or not for this user: no checkpoint
    return folder / Path(name).name


def set_latest(folder: Path, checkpoint: Path) -> None:
    """Makes `latest` name a checkpoint of the folder, at once and for good."""
    files.write_atomically(folder / LATEST, f"{checkpoint.name}\n")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Returns all folders that are or should be checkpoints, by step.

    Where a save was cut off while it replaced an earlier one of the same step, the earlier one is among them.
    """
    replaced = [path for path in folder.glob(f"{REPLACED}step-*") if not _original(path).exists()]
    found = [path for path in [*folder.glob("step-*"), *replaced] if _is_folder(path)]
    return sorted(found, key=lambda path: path.name.removeprefix(REPLACED))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # ESTALE: another client of the file system has just removed it
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, in the order in which they were saved.

    That is not always the order of their steps: a run may have gone on from an earlier one.

    Args:
        folder: A run's checkpoints.
    """
    return [path for path, _ in _complete(folder)]


def newest_complete(folder: Path) -> Path | None:
    """Returns the complete checkpoint that was saved last, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def next_created(folder: Path) -> str:
    """Returns the time for a checkpoint that is completed now: later than that of every other, whatever the clock."""
    newest = max((manifest.created for _, manifest in _complete(folder)), default="")
    current = now()
    if current > newest:
        return current
    return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")


def superfluous(folder: Path, keep_last: int, keep_every: int, pinned: int | None = None) -> list[Path]:
    """Returns the checkpoints that `prune` would remove.

    One that somebody has renamed (step-00000100-best) is neither counted nor removed.

    Args:
        folder: A run's checkpoints.
        keep_last: How many of the newest are kept, at least one. Incomplete ones do not count, and stay.
        keep_every: Those whose step is a multiple of this are kept too; 0: none.
        pinned: The one of this step is kept too: the run may have to go back to it.
    """
    assert keep_last >= 1, keep_last
    found = [(path, manifest) for path, manifest in _complete(folder) if path.name == checkpoint_name(manifest.step)]
    kept = {path for path, _ in found[-keep_last:]} | {latest(folder)}
    kept |= {path for path, manifest in found if manifest.step == pinned}
    if keep_every > 0:
        kept |= {path for path, manifest in found if manifest.step % keep_every == 0}
    return [path for path, _ in found if path not in kept]


def prune(folder: Path, keep_last: int, keep_every: int, pinned: int | None = None) -> list[Path]:
    """Removes checkpoints that need not be kept: see `superfluous`.

    Returns:
        What was removed.

    Raises:
        CheckpointError: Some cannot be removed; the others are.
    """
    removed = superfluous(folder, keep_last, keep_every, pinned)
    _remove(folder, removed)
    return removed


def remove_after(folder: Path, step: int) -> list[Path]:
    """Removes the checkpoints of steps that a run has undone: they would count as its newest ones.

    One that somebody has renamed stays.

    Args:
        folder: A run's checkpoints; `latest` names an earlier one by now.
        step: Where the run has gone back to.

    Returns:
        What was removed.

    Raises:
        CheckpointError: Some cannot be removed; the others are.
    """
    # By name: an incomplete one of those steps is of no more use than the others.
    removed = [path for path in checkpoint_folders(folder) if step_named(path) > step]
    _remove(folder, removed)
    return removed


def step_named(path: Path) -> int:
    """Returns the step of a checkpoint's folder by its name; -1 where somebody has renamed it."""
    number = path.name.removeprefix(REPLACED).removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _remove(folder: Path, paths: list[Path]) -> None:
    faults = []
    for path in paths:
        hidden = path
        try:
            with faults_told("removed", path):
                # Hidden first: what is half removed is no longer called a checkpoint.
                hidden = _hide(path)
                files.sync(folder)
                points.reached("retention")
                _clear_away(hidden)
        except CheckpointError as fault:
            if os.path.lexists(path) or os.path.lexists(hidden):  # otherwise somebody else has removed it
                faults.append(str(fault))
    if faults:
        raise CheckpointError("; ".join(faults))


def put_in_place(unfinished: Path, final: Path) -> None:
    """Gives a complete folder its name; a checkpoint of the same step makes way and is removed afterwards."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if files.put_in_place(unfinished, final, replaced):
        # The new one is complete; what is left of the old one is for the next save to clear away.
        with contextlib.suppress(OSError):
            _clear_away(_hide(replaced))


def tidy(folder: Path) -> None:
    """Clears away what a run that died in the middle of a save has left; no save may be in progress.

    What cannot be cleared away stays, and keeps no save from being made: whether the folder can be written shows then.
    """
    for path in folder.glob(f"{REPLACED}*"):
        if not _original(path).exists():
            with contextlib.suppress(OSError):
                os.rename(path, _original(path))
    for beginning in (UNFINISHED, REMOVED, REPLACED):
        for path in folder.glob(f"{beginning}*"):
            if beginning != REPLACED or _original(path).exists():
                with contextlib.suppress(OSError):
                    _clear_away(path)


def _original(replaced: Path) -> Path:
    return replaced.with_name(replaced.name.removeprefix(REPLACED))


def _hide(path: Path) -> Path:
    """Gives something the name of what is being deleted; what has that name already may be still in use (NFS)."""
    for number in count():
        hidden = path.with_name(f"{REMOVED}{path.name.removeprefix(REPLACED)}{f'-{number}' if number else ''}")
        if not os.path.lexists(hidden):
            break
    os.rename(path, hidden)
    return hidden


def _clear_away(path: Path) -> None:
    """Deletes a hidden file or folder; of a symbolic link, the link alone.

    A file that another process on this machine reads (an export, say) cannot be deleted on NFS: its folder stays, and
    is for the next save to clear away. Likewise what another client of the file system has removed meanwhile.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY, errno.ENOENT, errno.ESTALE):
            raise


def _complete(folder: Path) -> list[tuple[Path, Manifest]]:
    found = []
    for path in checkpoint_folders(folder):
        try:
            found.append((path, read_complete_manifest(path)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda item: (item[1].created, item[1].step))
