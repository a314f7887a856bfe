"""The record of a run: append-only JSON lines that survive a crash and never tell a step twice."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from mlra_scale.config.json_text import parse_json
from mlra_scale.files import write_atomically

_BLOCK_BYTES = 256 * 1024
_UNSYNCED_BYTES = 1024 * 1024
"""So many bytes of lines may wait for the next sync: they are in memory too, should the disk refuse them."""
_TAIL_BYTES = 4 * 1024 * 1024
"""So much of a record's end is looked at: values that are older than some ten thousand lines are not found."""

_REMEDY = "remove the line, or move the file away"


def finite_or_none(value: Any) -> Any:
    """Replaces numbers that JSON has no word for by None, in mappings and lists too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


class RecordLost(Exception):
    """Another program has moved, removed, replaced or cut what a run writes to."""


class JsonLines:
    """A file of one JSON object per line, handed to the operating system line by line.

    A file that was never opened (any rank but rank 0) takes lines and forgets them, so that callers need not ask. A
    disk that refuses a line, such as a full one, does not end the run: the line is kept and written as soon as that is
    possible. A network file system may refuse lines only when they are to be on disk (`sync`): they are kept as well.
    Whether the run can continue is decided by its checkpoints, on all ranks alike.
    """

    def __init__(self, path: Path | None) -> None:
        """Opens the file for appending.

        Args:
            path: The file; None for a file that forgets.
        """
        self._path = path
        if path is not None and path.is_file():
            _cut_torn_line(path)
        self._file = None if path is None else path.open("ab", buffering=0)
        self._size = 0 if self._file is None else os.fstat(self._file.fileno()).st_size
        self._pending = b""
        self._written = b""  # since the last sync
        self._is_refused = False

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one object and hands it to the operating system at once."""
        if self._file is not None:
            self._pending += (json.dumps(finite_or_none(values), allow_nan=False) + "\n").encode("ascii")
            self._tell(self._flush(with_sync=self._is_refused or len(self._written) > _UNSYNCED_BYTES))

    def sync(self) -> None:
        """Returns when what was written is on disk, or is kept because the disk refuses it.

        Raises:
            RecordLost: The file is no longer the one that was opened, or has been cut.
        """
        if self._file is not None:
            self.check()
            self._tell(self._flush(with_sync=True))

    def check(self) -> None:
        """Raises RecordLost if the path names another file by now, or none, or if the file has been cut."""
        if self._file is None:
            return
        assert self._path is not None
        check_same(self._path, self._file.fileno())
        if (size := os.fstat(self._file.fileno()).st_size) < self._size:
            raise RecordLost(f"{self._path} has {size} bytes where this run has written {self._size}: it has been cut")

    def close(self) -> None:
        """Closes the file; lines that the disk refuses to the end are printed."""
        if self._file is None:
            return
        refusal = self._flush(with_sync=True)
        try:
            self._file.close()
        except OSError as error:
            refusal = refusal or error.strerror
        if refusal:
            print(f"{self._path} could not be written to its end ({refusal}); lost:", file=sys.stderr)
            print((self._written + self._pending).decode("ascii"), end="", file=sys.stderr, flush=True)

    def _tell(self, refusal: str | None) -> None:
        if refusal and not self._is_refused:
            print(f"{self._path} cannot be written ({refusal}); its lines are kept until it can", file=sys.stderr)
        self._is_refused = refusal is not None

    def _flush(self, with_sync: bool) -> str | None:
        """Writes what is pending, and waits until it is on disk; returns why that is not possible."""
        assert self._file is not None
        try:
            while self._pending:
                count = self._file.write(self._pending)
                self._size += count
                self._written += self._pending[:count]
                self._pending = self._pending[count:]
            if with_sync:
                self._sync()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _sync(self) -> None:
        """Waits until what was written is on disk. What the disk refuses is taken back, to be written again."""
        assert self._file is not None
        try:
            os.fsync(self._file.fileno())
        except OSError:
            # Of which of these lines the disk has nobody knows, and asked again it may say yes.
            os.ftruncate(self._file.fileno(), self._size - len(self._written))
            self._size -= len(self._written)
            self._pending, self._written = self._written + self._pending, b""
            raise
        self._written = b""


