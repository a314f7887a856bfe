"""Writes the .bin and .idx of one split through Megatron's own builder, and the hashes of the .bin file's blocks."""

from __future__ import annotations

import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.blocks import BlockHasher
from mlra_scale.data.manifest import FileSum
from mlra_scale.megatron import DType, IndexedDatasetBuilder


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the token type that Megatron chooses for a vocabulary: uint16 if it fits, else int32."""
    return np.dtype(DType.optimal_dtype(vocabulary_size))


class SplitWriter:
    """Writes documents as an indexed data set at a prefix, one sequence per document."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._bin, self._idx, self._blocks = (prefix.with_suffix(suffix) for suffix in (".bin", ".idx", ".blocks"))
        self._dtype = dtype
        self._builder = IndexedDatasetBuilder(str(self._bin), dtype=dtype.type)
        # The builder keeps one Python integer per document in two lists; arrays hold the same in a fifth of the memory.
        self._builder.sequence_lengths = array.array("i")
        self._builder.document_indices = array.array("q", [0])
        self._hasher = BlockHasher()
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: NDArray) -> None:
        """Appends one document, its end-of-document token included."""
        self._builder.add_document(tokens, [len(tokens)])
        self._hasher.update(tokens.tobytes())
        self.documents += 1
        self.tokens += len(tokens)

    def close(self) -> None:
        """Closes the .bin file without an index, after an error."""
        self._builder.data_file.close()

    def finish(self) -> dict[str, FileSum]:
        """Writes the index and the table of block hashes; returns size and SHA-256 of the three files, by name."""
        self._builder.finalize(str(self._idx))
        self._blocks.write_bytes(self._hasher.table)
        sums = {path.name: FileSum.of(path) for path in (self._idx, self._blocks)}
        return {self._bin.name: FileSum(bytes=self.tokens * self._dtype.itemsize, sha256=self._hasher.sha256)} | sums
