"""The manifest beside a prepared data set: what it was made of, with which tokenizer, and the sums of its files.

Version 2 has the sums of every file of the folder, tables of block hashes among them (blocks.py), and one of the
manifest itself, so that nothing in the folder changes unseen. Version 1 had the sums of the .bin and .idx files only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlra_scale.config.json_text import printable, read_json
from mlra_scale.data import DataError
from mlra_scale.data.blocks import sha256_of_file
from mlra_scale.data.files import shown_names

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
FORMAT = "mlra-scale-data"
VERSION = 2
_OWN_SUM = "manifest_sha256"
_INDEXED = tuple(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx"))

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Sum = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    """The part of an entry that this package reads; manifests have more."""

    model_config = ConfigDict(strict=True, extra="allow")


class FileSum(_Entry):
    """Size in bytes and SHA-256 of a file."""

    bytes: _Count
    sha256: _Sum

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Reads a file."""
        return cls(bytes=path.stat().st_size, sha256=sha256_of_file(path))


class _Tokenizer(_Entry):
    name: str
    sha256: _Sum
    vocabulary_size: Annotated[int, Field(ge=1, lt=2**31)]
    end_of_document_token: Annotated[int, Field(ge=0, lt=2**31)]
    end_of_document_text: str
    round_trip_is_exact: bool = True


class _SplitSize(_Entry):
    documents: _Count
    tokens: _Count


class _Group(_Entry):
    files: _Count
    names: list[str]


class _Unread(_Group):
    reason: str


class _SourceFiles(_Entry):
    matched: _Count
    read: _Count
    without_documents: _Group
    not_read: list[_Unread]


class _Source(_Entry):
    name: str
    documents: _Count
    empty_documents: _Count | None = None  # this and the next are missing in folders from before they were counted
    files: _SourceFiles | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> _Source:
        if (files := self.files) is not None:
            not_read = sum(group.files for group in files.not_read)
            _check_sum(f"files of source {printable(self.name)}", files.matched, files.read + not_read)
        return self


class Manifest(_Entry):
    """The manifest of a folder made by mlra-scale prepare, the entries that are not read here included.

    Attributes:
        folder: The folder.
        tokenizer: Its `vocabulary_size` is the largest token id + 1.
        files: Size and SHA-256 of every file with a recorded sum, by its name in the folder.
    """

    folder: Path = Field(exclude=True)
    version: int
    recorded_fingerprint: _Sum = Field(alias="fingerprint")
    documents: _Count
    tokens: _Count
    text_bytes: _Count = 0
    dtype: str
    tokenizer: _Tokenizer
    splits: dict[Split, _SplitSize]
    files: dict[str, FileSum]
    sources: list[_Source]
    empty_documents_left_out: _Count
    documents_without_tokens: _Count = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        _check_sum("documents", self.documents, sum(source.documents for source in self.sources))
        empty = [source.empty_documents for source in self.sources]
        if None not in empty:
            _check_sum("empty documents", self.empty_documents_left_out, sum(filter(None, empty)))
        needed = [*_INDEXED, *(f"{split}.blocks" for split in SPLITS if self.version > 1)]
        if missing := [name for name in needed if name not in self.files]:
            raise ValueError(f"{missing[0]} is missing in `files`")
        if foreign := [name for name in self.files if name not in needed and not _is_of_tokenizer(name)]:
            raise ValueError(f"{printable(foreign[0], 60)} is no file of a data set")
        if missing := [split for split in SPLITS if split not in self.splits]:
            raise ValueError(f"{missing[0]} is missing in `splits`")
        if self.tokenizer.end_of_document_token >= self.tokenizer.vocabulary_size:
            raise ValueError("the token that ends documents is outside the vocabulary")
        return self

    @property
    def content(self) -> dict[str, Any]:
        """What manifest.json holds."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / MANIFEST_NAME

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer in Hugging Face format; AutoTokenizer reads it."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that changes training; independent of version and of where the folder lies."""
        return content_fingerprint(self.files, self.tokenizer.sha256, self.tokenizer.end_of_document_token)

    @property
    def fingerprint_of_version_1(self) -> str:
        """The fingerprint of these data in manifests and checkpoints of version 1."""
        return sha256_of_lines([*_file_lines(self.files), self.tokenizer.sha256])

    def blocks(self, split: str) -> Path | None:
        """Returns the table of block hashes of a split's .bin file; None: version 1 has none, and an empty file."""
        return None if self.version == 1 or not self.files[f"{split}.bin"].bytes else self.folder / f"{split}.blocks"


