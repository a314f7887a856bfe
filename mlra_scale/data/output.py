"""A folder that appears finished or not at all.

Everything is built in the hidden sibling .NAME.partial, flushed to disk and renamed. The sibling is locked while its
builder lives; the system drops the lock when the process dies, so the next run knows a leftover from a run at work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlra_scale.data.errors import DataError
from mlra_scale.data.manifest import MANIFEST_NAME


@contextlib.contextmanager
def atomic_folder(final: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary folder to fill; renames it to `final` at the end, removes it after an error.

    Args:
        final: The folder to make.
        overwrite: Whether a finished data set at `final` may be replaced (at the end, when the new one is complete).

    Yields:
        The temporary folder, empty.

    Raises:
        DataError: `final` exists and may not be replaced, or another run is building it.
    """
    final = final.absolute()
    check_free(final, overwrite)
    made_parents = [parent for parent in final.parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, old = final.parent / f".{final.name}.partial", final.parent / f".{final.name}.old"
    lock = _lock(partial)
    try:
        # An earlier run may have been killed between the two renames below: its old data set is put back.
        if old.exists():
            if final.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, final)
        check_free(final, overwrite)
        _empty(partial)
        try:
            yield partial
            _sync(partial)
            if final.exists():
                os.rename(final, old)
            os.rename(partial, final)
            _sync_one(final.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not final.exists():
                os.rename(old, final)
            for parent in made_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
    finally:
        os.close(lock)


def check_free(final: Path, overwrite: bool) -> None:
    """Raises DataError if the folder cannot be made; a cheap check before any work."""
    if not final.exists():
        return
    if not final.is_dir():
        raise DataError(f"{final} exists and is not a folder; choose another --output")
    if (final / MANIFEST_NAME).is_file():
        if not overwrite:
            raise DataError(f"{final} holds a finished data set; give --overwrite to replace it")
    elif any(final.iterdir()):
        raise DataError(f"{final} exists and was not made by this tool (no {MANIFEST_NAME}); choose another --output")


def _lock(partial: Path) -> int:
    """Makes and locks the temporary folder; returns the descriptor that holds the lock."""
    while True:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(f"another run is building {partial.name[1:].removesuffix('.partial')} right now") from error
        except OSError:
            return descriptor  # a file system without locks: two runs at once are the user's to avoid
        # The holder before us may have renamed or removed the folder between our two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(partial).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(folder: Path) -> None:
    """Flushes a folder's files, and the folders themselves, to disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for file in files:
            _sync_one(Path(root, file))
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
