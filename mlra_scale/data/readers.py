"""Reads the documents of one file (text, JSON or parquet) in portions that another process can parse.

Every defect of a file is a DataError that names the file and the line or row.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlra_scale.data import DataError
from mlra_scale.data.files import compression_of, kind_of

_PORTION_BYTES = 1 << 18
"""A portion ends with the line or document that reaches this size; larger ones make every part of the pipeline wait."""
_ROWS = 256
"""Rows of a parquet file that are read together."""
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_CUT_CHARACTERS = 8
"""How far before the end of a text the error of a JSON value that is only cut off there may lie."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Consecutive lines of a JSON lines file, parsed by whoever needs the texts.

    Attributes:
        path: The file.
        first: Number of the first line, from 1.
        content: The lines' bytes.
        field: Field of the text.
        consumed: Bytes of the file (compressed or not) that were read for them.
    """

    path: Path
    first: int
    content: bytes
    field: str
    consumed: int

    @property
    def size(self) -> int:
        """About how many bytes of text there are."""
        return len(self.content)

    def texts(self) -> Iterator[str]:
        """Yields the text of every line that is not blank.

        Raises:
            DataError: A line holds no text; the message names it.
        """
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            where = f"{self.path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text ({error.reason})") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})") from error
            yield _text_of(record, text, self.field, where)


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of consecutive documents; `consumed` are the bytes of the source's files that were read for them."""

    content: Sequence[str]
    consumed: int

    @property
    def size(self) -> int:
        """About how many bytes of text there are."""
        return sum(map(len, self.content))

    def texts(self) -> Iterator[str]:
        """Yields the texts."""
        return iter(self.content)


Portion = Lines | Texts


def portions_of_file(path: Path, field: str) -> Iterator[Portion]:
    """Yields the documents of one file of a known kind, the same portions every time.

    Args:
        path: The file.
        field: Field or column of the text (not of .txt).

    Raises:
        DataError: The file cannot be read.
    """
    kind = kind_of(path)
    if kind == ".txt":
        yield Texts(["".join(characters(path))], path.stat().st_size)
    elif kind == ".parquet":
        yield from _parquet_portions(path, field)
    elif kind == ".jsonl" or _has_objects_in_lines(path):
        yield from _line_portions(path, field)
    else:
        yield from _json_portions(path, field)


def texts_of_file(path: Path, field: str) -> Iterator[str]:
    """Yields the documents of one file as `portions_of_file` does, one by one."""
    for portion in portions_of_file(path, field):
        yield from portion.texts()


def characters(path: Path, stretch_bytes: int = 1 << 18) -> Iterator[str]:
    """Yields the text of a file in stretches of about `stretch_bytes` bytes, without a byte order mark."""
    return (text for text, _ in _stretches(path, stretch_bytes))


def _stretches(path: Path, stretch_bytes: int) -> Iterator[tuple[str, int]]:
    """Yields stretches of a file's text, each with the position in the file up to which it was read."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        with _opened(path) as (raw, stream):
            while content := stream.read(stretch_bytes):
                text = decoder.decode(content)
                line += text.count("\n")
                yield text, raw.tell()
            yield decoder.decode(b"", final=True), raw.tell()
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file: its own bytes (whose position counts what was read) and the decompressed bytes."""
    try:
        with open(path, "rb") as raw:
            compression = compression_of(path)
            if compression == ".gz":
                yield raw, gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
            elif compression == ".zst":
                import pyarrow

                yield raw, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _line_portions(path: Path, field: str) -> Iterator[Lines]:
    with _opened(path) as (raw, stream):
        first, before = 1, 0
        while content := stream.read(_PORTION_BYTES):
            if not content.endswith(b"\n"):
                content += stream.readline()
            position = raw.tell()
            yield Lines(path, first, content, field, position - before)
            first, before = first + content.count(b"\n"), position


def _has_objects_in_lines(path: Path) -> bool:
    """Returns whether a .json file is one of JSON lines: the first line that is not blank is a whole object."""
    with _opened(path) as (_, stream):
        start = stream.read(3).removeprefix(codecs.BOM_UTF8)
        while start and not start.strip():
            start = stream.read(1)
        if start.lstrip().startswith(b"["):  # an array may be one line of any length
            return False
        try:
            return isinstance(json.loads((start.lstrip() + stream.readline()).split(b"\n")[0]), dict)
        except (ValueError, RecursionError):
            return False


def _json_portions(path: Path, field: str) -> Iterator[Texts]:
    """Yields the documents of one JSON array of objects, or of objects one behind the other, each over any lines."""
    texts: list[str] = []
    size = before = 0
    for line, text, record, position in _json_values(path):
        texts.append(_text_of(record, text, field, f"{path}, line {line}"))
        size += len(texts[-1])
        if size >= _PORTION_BYTES:
            yield Texts(texts, position - before)
            texts, size, before = [], 0, position
    yield Texts(texts, path.stat().st_size - before)


