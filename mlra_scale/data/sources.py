"""Where documents come from: files, Hugging Face data sets, the embedded corpus. All are read as streams.

What a source matches and does not read is counted with the reason; only blank lines of JSON lines files are skipped
silently.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from mlra_scale.config.json_text import printable
from mlra_scale.config.text_tasks import HUGGING_FACE
from mlra_scale.data import DataError
from mlra_scale.data.corpus_python import PYTHON_DOCS, PythonCorpus
from mlra_scale.data.files import BEYOND, NotRead, file_counts, find_files, identity
from mlra_scale.data.hub import unreachable_hub
from mlra_scale.data.manifest import sha256_of_lines
from mlra_scale.data.readers import Portion, Texts, checked_text, missing_field, portions_of_file
from mlra_scale.data.tally import Place, Tally

_ROWS = 256
"""Rows of a Hugging Face data set in a portion."""


@dataclass(frozen=True)
class SourceName:
    """A source as the user names it.

    Attributes:
        name: "python-docs", "hf:NAME", or a file, folder or glob.
        field: Field or column that holds the text (JSON, .parquet, Hugging Face).
        split: Split of a Hugging Face data set, such as "train" or "train[:10%]".
        config: Configuration of a Hugging Face data set.
    """

    name: str
    field: str = "text"
    split: str = "train"
    config: str | None = None


class Source(Protocol):
    """A stream of documents in portions; `total_bytes` is the sum of their `consumed`, None if it is not known before.

    `state` is a hash that tells whether the source is what it was, as far as that can be seen without reading it.
    """

    name: str
    kind: str
    total_bytes: int | None
    state: str

    def portions(self, after: Place | None = None) -> Iterator[tuple[Place, Portion]]:
        """Yields the portions from the beginning, or after a place, the same every time; at least one of each unit."""

    def files(self, tally: Tally) -> dict[str, Any] | None:
        """Returns the `file_counts` of a pass; None if the source does not know its files."""


def open_sources(names: Sequence[SourceName]) -> list[Source]:
    """Finds out what the named sources are.

    Raises:
        DataError: A name stands for nothing, or one file is named twice.
    """
    # Several configurations and splits of one data set of the hub are different sources.
    keys = [
        (named.name.rstrip("/"), *((named.split, named.config) if named.name.startswith(HUGGING_FACE) else ()))
        for named in names
    ]
    if len(set(keys)) < len(names):
        raise DataError("a source is named twice")
    sources: list[Source] = []
    for named in names:
        if named.name == PYTHON_DOCS:
            sources.append(PythonCorpus())
        elif named.name.startswith(HUGGING_FACE):
            sources.append(HuggingFace(named))
        else:
            sources.append(LocalFiles(named))
    folders = {source: source.folder.resolve() for source in sources if isinstance(source, HuggingFace)}
    owner: dict[tuple[int, int], str] = {}
    for local in (source for source in sources if isinstance(source, LocalFiles)):
        for file in local.paths:
            others = [owner.setdefault(identity(file), local.name)]
            others += [one.spec for one, folder in folders.items() if file.resolve().is_relative_to(folder)]
            if twice := [other for other in others if other != local.name]:
                raise DataError(f"{file} belongs to two sources, {twice[0]} and {local.name}; name it once")
    return sources


def texts_of(source: Source) -> Iterator[str]:
    """Yields the texts of all documents of a source."""
    for _, portion in source.portions():
        yield from portion.texts()


class LocalFiles:
    """Documents of local files of mixed kinds: what a path, folder or glob matches. A unit is a file."""

    kind = "files"

    def __init__(self, named: SourceName) -> None:
        self.name, self._field = named.name, named.field
        self.paths, self.not_read = find_files(named.name)
        try:
            stats = [path.stat() for path in self.paths]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        self.total_bytes: int | None = sum(stat.st_size for stat in stats)
        self.state = sha256_of_lines(map(_line_of, self.paths, stats))

    def portions(self, after: Place | None = None) -> Iterator[tuple[Place, Portion]]:
        """Yields the portions file by file; files before `after` are not opened."""
        first = Place(0, 0) if after is None else Place(after.unit, after.portion + 1)
        for unit in range(first.unit, len(self.paths)):
            number = -1
            for number, portion in enumerate(portions_of_file(self.paths[unit], self._field)):
                if unit > first.unit or number >= first.portion:
                    yield Place(unit, number), portion
            if number < 0:  # an empty file
                yield Place(unit, 0), Texts((), 0)

    def files(self, tally: Tally) -> dict[str, Any]:
        """Returns what became of the files in a pass."""
        beyond = (NotRead(str(path), BEYOND) for path in self.paths[tally.units :])
        without = [str(self.paths[unit]) for unit in tally.without_documents]
        return file_counts(tally.units, without, [*self.not_read, *beyond])


class HuggingFace:
    """A data set of the hub, "hf:NAME" or "hf:NAME@REVISION", or a local folder, "hf:FOLDER"; streamed, one unit."""

    kind = "hugging-face"

    def __init__(self, named: SourceName) -> None:
        self.spec, self.folder = named.name, Path(named.name.removeprefix(HUGGING_FACE))
        self._field, self._split, self._config = named.field, named.split, named.config
        config = f"config {named.config}, " if named.config else ""
        self.name = f"{self.spec} ({config}split {named.split})"
        self.total_bytes: int | None = None
        files = _visible_files(self.folder)
        self.state = sha256_of_lines([self.name, *(_line_of(path, path.stat()) for path in files)])

    def portions(self, after: Place | None = None) -> Iterator[tuple[Place, Portion]]:
        """Yields the portions in the order of the data set."""
        first = 0 if after is None else after.portion + 1
        examples = islice(enumerate(self._examples(), 1), first * _ROWS, None)
        while texts := [self._text_of(row, example) for row, example in islice(examples, _ROWS)]:
            yield Place(0, first), Texts(texts, sum(map(len, texts)))
            first += 1

    def _text_of(self, row: int, example: dict[str, Any]) -> str:
        where = f"{self.name}, row {row}"
        if self._field not in example:
            raise DataError(missing_field(where, self._field, example))
        return checked_text(example[self._field], where, self._field)

    def _examples(self) -> Iterator[dict[str, Any]]:
        import datasets

        if not self.folder.exists() and (silent := unreachable_hub()):
            raise DataError(
                f"Hugging Face data set {self.name} cannot be read: {silent} does not answer; download it elsewhere "
                "and name its folder or files as the source"
            )
        path, _, revision = self.spec.removeprefix(HUGGING_FACE).partition("@")
        if self.folder.exists():
            path, revision = str(self.folder), ""
        options = {"split": self._split, "revision": revision or None, "streaming": True}
        with self._errors():
            stream = iter(datasets.load_dataset(path, self._config, **options))
            while (example := next(stream, None)) is not None:
                yield example

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        # The library raises errors of many kinds, of its own and of its network stack; to the user each means that
        # this data set cannot be read. Errors of whoever reads the examples do not pass through here.
        try:
            yield
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"Hugging Face data set {self.name} cannot be read: {reason}") from error

    def files(self, tally: Tally) -> dict[str, Any] | None:
        """Returns what became of a local folder's files (with --max-bytes some may be unread); None for the hub."""
        if not self.folder.is_dir():
            return None
        import datasets

        with self._errors():
            builder = datasets.load_dataset_builder(str(self.folder), self._config)
        return _files_of_split(self.folder, (builder.config.data_files or {}).get(self._split))


def _line_of(path: Path, status: os.stat_result) -> str:
    """Returns what changes when a file is written: its name, size and time."""
    return f"{printable(str(path))} {status.st_size} {status.st_mtime_ns}"


def _visible_files(folder: Path) -> list[Path]:
    """Returns the files below a folder but for hidden ones, in order; none for what is no folder."""
    return [
        path
        for path in sorted(folder.rglob("*") if folder.is_dir() else ())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _files_of_split(folder: Path, split: Sequence[str] | None) -> dict[str, Any] | None:
    """Compares the files of a folder, hidden ones apart, with those that the library takes for a split."""
    if split is None:
        return None
    # A file in an archive is written file://INSIDE::ARCHIVE.
    taken = {Path(str(name).split("::")[-1]).resolve() for name in split}
    present = _visible_files(folder)
    reason = "not in this split as the datasets library sees the folder"
    not_read = [NotRead(str(path), reason) for path in present if path.resolve() not in taken]
    return file_counts(len(present) - len(not_read), (), not_read)
