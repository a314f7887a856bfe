"""The record of a run: append-only JSON lines that survive a crash and never tell a step twice."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from mlra_scale.config.json_text import parse_json

_BLOCK_BYTES = 256 * 1024
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


class JsonLines:
    """A file of one JSON object per line, handed to the operating system line by line.

    A file that was never opened (any rank but rank 0) takes lines and forgets them, so that callers need not ask. A
    disk that refuses a line, such as a full one, does not end the run: the line is kept and written as soon as that is
    possible. Whether the run can go on is for its checkpoints to say, on all ranks alike.
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
        self._pending = b""

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one object and hands it to the operating system at once."""
        if self._file is not None:
            was_refused = self._pending != b""
            self._pending += (json.dumps(finite_or_none(values), allow_nan=False) + "\n").encode("ascii")
            refusal = self._flush()
            if refusal and not was_refused:
                print(f"{self._path} cannot be written ({refusal}); its lines are kept until it can", file=sys.stderr)

    def sync(self) -> None:
        """Returns when what was written is on disk."""
        if self._file is not None and self._flush() is None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            if refusal := self._flush():
                print(f"{self._path} could not be written to its end ({refusal}); lost:", file=sys.stderr)
                print(self._pending.decode("ascii"), end="", file=sys.stderr, flush=True)
            self._file.close()

    def _flush(self) -> str | None:
        """Writes what is pending; returns why that is not possible."""
        assert self._file is not None
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            return error.strerror
        return None


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

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


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


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