def _json_values(path: Path) -> Iterator[tuple[int, str, Any, int]]:
    """Yields line, text and value of each element of an array, or of each value, and how far the file was read."""
    text, is_first = _JsonText(path), True
    if is_array := text.next_character() == "[":
        text.skip()
    while (character := text.next_character()) and not (is_array and character == "]"):
        if is_array and not is_first:
            if character != ",":
                raise text.error("',' or ']' is missing between elements of an array")
            text.skip()
        yield text.value()
        is_first = False
    if is_array:
        if not character:
            raise text.error("the array has no end")
        text.skip()
        if text.next_character():
            raise text.error("there is more behind the end of the array")


class _JsonText:
    """The text of a JSON file, of which no more is held in memory than a stretch and one value."""

    def __init__(self, path: Path) -> None:
        self._path, self._stretches, self._decoder = path, _stretches(path, _PORTION_BYTES), json.JSONDecoder()
        self._text, self._at, self._line, self._position, self._is_whole = "", 0, 1, 0, False

    def next_character(self) -> str:
        """Moves to the next character that is no white space, and returns it; empty at the end."""
        while True:
            match = _JSON_SPACE.match(self._text, self._at)
            assert match is not None
            self._move(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(1):
                return ""

    def skip(self) -> None:
        """Moves behind one character."""
        self._move(self._at + 1)

    def value(self) -> tuple[int, str, Any, int]:
        """Moves behind the next value; returns its line, text, value, and how far the file was read.

        Raises:
            DataError: It is no JSON.
        """
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _CUT_CHARACTERS
                # Twice as much each time, so that a long value is not parsed again too often.
                if is_cut and self._read(len(self._text) - self._at):
                    continue
                self._move(min(error.pos, len(self._text)))
                raise self.error(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from error
            line, text = self._line, self._text[self._at : end]
            self._move(end)
            return line, text, value, self._position

    def error(self, reason: str) -> DataError:
        """Returns an error at this place."""
        return DataError(f"{self._path}, line {self._line}: not JSON ({reason})")

    def _move(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _read(self, characters: int) -> bool:
        """Reads so many characters or more; returns whether there were any."""
        parts, length = [self._text[self._at :]], 0
        while length < characters and (stretch := next(self._stretches, None)) is not None:
            text, self._position = stretch
            parts.append(text)
            length += len(text)
        self._text, self._at = "".join(parts), 0
        return length > 0


def _text_of(record: Any, text: str, field: str, where: str) -> str:
    """Returns the field of a JSON object; `text` is what it was parsed from.

    Raises:
        DataError: It is no object, has no such field or several, or the field holds no text.
    """
    if not isinstance(record, dict):
        hint = "; a file that is one array has to be named .json" if isinstance(record, list) else ""
        raise DataError(f"{where}: a JSON object is wanted, this is {type(record).__name__}{hint}")
    if field not in record:
        raise DataError(missing_field(where, field, record))
    # json keeps the last of equal keys; counting them takes a second pass.
    if text.count(f'"{field}"') > 1:
        keys = [key for key, _ in json.loads(text, object_pairs_hook=list)]
        if keys.count(field) > 1:
            raise DataError(f"{where}: there are several fields {field!r}; a document has one text")
    return checked_text(record[field], where, field)


def _parquet_portions(path: Path, field: str) -> Iterator[Texts]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise DataError(f"{path} has no column {field!r} (it has: {', '.join(columns)}); choose with --field")
            if columns.count(field) > 1:
                raise DataError(f"{path} has several columns {field!r}; a document has one text")
            size, num_rows, row = path.stat().st_size, max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                values = _values(batch.column(0), path, row)
                texts = [checked_text(value, f"{path}, row {row + i}", field) for i, value in enumerate(values, 1)]
                before, row = row, row + len(texts)
                yield Texts(texts, row * size // num_rows - before * size // num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise DataError(f"{path} cannot be read as parquet: {reason}") from error


def _values(column: Any, path: Path, row: int) -> list[Any]:
    """Returns the values of a column whose first one is in `row` (from 0)."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for index, value in enumerate(column, row + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {index}: not UTF-8 text ({error.reason})") from error
        raise


def checked_text(value: Any, where: str, field: str) -> str:
    """Returns the value; raises DataError unless it is a text that UTF-8 can write."""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: field {field!r} holds half of a surrogate pair, which is no text") from error
    return value


def missing_field(where: str, field: str, record: dict[str, Any]) -> str:
    """Returns the message about an object or row without the field."""
    known = ", ".join(sorted(record)) or "none"
    return f"{where}: there is no field {field!r} (fields: {known}); choose with --field"