class EventLog:
    """events.jsonl: what happened beside the numbers (start, resume, checkpoint, stop), each with its time."""

    def __init__(self, path: Path | None) -> None:
        self._lines = JsonLines(path)

    def write(self, event: str, **values: Any) -> None:
        """Appends one event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        # A stop for a value that is no number must show that value, for which JSON has no word: it goes in as text.
        shown = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._lines.write({"time": now, "event": event, **shown})

    def sync(self) -> None:
        """See JsonLines."""
        self._lines.sync()

    def check(self) -> None:
        """See JsonLines."""
        self._lines.check()

    def close(self) -> None:
        """See JsonLines."""
        self._lines.close()


def check_same(path: Path, descriptor: int) -> None:
    """Compares a path with the file or folder that was opened there.

    Args:
        path: The path.
        descriptor: Of what was opened.

    Raises:
        RecordLost: Another program has moved or removed it, or put another one in its place.
    """
    opened = os.fstat(descriptor)
    try:
        present = path.stat()
        if (present.st_dev, present.st_ino) == (opened.st_dev, opened.st_ino):
            return
        fault = "is another one than this run has opened: it has been replaced"
    except FileNotFoundError:
        fault = "is gone: it has been moved or removed"
    now_at = None
    with contextlib.suppress(OSError):
        now_at = os.readlink(f"/proc/self/fd/{descriptor}")
    is_moved = now_at is not None and opened.st_nlink > 0 and not now_at.endswith(" (deleted)")
    raise RecordLost(f"{path} {fault}" + (f" (what was opened is {now_at} now)" if is_moved else ""))


def _cut_torn_line(path: Path) -> None:
    """Removes a last line that a crash or a full disk cut short: appended to, it would spoil the next line as well."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def read_record(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """Reads a file of JSON lines.

    Args:
        path: The file; a missing one reads as empty.
        key: What every object must have: "step" as a whole number, "event" and others as text.

    Returns:
        The objects in order. A last line that a crash cut short is left out.

    Raises:
        ValueError: A line before the last is not JSON, or a line is no object with the key.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="ascii", errors="replace").split("\n")
    lines = lines if lines[-1] else lines[:-1]
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}:"
        try:
            value = parse_json(line, where, allow_nan=True)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{error}; {_REMEDY}") from None
        kind = int if key == "step" else str
        if not isinstance(value, dict) or (key is not None and type(value.get(key)) is not kind):
            raise ValueError(f"{where} no object" + (f" with `{key}`" if key else "") + f"; {_REMEDY}")
        objects.append(value)
    return objects


def lines_from_end(file: BinaryIO, limit: int = _TAIL_BYTES) -> Iterator[bytes]:
    """Yields the lines of a file from the last one backwards, and reads no more of it than it must.

    Args:
        file: The file. A last line without its end was cut short by a crash, or is being written: it is left out.
        limit: So many bytes are read at most; a line that begins before them is left out.
    """
    position = file.seek(0, os.SEEK_END)
    start, rest, is_torn = max(0, position - limit), b"", True
    while position > start:
        size = min(_BLOCK_BYTES, position - start)
        position -= size
        file.seek(position)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        if is_torn and lines:
            lines.pop()
            is_torn = False
        yield from reversed(lines)
    if position == 0 and not is_torn:
        yield rest


def cut_record(path: Path, last_step: int) -> int:
    """Removes what a run recorded after the step that it is resumed from, in one atomic replacement.

    The resumed run records those steps again; without the cut each would be there twice.

    Args:
        path: metrics.jsonl; a missing file is left missing.
        last_step: The step of the checkpoint; later lines go, and so does a line that a crash cut short.

    Returns:
        Number of lines removed that held a whole object.
    """
    if not path.exists():
        return 0
    objects = read_record(path, "step")
    kept = [item for item in objects if item["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(item) + "\n" for item in kept))
    return len(objects) - len(kept)


def lost_from(records: Sequence[Mapping[str, Any]], step: int, log_every: int) -> int | None:
    """Returns the first step of the record's end that a run must have recorded and that is not there; None: all is.

    A record is on disk before the checkpoint of its last step. What is missing was taken away: the file was emptied,
    replaced or removed between two starts.

    Args:
        records: What is there of the steps up to the checkpoint.
        step: Of the checkpoint that the run continues from.
        log_every: Steps between two recorded losses; the first step is recorded too.
    """
    last = max((record["step"] for record in records if "loss" in record), default=0)
    due = 0 if step == 0 else max(1, step - step % log_every)
    return last + 1 if last < due else None


def replace_last(path: Path, record: Mapping[str, Any]) -> None:
    """Puts a line in the place of the last one, in one atomic replacement; see `cut_record`."""
    objects = [*read_record(path)[:-1], finite_or_none(record)]
    write_atomically(path, "".join(json.dumps(item) + "\n" for item in objects))


def set_aside(path: Path, aside: Path, last_step: int, rollback: int) -> None:
    """Moves what a run recorded after a step to another file, where it stays as what had been tried.

    Args:
        path: metrics.jsonl.
        aside: Where the lines go, each with the number of the rollback.
        last_step: The step that the run has gone back to.
        rollback: Its number.
    """
    lines = JsonLines(aside)
    for item in read_record(path, "step"):
        if item["step"] > last_step:
            lines.write({**item, "rollback": rollback})
    lines.sync()
    lines.close()
    cut_record(path, last_step)
