"""Reads the documents of one file: text, JSON lines or parquet.

Every defect of a file is a DataError that names the file and the line or row.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlra_scale.data import DataError
from mlra_scale.data.files import compression_of, kind_of


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        text: The text.
        consumed: Bytes of the source's files that were read since the document before, for the progress bar.
    """

    text: str
    consumed: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def documents_of_file(path: Path, field: str) -> Iterator[Document]:
    """Yields the documents of one file of a known kind; `field` is the field or column of the text (not of .txt)."""
    kind = kind_of(path)
    if kind == ".txt":
        yield Document("".join(characters(path)), path.stat().st_size)
    elif kind == ".parquet":
        yield from _parquet_rows(path, field)
    else:
        yield from _json_lines(path, field)


def characters(path: Path, stretch_bytes: int = 1 << 18) -> Iterator[str]:
    """Yields the text of a .txt file in stretches of about `stretch_bytes` bytes, without a byte order mark."""
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


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    with _opened(path) as (raw, lines):
        position = 0
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text ({error.reason})") from error
            except (ValueError, RecursionError) as error:
                hint = "; every line must hold one JSON object" if kind_of(path) == ".json" else ""
                raise DataError(f"{where}: not JSON ({error}){hint}") from error
            if not isinstance(record, dict):
                hint = "; write every document as an object on a line of its own" if isinstance(record, list) else ""
                raise DataError(f"{where}: a JSON object is wanted, this is {type(record).__name__}{hint}")
            if field not in record:
                raise DataError(missing_field(where, field, record))
            # json.loads keeps the last of equal keys; counting them takes a second pass.
            if text.count(f'"{field}"') > 1:
                keys = [key for key, _ in json.loads(text, object_pairs_hook=list)]
                if keys.count(field) > 1:
                    raise DataError(f"{where}: there are several fields {field!r}; a document has one text")
            before, position = position, raw.tell()
            if lines is raw:  # read ahead, so its own position says nothing of this line
                position = before + len(line)
            yield Document(checked_text(record[field], where, field), position - before)


def _parquet_rows(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise DataError(f"{path} has no column {field!r} (it has: {', '.join(columns)}); choose with --field")
            if columns.count(field) > 1:
                raise DataError(f"{path} has several columns {field!r}; a document has one text")
            share, row = path.stat().st_size / max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in _values(batch.column(0), path, row):
                    row += 1
                    text = checked_text(value, f"{path}, row {row}", field)
                    yield Document(text, int(row * share) - int((row - 1) * share))
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
