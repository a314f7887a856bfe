"""Where documents come from: files, Hugging Face data sets, the embedded corpus. All are read as streams.

A document is one text. Whatever is wrong with an input is told with file and line (or row); nothing is skipped
silently except blank lines of .jsonl files.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlra_scale.data.corpus_python import PythonCorpus
from mlra_scale.data.errors import DataError
from mlra_scale.data.hub import unreachable_hub

PYTHON_DOCS = "python-docs"
HUGGING_FACE = "hf:"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        text: The text.
        consumed: Bytes of the source's files that were read since the document before, for the progress bar.
    """

    text: str
    consumed: int


class Source(Protocol):
    """A stream of documents.

    Attributes:
        name: What the user named.
        kind: Kind of source, for the manifest.
        total_bytes: Sum of `consumed` over all documents, or None if it is not known before.
    """

    name: str
    kind: str
    total_bytes: int | None

    def documents(self) -> Iterator[Document]:
        """Yields the documents from the beginning, in the same order every time."""


def open_sources(names: Sequence[str], field: str, hf_split: str, hf_config: str | None) -> list[Source]:
    """Finds out what the named sources are.

    Args:
        names: "python-docs", "hf:NAME", or files, folders and globs.
        field: Field or column that holds the text (.jsonl, .parquet, Hugging Face).
        hf_split: Split of Hugging Face data sets.
        hf_config: Configuration of Hugging Face data sets.

    Returns:
        One source per name, in the order given.

    Raises:
        DataError: A name stands for nothing, or one file is named twice.
    """
    if len(set(names)) < len(names):
        raise DataError("a source is named twice")
    sources: list[Source] = []
    owner: dict[Path, str] = {}
    for name in names:
        if name == PYTHON_DOCS:
            sources.append(PythonDocs())
        elif name.startswith(HUGGING_FACE):
            sources.append(HuggingFace(name, field, hf_split, hf_config))
        else:
            files = find_files(name)
            for file in files:
                other = owner.setdefault(file.resolve(), name)
                if other != name:
                    raise DataError(f"{file} belongs to two sources, {other} and {name}; name it once")
            sources.append(LocalFiles(name, files, field))
    return sources


def find_files(name: str) -> list[Path]:
    """Lists the files that a path, folder or glob stands for.

    Folders are searched recursively for the known kinds; hidden files and folders are passed over.

    Args:
        name: Path of a file or folder, or a glob (with ** for any depth).

    Returns:
        The files in sorted order.

    Raises:
        DataError: There are none, or a file was named whose kind is not known.
    """
    path = Path(name)
    if path.is_file():
        roots, is_explicit = [path], True
    elif path.is_dir():
        roots, is_explicit = [path], False
    else:
        roots, is_explicit = [Path(match) for match in sorted(glob.glob(name, recursive=True))], False
        if not roots:
            raise DataError(
                f"source {name} does not exist; a Hugging Face data set is written {HUGGING_FACE}NAME, "
                f"the embedded corpus {PYTHON_DOCS}"
            )
    kinds = ", ".join(SUFFIXES)
    if is_explicit and not name.endswith(SUFFIXES):
        raise DataError(f"source {name} is of no known kind ({kinds})")
    found: set[Path] = set()
    for root in roots:
        if root.is_dir():
            for folder, subfolders, entries in os.walk(root):
                subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
                found.update(Path(folder, entry) for entry in entries if not entry.startswith("."))
        else:
            found.add(root)
    files = sorted(file for file in found if file.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"source {name} holds no file of a known kind ({kinds})")
    return files


class LocalFiles:
    """Documents of local files of mixed kinds.

    Args:
        name: What the user named.
        files: The files, in reading order.
        field: Field or column of the text.
    """

    kind = "files"

    def __init__(self, name: str, files: Sequence[Path], field: str) -> None:
        self.name = name
        self.files = list(files)
        self._field = field
        try:
            self.total_bytes: int | None = sum(file.stat().st_size for file in files)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    def documents(self) -> Iterator[Document]:
        """Yields the documents file by file."""
        for file in self.files:
            try:
                if file.name.endswith(".txt"):
                    yield _text_file(file)
                elif file.name.endswith(".parquet"):
                    yield from _parquet_rows(file, self._field)
                else:
                    yield from _json_lines(file, self._field)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class PythonDocs:
    """The embedded corpus (mlra_scale.data.corpus_python)."""

    kind = "embedded"

    def __init__(self) -> None:
        self.name = PYTHON_DOCS
        self._corpus = PythonCorpus()
        self.total_bytes: int | None = self._corpus.total_bytes

    def documents(self) -> Iterator[Document]:
        """Yields the documents of the corpus."""
        for text, consumed in self._corpus.documents():
            yield Document(text, consumed)


class HuggingFace:
    """A data set of the Hugging Face hub (or a local folder in its format), streamed: nothing is held whole.

    Args:
        name: "hf:" and the data set's name.
        field: Column of the text.
        split: Split, such as "train" or "train[:10%]".
        config: Configuration name, for data sets that have several.
    """

    kind = "hugging-face"

    def __init__(self, name: str, field: str, split: str, config: str | None) -> None:
        self.total_bytes: int | None = None
        self._field, self._split, self._config = field, split, config
        self.name = f"{name} (config {config}, split {split})" if config else f"{name} (split {split})"
        self._path = name.removeprefix(HUGGING_FACE)

    def documents(self) -> Iterator[Document]:
        """Yields the documents in the order of the data set."""
        for row, example in enumerate(self._examples()):
            if self._field not in example:
                raise DataError(_missing_field(f"{self.name}, row {row + 1}", self._field, example))
            text = _checked_text(example[self._field], f"{self.name}, row {row + 1}", self._field)
            yield Document(text, len(text))

    def _examples(self) -> Iterator[dict[str, Any]]:
        import datasets

        if not Path(self._path).exists() and (silent := unreachable_hub()):
            raise DataError(
                f"Hugging Face data set {self.name} cannot be read: {silent} does not answer; download it elsewhere "
                "and name its folder or files as the source"
            )
        # The library raises errors of many kinds, of its own and of its network stack; to the user each means that
        # this data set cannot be read. Errors of our consumer do not pass through here.
        try:
            stream = iter(datasets.load_dataset(self._path, self._config, split=self._split, streaming=True))
            while (example := next(stream, None)) is not None:
                yield example
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"Hugging Face data set {self.name} cannot be read: {reason}") from error


def _text_file(path: Path) -> Document:
    raw = path.read_bytes()
    try:
        return Document(raw.decode("utf-8"), len(raw))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    with open(path, "rb") as raw:
        lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
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
                raise DataError(f"{where}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: a JSON object is wanted, this is {type(record).__name__}")
            if field not in record:
                raise DataError(_missing_field(where, field, record))
            before, position = position, raw.tell() if lines is not raw else position + len(line)
            yield Document(_checked_text(record[field], where, field), position - before)


def _parquet_rows(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise DataError(f"{path} has no column {field!r} (it has: {', '.join(columns)}); choose with --field")
            share, row = path.stat().st_size / max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    text = _checked_text(value, f"{path}, row {row}", field)
                    yield Document(text, int(row * share) - int((row - 1) * share))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _checked_text(value: Any, where: str, field: str) -> str:
    """Returns the value if it is a text that UTF-8 can write."""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: field {field!r} holds half of a surrogate pair, which is no text") from error
    return value


def _missing_field(where: str, field: str, record: dict[str, Any]) -> str:
    known = ", ".join(sorted(record)) or "none"
    return f"{where}: there is no field {field!r} (fields: {known}); choose with --field"
