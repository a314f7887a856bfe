"""The record of a run: append-only JSON lines that survive a crash and hold each step once; and which code wrote it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import mlra_scale
from mlra_scale.config.json_text import parse_json
from mlra_scale.files import write_atomically

_BLOCK_BYTES = 256 * 1024
_UNSYNCED_BYTES = 1024 * 1024
"""Most bytes of lines between two syncs: they also stay in memory, in case the disk refuses them."""
_TAIL_BYTES = 4 * 1024 * 1024
"""Most bytes that `lines_from_end` reads, some ten thousand lines."""
_REMEDY = "remove the line, or move the file away"
_logger = logging.getLogger(__name__)


def finite_or_none(value: Any) -> Any:
    """Replaces numbers that JSON cannot express by None, also in mappings and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


class RecordLost(Exception):
    """Another program has moved, removed, replaced or cut a file that this run writes."""


class JsonLines:
    """A file of one JSON object per line; each line is given to the operating system at once.

    Lines that the disk refuses, because it is full or because a network file system fails when they are synced, are
    kept in memory and written as soon as that is possible. With path None, on ranks other than 0, lines are dropped.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None and path.is_file():
            _cut_torn_line(path)
        self._file = None if path is None else path.open("ab", buffering=0)
        self._size = 0 if self._file is None else os.fstat(self._file.fileno()).st_size
        self._pending = b""
        self._unsynced = b""
        self._is_refused = False

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one object."""
        if self._file is not None:
            self._pending += (json.dumps(finite_or_none(values), allow_nan=False) + "\n").encode("ascii")
            self._note_refusal(self._flush(with_sync=self._is_refused or len(self._unsynced) > _UNSYNCED_BYTES))

    def sync(self) -> None:
        """Waits until all lines are on disk, or are kept because the disk refuses them.

        Raises:
            RecordLost: The path names another file now, or none, or the file was cut.
        """
        if self._file is not None:
            self._check()
            self._note_refusal(self._flush(with_sync=True))

    def _check(self) -> None:
        assert self._path is not None and self._file is not None
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
            lines = (self._unsynced + self._pending).decode("ascii")
            _logger.error("%s could not be written to its end (%s); lost:\n%s", self._path, refusal, lines.rstrip("\n"))

    def _note_refusal(self, refusal: str | None) -> None:
        if refusal and not self._is_refused:
            _logger.warning(
                "%s cannot be written (%s); its lines are kept until it can be written", self._path, refusal
            )
        self._is_refused = refusal is not None

    def _flush(self, with_sync: bool) -> str | None:
        """Writes pending lines and, with `with_sync`, waits until they are on disk; returns why that fails."""
        assert self._file is not None
        try:
            while self._pending:
                count = self._file.write(self._pending)
                self._size += count
                self._unsynced += self._pending[:count]
                self._pending = self._pending[count:]
            if with_sync:
                self._sync()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _sync(self) -> None:
        assert self._file is not None
        try:
            os.fsync(self._file.fileno())
        except OSError:
            # It is unknown which of these lines are on disk, and a second fsync may succeed without them: write again.
            os.ftruncate(self._file.fileno(), self._size - len(self._unsynced))
            self._size -= len(self._unsynced)
            self._pending, self._unsynced = self._unsynced + self._pending, b""
            raise
        self._unsynced = b""


class EventLog(JsonLines):
    """events.jsonl: start, resume, checkpoints, stops and the like, each with its time."""

    def event(self, name: str, **values: Any) -> None:
        """Appends one event; numbers that JSON cannot express become text, since a stop for one must show it."""
        shown = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **shown})


def check_same(path: Path, descriptor: int) -> None:
    """Raises RecordLost if another program has moved, removed or replaced what was opened at a path."""
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
    """Removes an unfinished last line, so that the next line is not appended to it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def read_record(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines, without an unfinished last line; a missing file reads as empty.

    Every object must have the key: "step" with a whole number, any other with a text.

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
    """Yields the lines of a file from the last one backwards, and reads no more of the file than that takes.

    An unfinished last line is left out, and so is what begins before the last `limit` bytes.
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


def cut_record(path: Path, last_step: int, aside: Path | None = None, rollback: int = 0) -> int:
    """Removes the lines after `last_step`, which will be done again, in one atomic replacement; returns their number.

    They are appended to the file `aside`, if one is given, with the number of the rollback.
    """
    if not path.exists():
        return 0
    objects = read_record(path, "step")
    if aside is not None:
        undone = JsonLines(aside)
        for item in objects:
            if item["step"] > last_step:
                undone.write({**item, "rollback": rollback})
        undone.sync()
        undone.close()
    kept = [item for item in objects if item["step"] <= last_step]
    _replace(path, kept)
    return len(objects) - len(kept)


def replace_last(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces the last line, in one atomic replacement of the file."""
    _replace(path, [*read_record(path)[:-1], finite_or_none(record)])


def _replace(path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(item) + "\n" for item in objects))


def first_lost_step(records: Sequence[Mapping[str, Any]], step: int, log_every: int) -> int | None:
    """Returns the first step whose loss is missing at the end of a record up to a checkpoint; None: nothing is missing.

    Records are on disk before the checkpoint of their last step. Missing ones were removed between two starts. Losses
    are recorded every `log_every` steps, and of the first step.
    """
    last = max((record["step"] for record in records if "loss" in record), default=0)
    due = 0 if step == 0 else max(1, step - step % log_every)
    return last + 1 if last < due else None


ROOT = Path(mlra_scale.__file__).resolve().parents[1]
_SECONDS = 10.0


def commit() -> str | None:
    """Returns the commit of this code, with "+changes" behind it if files differ from it; None outside of git."""
    name = output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if name is None:
        return None
    changes = output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return name.strip() + ("+changes" if changes else "")


def output_of(command: Sequence[str]) -> str | None:
    """Returns what a command prints; None where it is missing, fails or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
