"""What a job prints: to its standard output, and to console.log in the run directory."""

from __future__ import annotations

import contextlib
import errno
import sys
from datetime import datetime
from pathlib import Path
from typing import IO


class Console:
    """Prints to standard output and to a file. Where a disk is full, the run continues without."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def say(self, text: str) -> None:
        """Prints a line of the job itself, with the time."""
        line = f"[job {datetime.now().astimezone().isoformat(timespec='milliseconds')}] {text}\n"
        self.print(line.encode(errors="backslashreplace"))

    def print(self, text: bytes) -> None:
        """Prints output of the ranks."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            self._file.write(text)


def in_words(error: Exception) -> str:
    """Returns an error in one line."""
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(f"{type(error).__name__}: {error}".split())
    remedy = "; make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{error.filename or 'an operation without a file'}: {error.strerror}{remedy}"
