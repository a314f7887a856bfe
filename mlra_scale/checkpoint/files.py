"""The files of checkpoints: errors with a remedy, and sizes and checksums of what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.config.json_text import printable
from mlra_scale.console import InputError
from mlra_scale.files import name_errors

SHARED_DISK = "checkpoints must lie on a disk that all ranks share, and nothing else may move them during a run"


class CheckpointError(InputError, RuntimeError):
    """A checkpoint cannot be written or read; the text names the file, the fault and the remedy.

    Parts of the text come from files, so control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class FileEntry:
    """Size of a file, and its SHA-256 checksum in hexadecimal."""

    bytes: int
    sha256: str


@contextlib.contextmanager
def system_errors(action: str, path: Path, remedy: str | None = None) -> Iterator[None]:
    """Turns errors of the operating system into a CheckpointError with path, fault and remedy.

    Args:
        action: What the block does: "written", "read", "removed".
        path: Named where the system's error names no file.
        remedy: What the user can do about any error but a full disk; None: what helps with a run's checkpoints.
    """
    try:
        yield
    except OSError as error:
        failed = Path(error.filename) if isinstance(error.filename, str) else path
        reason = os.strerror(error.errno) if error.errno else str(error)
        if remedy is None:
            remedy = _remedy(error, failed, action)
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free space on the disk of {path.parent}"
        raise CheckpointError(f"{failed} cannot be {action}: {reason}; {remedy}") from error


def _remedy(error: OSError, path: Path, action: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free space on the disk of {path.parent}, or keep fewer checkpoints (checkpoint.keep_last)"
    if error.errno in (errno.EACCES, errno.EPERM) and action == "read":
        return "see that this user may read it"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"see that this user may write to {path.parent}, or name another run directory"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return SHARED_DISK
    return f"check the disk of {path.parent}"


def first_line(error: Exception) -> str:
    """Returns the first line of another library's error, fit for a message."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def some_of(names: Sequence[str]) -> str:
    """Returns the first six names of a list, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return printable(", ".join(names[:6])) + more


def write_file(path: Path, content: bytes) -> FileEntry:
    """Writes a new file and waits until it is on disk."""
    with name_errors(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def entry_of(path: Path) -> FileEntry:
    """Returns size and checksum of a file; reads all of it, a piece at a time."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(file.tell(), digest.hexdigest())


def size_fault(path: Path, entry: FileEntry) -> str | None:
    """Returns what is wrong with the size of a file, or None."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != entry.bytes:
        return f"{path} has {size} bytes and not {entry.bytes}"
    return None


def checksum_fault(path: Path, entry: FileEntry) -> str | None:
    """Returns what is wrong with size or content of a file, or None; reads all of it."""
    try:
        if fault := size_fault(path, entry):
            return fault
        actual = entry_of(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if actual == entry else f"{path} is damaged or of another save: its sha256 is not the manifest's"
