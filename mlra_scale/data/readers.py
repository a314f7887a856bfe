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
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        with _opened(path) as (_, stream):
            while raw := stream.read(stretch_bytes):
                text = decoder.decode(raw)
                line += text.count("\n")
                yield text
            yield decoder.decode(b"", final=True)
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
    """Yields the documents of one JSON array of objects, or of objects one behind the other, each over any lines.

    The text of the file is held in memory, as that of a .txt file is.
    """
    whole, file_bytes = "".join(characters(path)), path.stat().st_size
    texts: list[str] = []
    line, seen, size, before = 1, 0, 0, 0
    for start, end, record in _json_values(whole, path):
        line += whole.count("\n", seen, start)
        seen = start
        texts.append(_text_of(record, whole[start:end], field, f"{path}, line {line}"))
        size += len(texts[-1])
        if size >= _PORTION_BYTES:
            position = file_bytes * end // len(whole)
            yield Texts(texts, position - before)
            texts, size, before = [], 0, position
    yield Texts(texts, file_bytes - before)


def _json_values(text: str, path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yields begin, end and value of each element of an array, or of each value of a text that is no array.

    Raises:
        DataError: It is no JSON; the message names the line in the file at `path`.
    """
    decoder = json.JSONDecoder()

    def behind_space(at: int) -> int:
        match = _JSON_SPACE.match(text, at)
        assert match is not None
        return match.end()

    def error(reason: str, at: int) -> DataError:
        return DataError(f"{path}, line {1 + text.count(chr(10), 0, at)}: not JSON ({reason})")

    at = behind_space(0)
    is_array = text.startswith("[", at)
    if is_array:
        at = behind_space(at + 1)
    while text[at : at + 1] != ("]" if is_array else ""):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as wrong:
            raise error(wrong.msg, wrong.pos) from wrong
        except (ValueError, RecursionError) as wrong:
            raise error(str(wrong), at) from wrong
        yield at, end, value
        at = behind_space(end)
        if is_array and not text.startswith("]", at):
            if not text.startswith(",", at):
                raise error("',' or ']' is missing", at)
            at = behind_space(at + 1)
            if text.startswith("]", at):
                raise error("there is nothing behind ','", at)
    if is_array and (at := behind_space(at + 1)) < len(text):
        raise error("there is more behind the end of the array", at)


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