def _check_sum(what: str, whole: int, parts: int) -> None:
    if whole != parts:
        raise ValueError(f"it counts {whole} {what}, their parts {parts}")


def _is_of_tokenizer(name: str) -> bool:
    folder, *inner = name.split("/")
    return folder == TOKENIZER_FOLDER and bool(inner) and not {"", ".", ".."} & set(inner) and "\0" not in name


def content_fingerprint(files: Mapping[str, FileSum], tokenizer_sha256: str, end_of_document_token: int) -> str:
    """Joins to one sum: the checksums of the data files and of the tokenizer, and the token that ends documents."""
    return sha256_of_lines(["version 2", *_file_lines(files), tokenizer_sha256, str(end_of_document_token)])


def _file_lines(files: Mapping[str, FileSum]) -> list[str]:
    return [f"{name} {files[name].bytes} {files[name].sha256}" for name in sorted(_INDEXED)]


def sha256_of_lines(lines: Iterable[str]) -> str:
    """Returns the SHA-256 of lines of text as hexadecimal text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def manifest_text(content: Mapping[str, Any]) -> str:
    """Returns manifest.json with the checksum of its own content."""
    return json.dumps({**content, _OWN_SUM: _own_sum(content)}, indent=2) + "\n"


def _own_sum(content: Mapping[str, Any]) -> str:
    others = {key: value for key, value in content.items() if key != _OWN_SUM}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a prepared folder, of this version or an earlier one, and checks it as a whole.

    Raises:
        DataError: There is none, it is not one of ours, it was changed after it was made, or its entries are not of
            their kind or do not fit each other.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST_NAME}: it was not made, or not finished, by mlra-scale prepare")
    try:
        content = read_json(path)
    except ValueError as error:
        raise DataError(f"{error}; copy it again, or prepare the data again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of mlra-scale prepare")
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise DataError(
            f"{path} has version {printable(repr(version), 60)}; this program reads versions 1 to {VERSION}"
        )
    # Version 1 had no sum of its own; a manifest that has one is checked, whatever its version says.
    if content.get(_OWN_SUM) != _own_sum(content) and not (version == 1 and _OWN_SUM not in content):
        raise DataError(f"{path} was changed after it was made: its checksum differs; copy or prepare the data again")
    try:
        manifest = Manifest.model_validate(content | {"folder": folder})
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(map(str, first["loc"])) or "its entries", 60)
        reason = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{path} lacks or garbles an entry ({where}: {reason}); prepare the data again") from error
    expected = manifest.fingerprint_of_version_1 if version == 1 else manifest.fingerprint
    if manifest.recorded_fingerprint != expected:
        raise DataError(f"{path} was changed by hand: its fingerprint is not that of its files; prepare the data again")
    return manifest


def summary(manifest: Manifest) -> list[str]:
    """Returns the lines that say what was made: documents, tokens, what was read and what was not."""
    tokenizer, size = manifest.tokenizer, manifest.text_bytes / manifest.tokens
    lines = [f"{manifest.folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.dtype}"]
    for name, split in manifest.splits.items():
        lines.append(f"  {name:<11} {split.documents:>12,} documents {split.tokens:>16,} tokens")
    lines.append(
        f"  {'tokenizer':<11} {tokenizer.name}: {tokenizer.vocabulary_size} tokens, documents end with "
        f"{tokenizer.end_of_document_text} = {tokenizer.end_of_document_token}, {size:.2f} bytes per token"
    )
    for source in manifest.sources:
        lines += _lines_of_source(source)
    if manifest.empty_documents_left_out:
        lines.append(f"  left out    {manifest.empty_documents_left_out:,} empty documents")
    if manifest.documents_without_tokens:
        lines.append(
            f"  note        {manifest.documents_without_tokens:,} documents have text of which this tokenizer makes "
            "no token but the end's"
        )
    if not tokenizer.round_trip_is_exact:
        lines.append("  note        this tokenizer changes text: decoding does not give it back exactly")
    return [*lines, f"  fingerprint {manifest.fingerprint}"]


def _lines_of_source(source: _Source) -> list[str]:
    if (files := source.files) is None:  # a data set of the hub, or a manifest from before files were counted
        return []
    lines = []
    if files.matched != 1 or files.not_read:
        lines.append(f"  files       {files.read:,} of {files.matched:,} read of {source.name}")
    for group in files.not_read:
        lines.append(f"  not read    {group.files:,} {group.reason}: {shown_names(group.names, group.files)}")
    if (empty := files.without_documents).files:
        names = shown_names(empty.names, empty.files)
        lines.append(f"  note        {empty.files:,} read without any document: {names}")
    return lines
