"""Files that are on disk when they are said to be, and that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.files import name_errors

CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """What is known of a file.

    Attributes:
        bytes: Its size.
        sha256: Its checksum, in hexadecimal.
    """

    bytes: int
    sha256: str


@contextlib.contextmanager
def faults_told(action: str, path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a CheckpointError.

    Args:
        action: What is being done to the path: "written", "read", "removed".
        path: A file or folder.

    Raises:
        CheckpointError: With the path, the fault and the remedy.
    """
    try:
        yield
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else path
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CheckpointError(f"{place} cannot be {action}: {reason}; {_remedy(error, place, action)}") from error


def _remedy(error: OSError, path: Path, action: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free space on the disk of {path.parent}, or keep fewer checkpoints (checkpoint.keep_last)"
    if error.errno in (errno.EACCES, errno.EPERM) and action == "read":
        return "see that this user may read it"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"see that this user may write to {path.parent}, or name another run directory"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "checkpoints must lie on a disk that all ranks share, and nothing else may move them during a run"
    return f"see to the disk of {path.parent}"


def write_file(path: Path, content: bytes) -> FileEntry:
    """Writes a new file and waits until it is on disk."""
    with name_errors(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def entry_of(path: Path) -> FileEntry:
    """Returns size and checksum of a file; reads all of it, a piece at a time."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileEntry(size, digest.hexdigest())


def size_fault(path: Path, entry: FileEntry) -> str | None:
    """Returns what is wrong with a file as far as its size tells, or None."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != entry.bytes:
        return f"{path} has {size} bytes and not {entry.bytes}"
    return None


def checksum_fault(path: Path, entry: FileEntry) -> str | None:
    """Returns what is wrong with a file, or None; reads all of it."""
    try:
        if fault := size_fault(path, entry):
            return fault
        actual = entry_of(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if actual == entry else f"{path} is damaged or of another save: its sha256 is not the manifest's"


def copy_file(source: Path, target: Path) -> FileEntry:
    """Copies a file, waits until the copy is on disk, and returns what was written."""
    with faults_told("read", source), name_errors(source):
        content = source.read_bytes()
    return write_file(target, content)
