"""Where documents come from: files, Hugging Face data sets, the embedded corpus. All are read as streams.

What a source matches and does not read is counted with the reason; only blank lines of JSON lines files are skipped
silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlra_scale.config.text_tasks import HUGGING_FACE
from mlra_scale.data import DataError
from mlra_scale.data.corpus_python import PYTHON_DOCS, PythonCorpus
from mlra_scale.data.files import BEYOND, NotRead, file_counts, find_files, identity
from mlra_scale.data.hub import unreachable_hub
from mlra_scale.data.readers import Document, checked_text, documents_of_file, missing_field


class Source(Protocol):
    """A stream of documents; `total_bytes` is the sum of their `consumed`, None if it is not known before."""

    name: str
    kind: str
    total_bytes: int | None

    def documents(self) -> Iterator[Document]:
        """Yields the documents from the beginning, in the same order every time."""

    def files(self) -> dict[str, Any] | None:
        """Returns the `file_counts` of the last pass; None if the source does not know its files."""


def open_sources(names: Sequence[str], field: str, hf_split: str, hf_config: str | None) -> list[Source]:
    """Finds out what the named sources are.

    Args:
        names: "python-docs", "hf:NAME", or files, folders and globs.
        field: Field or column that holds the text (JSON lines, .parquet, Hugging Face).
        hf_split: Split of Hugging Face data sets, such as "train" or "train[:10%]".
        hf_config: Configuration of Hugging Face data sets.

    Raises:
        DataError: A name stands for nothing, or one file is named twice.
    """
    if len({name.rstrip("/") for name in names}) < len(names):
        raise DataError("a source is named twice")
    sources: list[Source] = []
    for name in names:
        if name == PYTHON_DOCS:
            sources.append(PythonCorpus())
        elif name.startswith(HUGGING_FACE):
            sources.append(HuggingFace(name, field, hf_split, hf_config))
        else:
            sources.append(LocalFiles(name, field))
    folders = {source: source.folder.resolve() for source in sources if isinstance(source, HuggingFace)}
    owner: dict[tuple[int, int], str] = {}
    for local in (source for source in sources if isinstance(source, LocalFiles)):
        for file in local.paths:
            others = [owner.setdefault(identity(file), local.name)]
            others += [one.spec for one, folder in folders.items() if file.resolve().is_relative_to(folder)]
            if twice := [other for other in others if other != local.name]:
                raise DataError(f"{file} belongs to two sources, {twice[0]} and {local.name}; name it once")
    return sources


class LocalFiles:
    """Documents of local files of mixed kinds: what a path, folder or glob matches."""

    kind = "files"

    def __init__(self, name: str, field: str) -> None:
        self.name, self._field = name, field
        self.paths, self.not_read = find_files(name)
        self._num_read, self._without_documents = 0, list[str]()
        try:
            self.total_bytes: int | None = sum(file.stat().st_size for file in self.paths)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    def documents(self) -> Iterator[Document]:
        """Yields the documents file by file."""
        self._num_read, self._without_documents = 0, []
        for path in self.paths:
            self._num_read += 1
            document = None
            for document in documents_of_file(path, self._field):
                yield document
            if document is None:
                self._without_documents.append(str(path))

    def files(self) -> dict[str, Any]:
        """Returns what became of the files in the last pass."""
        beyond = (NotRead(str(path), BEYOND) for path in self.paths[self._num_read :])
        return file_counts(self._num_read, self._without_documents, [*self.not_read, *beyond])


class HuggingFace:
    """A data set of the hub, "hf:NAME" or "hf:NAME@REVISION" (or a local folder, "hf:FOLDER"), streamed."""

    kind = "hugging-face"

    def __init__(self, spec: str, field: str, split: str, config: str | None) -> None:
        self.spec, self.folder = spec, Path(spec.removeprefix(HUGGING_FACE))
        self.name = f"{spec} (config {config}, split {split})" if config else f"{spec} (split {split})"
        self.total_bytes: int | None = None
        self._field, self._split, self._config = field, split, config
        self._files: dict[str, Any] | None = None

    def documents(self) -> Iterator[Document]:
        """Yields the documents in the order of the data set."""
        for row, example in enumerate(self._examples(), 1):
            if self._field not in example:
                raise DataError(missing_field(f"{self.name}, row {row}", self._field, example))
            text = checked_text(example[self._field], f"{self.name}, row {row}", self._field)
            yield Document(text, len(text))

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
        # The library raises errors of many kinds, of its own and of its network stack; to the user each means that
        # this data set cannot be read. Errors of our consumer do not pass through here.
        try:
            if self.folder.is_dir():
                builder = datasets.load_dataset_builder(path, self._config)
                self._files = _files_of_split(self.folder, (builder.config.data_files or {}).get(self._split))
            options = {"split": self._split, "revision": revision or None, "streaming": True}
            stream = iter(datasets.load_dataset(path, self._config, **options))
            while (example := next(stream, None)) is not None:
                yield example
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"Hugging Face data set {self.name} cannot be read: {reason}") from error

    def files(self) -> dict[str, Any] | None:
        """Returns what became of a local folder's files (with --max-bytes some may be unread); None for the hub."""
        return self._files


def _files_of_split(folder: Path, split: Sequence[str] | None) -> dict[str, Any] | None:
    """Compares the files of a folder, hidden ones apart, with those that the library takes for a split."""
    if split is None:
        return None
    # A file in an archive is written file://INSIDE::ARCHIVE.
    taken = {Path(str(name).split("::")[-1]).resolve() for name in split}
    present = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    reason = "not in this split as the datasets library sees the folder"
    not_read = [NotRead(str(path), reason) for path in present if path.resolve() not in taken]
    return file_counts(len(present) - len(not_read), (), not_read)
