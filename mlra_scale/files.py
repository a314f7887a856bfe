"""Locks, and files and folders that appear complete or not at all, whenever the process dies or the disk is full.

Nothing of ours is imported here, so every room may use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_SECONDS = 0.1


def lock(
    descriptor: int, seconds: float = 0.0, is_shared: bool = False, should_stop: Callable[[], bool] = lambda: False
) -> str | None:
    """Locks an open file or folder; the system releases it when the descriptor is closed or its process dies.

    Waits up to `seconds` (math.inf: without limit) for another holder, or until `should_stop`. A shared lock allows
    other shared ones beside it.

    Returns:
        None where the lock is held; the system's reason where the file system has no locks.

    Raises:
        BlockingIOError: Another process holds it.
    """
    deadline = time.monotonic() + seconds
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            if time.monotonic() >= deadline or should_stop():
                raise
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            return error.strerror or str(error)


@contextlib.contextmanager
def name_errors(path: Path) -> Iterator[None]:
    """Gives the file's name to errors of the operating system that have none: those of writing and of waiting."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def native_errors(path: Path) -> Iterator[None]:
    """Turns errors of a library in Rust, which only quote the operating system, into the OSError that they are.

    tokenizers raises a bare Exception with "... (os error 28)" where a disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on disk."""
    with name_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until a folder is on disk with all that is in it."""
    for root, _, files in os.walk(folder, topdown=False):
        for file in files:
            sync(Path(root, file))
        sync(Path(root))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old or the new content, and waits until it is on disk.

    Raises:
        OSError: It cannot be written; `filename` is `path`. The old content stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno is not None:  # the system names the temporary file, or none
            error.filename, error.filename2 = str(path), None
        raise


def put_in_place(new: Path, target: Path, aside: Path) -> bool:
    """Renames a complete file or folder to `target`; returns whether something there was moved to `aside`.

    The two are exchanged in one step where the file system can do that. Where it cannot, a crash may leave nothing at
    `target` and the old one at `aside`.

    Raises:
        OSError: It cannot be renamed; what was at `target` stays there.
    """
    is_replacing = os.path.lexists(target)  # a symbolic link that leads nowhere is in the way too
    if not is_replacing:
        os.rename(new, target)
    elif _exchange(new, target):
        os.rename(new, aside)
    else:
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
    sync(target.parent)
    return is_replacing


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names (Linux); returns False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
        return False  # EPERM: of a container that forbids unknown system calls
    raise OSError(code, os.strerror(code), str(other))


@contextlib.contextmanager
def new_folder(target: Path, busy: Exception, is_kept: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yields a hidden sibling, .NAME.partial, which becomes `target` at the end of the block.

    The sibling is locked while its builder lives: another process that builds the same folder gets the error `busy`. It
    is empty, but for what a killed builder left there of which `is_kept` says so. An error in the block removes the
    sibling, with the parents that were made for it, unless `is_kept`. A folder at `target` is replaced; where an
    earlier builder was killed while it replaced one (.NAME.old), the old one is first put back.

    Raises:
        OSError: Something cannot be written, or `target` is a link that leads nowhere (a disk is not mounted).
    """
    target = target.absolute()
    if target.is_symlink() and not target.exists():
        raise OSError(errno.ENOENT, "it is a link to a place that is not there", str(target))
    made_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = partial_of(target), target.with_name(f".{target.name}.old")
    try:
        descriptor = _make_and_lock(partial)
    except BlockingIOError:
        raise busy from None
    try:
        if os.path.lexists(target):
            _remove(old)
        elif old.exists():
            os.rename(old, target)
        if not is_kept(partial):
            empty(partial)
        try:
            yield partial
            sync_tree(partial)
            put_in_place(partial, target, old)
        except BaseException:
            if is_kept(partial):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
        _remove(old)
    finally:
        os.close(descriptor)


def _remove(old: Path) -> None:
    """Removes what was replaced: a folder, or a link to one, whose own files stay."""
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def partial_of(target: Path) -> Path:
    """Returns the folder in which `new_folder` builds another one."""
    return target.absolute().with_name(f".{target.name}.partial")


def empty(folder: Path) -> None:
    """Removes all that is in a folder."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _make_and_lock(folder: Path) -> int:
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise
        # The holder before us may have renamed or removed the folder between the calls above.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)
