"""Which checkpoints a run has, which of them is the newest, and which are removed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path

from mlra_scale import files
from mlra_scale.checkpoint import failpoints
from mlra_scale.checkpoint.files import CheckpointError, system_errors
from mlra_scale.checkpoint.manifest import MANIFEST, Manifest, now, read_complete_manifest

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a run directory."""
LATEST = "latest"
UNFINISHED, REMOVED, REPLACED = ".unfinished-", ".removed-", ".replaced-"
"""Prefixes of folders that are being written, deleted, and replaced by a later save of the same step."""


def checkpoint_name(step: int) -> str:
    """Returns the name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """Returns the checkpoint that `latest` names, whether it exists or not; None where there is no such file.

    A second line is the checksum of the name, which earlier versions have not written.
    """
    try:
        name, *checksum = (folder / LATEST).read_text(encoding="ascii").split()
        if checksum and checksum != [_checksum(name)]:
            return folder / LATEST
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError):
        return folder / LATEST  # damaged, a folder, or not for this user: no checkpoint
    return folder / Path(name).name


def set_latest(folder: Path, checkpoint: Path) -> None:
    """Makes `latest` name a checkpoint of the folder, atomically, and waits until that is on disk."""
    files.write_atomically(folder / LATEST, f"{checkpoint.name}\n{_checksum(checkpoint.name)}\n")


def _checksum(name: str) -> str:
    """Of a name, so that a flipped bit does not lead to another checkpoint."""
    return f"crc32:{zlib.crc32(name.encode()):08x}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Returns all folders that are or should be checkpoints, by step.

    Where a save was interrupted while it replaced an earlier one of the same step, the earlier one is among them.
    """
    replaced = [path for path in folder.glob(f"{REPLACED}step-*") if not _original(path).exists()]
    # Not Path.is_dir(), which raises where another client of the file system has just removed the folder (ESTALE).
    found = [path for path in [*folder.glob("step-*"), *replaced] if os.path.isdir(path)]
    return sorted(found, key=lambda path: path.name.removeprefix(REPLACED))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, in the order in which they were saved.

    That is not always the order of their steps: a run may have been resumed from an earlier one.
    """
    return [path for path, _ in _complete(folder)]


def newest_complete(folder: Path) -> Path | None:
    """Returns the complete checkpoint that was saved last, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def next_created(folder: Path) -> str:
    """Returns the time for a checkpoint that is completed now: later than that of all others, whatever the clock."""
    newest = max((manifest.created for _, manifest in _complete(folder)), default="")
    current = now()
    if current > newest:
        return current
    return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")


def prunable(folder: Path, keep_last: int, keep_every: int, pinned: int | None = None) -> list[Path]:
    """Returns the checkpoints that `prune` would remove.

    Incomplete ones, and those that a user has renamed (step-00000100-best), are neither counted nor removed.

    Args:
        folder: A run's checkpoints.
        keep_last: How many of the newest are kept, at least one.
        keep_every: Those whose step is a multiple of this are kept too; 0: none.
        pinned: The one of this step is kept too, since the run may have to return to it.
    """
    assert keep_last >= 1, keep_last
    found = [(path, manifest) for path, manifest in _complete(folder) if path.name == checkpoint_name(manifest.step)]
    kept = {path for path, _ in found[-keep_last:]} | {latest(folder)}
    kept |= {path for path, manifest in found if manifest.step == pinned}
    if keep_every > 0:
        kept |= {path for path, manifest in found if manifest.step % keep_every == 0}
    return [path for path, _ in found if path not in kept]


def prune(folder: Path, keep_last: int, keep_every: int, pinned: int | None = None) -> list[Path]:
    """Removes the checkpoints that `prunable` names, and returns them.

    Raises:
        CheckpointError: Some cannot be removed; the others are.
    """
    return _remove(folder, prunable(folder, keep_last, keep_every, pinned))


def remove_after(folder: Path, step: int) -> list[Path]:
    """Removes the checkpoints of later steps, which a rollback to `step` has undone, and returns them.

    They would count as the run's newest ones; `latest` names an earlier one already. One that a user has renamed stays.

    Raises:
        CheckpointError: Some cannot be removed; the others are.
    """
    # By name: an incomplete one of those steps is of no more use than the others.
    return _remove(folder, [path for path in checkpoint_folders(folder) if step_named(path) > step])


def set_aside_after(folder: Path, step: int) -> None:
    """Renames the checkpoints of later steps to suspect-step-..., which no start takes and nothing removes."""
    with system_errors("renamed", folder):
        for path in checkpoint_folders(folder):
            if step_named(path) > step:
                os.rename(path, path.with_name(f"suspect-{checkpoint_name(step_named(path))}"))
        files.sync(folder)


def checkpoint_at(path: Path) -> Path:
    """Returns the checkpoint at a path; of a run directory or folder of checkpoints, the complete one saved last.

    Raises:
        CheckpointError: There is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint, or the run directory that it is in")
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / CHECKPOINTS, path):
        if (found := newest_complete(folder)) is not None:
            return found
    raise CheckpointError(
        f"{path} holds no complete checkpoint: neither {MANIFEST}, nor folders step-... with one, nor a folder "
        f"{CHECKPOINTS} with these"
    )


def step_named(path: Path) -> int:
    """Returns the step of a checkpoint's folder by its name; -1 where a user has renamed it."""
    number = path.name.removeprefix(REPLACED).removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _remove(folder: Path, paths: list[Path]) -> list[Path]:
    faults = []
    for path in paths:
        hidden = path
        try:
            with system_errors("removed", path):
                # Renamed first: what is half removed no longer has a checkpoint's name.
                hidden = _hide(path)
                files.sync(folder)
                failpoints.reached("retention")
                _clear_away(hidden)
        except CheckpointError as fault:
            if os.path.lexists(path) or os.path.lexists(hidden):  # otherwise another process has removed it
                faults.append(str(fault))
    if faults:
        raise CheckpointError("; ".join(faults))
    return paths


def put_in_place(unfinished: Path, final: Path) -> None:
    """Gives a complete folder its name; a checkpoint of the same step is replaced and removed afterwards."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if files.put_in_place(unfinished, final, replaced):
        # The new one is complete; the next save clears away what is left of the old one.
        with contextlib.suppress(OSError):
            _clear_away(_hide(replaced))


def tidy(folder: Path) -> None:
    """Clears away the remainders of a run that died during a save; no save may be in progress.

    What cannot be removed stays, and does not prevent a save: whether the folder can be written shows then.
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
    """Renames a path that is to be deleted; one that has the new name already may be still in use (NFS)."""
    for number in count():
        hidden = path.with_name(f"{REMOVED}{path.name.removeprefix(REPLACED)}{f'-{number}' if number else ''}")
        if not os.path.lexists(hidden):
            break
    os.rename(path, hidden)
    return hidden


def _clear_away(path: Path) -> None:
    """Deletes a hidden file or folder; of a symbolic link, the link alone.

    NFS cannot delete a file that another process on this machine reads (an export): its folder stays until the next
    save. What another client of the file system removes meanwhile is no error either.
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
