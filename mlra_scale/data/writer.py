"""Writes the .bin and .idx of one split in Megatron's format, and the hashes of the .bin file's blocks.

indexed.py describes the format. Megatron's own builder writes the same bytes (tests/unit/data/test_writer.py). It is
not used because it needs torch, keeps every document's length in memory and cannot continue a file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.blocks import BlockHasher, hash_blocks
from mlra_scale.data.indexed import INDEX_HEADER, index_header
from mlra_scale.data.manifest import FileSum
from mlra_scale.files import name_errors

_LARGEST_UINT16_VOCABULARY = 65499
_AT_ONCE = 1 << 20
"""Documents of which the index is written at once: bounds the memory for it."""


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the token type that Megatron chooses for a vocabulary: uint16 if it fits, else int32."""
    return np.dtype(np.uint16 if vocabulary_size <= _LARGEST_UINT16_VOCABULARY else np.int32)


@dataclass(frozen=True)
class Written:
    """What is on disk of a split that is not finished.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, those that end documents included.
        sha256: Of the .bin file up to there.
    """

    documents: int
    tokens: int
    sha256: str


class SplitWriter:
    """Writes documents as an indexed data set at a prefix, one sequence per document.

    Until it is finished the .idx file has no header, so that no reader takes it for one: only the documents' lengths,
    where they belong.

    Args:
        prefix: Path of the files without their suffix.
        dtype: Type of the tokens.
        written: What an earlier writer left on disk, to be continued; what is behind it is cut off.

    Raises:
        ValueError: `written` is not what is on disk.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, written: Written | None = None) -> None:
        self._bin, self._idx, self._blocks = (prefix.with_suffix(suffix) for suffix in (".bin", ".idx", ".blocks"))
        self._dtype = dtype
        self._hasher = BlockHasher()
        self.documents = self.tokens = 0
        if written is not None:
            self._take_up(written)
        mode = "wb" if written is None else "r+b"
        self._tokens, self._index = open(self._bin, mode), open(self._idx, mode)  # noqa: SIM115 (closed by `close`)
        self._tokens.seek(self.tokens * dtype.itemsize)
        self._index.seek(INDEX_HEADER.size + 4 * self.documents)

    def _take_up(self, written: Written) -> None:
        for path, size in (
            (self._bin, written.tokens * self._dtype.itemsize),
            (self._idx, INDEX_HEADER.size + 4 * written.documents),
        ):
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(f"{path} has less than {size} bytes")
            with open(path, "r+b") as stream:
                stream.truncate(size)
        self._hasher = hash_blocks(self._bin)
        lengths = np.fromfile(self._idx, dtype=np.int32, offset=INDEX_HEADER.size)
        if self._hasher.sha256 != written.sha256 or int(lengths.sum(dtype=np.int64)) != written.tokens:
            raise ValueError(f"{self._bin} is not what was written")
        self.documents, self.tokens = written.documents, written.tokens

    def add(self, tokens: NDArray, lengths: NDArray[np.int32]) -> None:
        """Appends documents, their tokens joined and their end-of-document tokens included."""
        content = np.ascontiguousarray(tokens, dtype=self._dtype).data.cast("B")
        with name_errors(self._bin):
            self._tokens.write(content)
        with name_errors(self._idx):
            self._index.write(np.ascontiguousarray(lengths, dtype=np.int32))
        self._hasher.update(content)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def commit(self) -> Written:
        """Waits until all documents so far are on disk; returns what a later writer needs to continue."""
        for stream, path in ((self._tokens, self._bin), (self._index, self._idx)):
            with name_errors(path):
                stream.flush()
                os.fsync(stream.fileno())
        return Written(self.documents, self.tokens, self._hasher.sha256)

    def close(self) -> None:
        """Closes the files without an index, after an error."""
        for stream in (self._tokens, self._index):
            with contextlib.suppress(OSError):  # of a full disk, once more
                stream.close()

    def finish(self) -> dict[str, FileSum]:
        """Writes the index and the table of block hashes; returns size and SHA-256 of the three files, by name."""
        with name_errors(self._bin):
            self._tokens.close()
        with name_errors(self._idx):
            self._index.flush()
            for part in self._pointers_and_borders():
                self._index.write(part)
            self._index.seek(0)
            self._index.write(index_header(self._dtype, self.documents))
            self._index.close()
        self._blocks.write_bytes(self._hasher.table)
        sums = {path.name: FileSum.of(path) for path in (self._idx, self._blocks)}
        return {self._bin.name: FileSum(bytes=self.tokens * self._dtype.itemsize, sha256=self._hasher.sha256)} | sums

    def _pointers_and_borders(self) -> Iterator[NDArray[np.int64]]:
        """Yields the byte offset of every document, then the number of documents before each and before the end."""
        offset = 0
        with open(self._idx, "rb") as stream:
            stream.seek(INDEX_HEADER.size)
            for first in range(0, self.documents, _AT_ONCE):
                lengths = np.fromfile(stream, dtype=np.int32, count=min(_AT_ONCE, self.documents - first))
                ends = offset + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
                yield ends - lengths.astype(np.int64) * self._dtype.itemsize
                offset = int(ends[-1])
        for first in range(0, self.documents + 1, _AT_ONCE):
            yield np.arange(first, min(first + _AT_ONCE, self.documents + 1), dtype=np.int64)
