"""Writes the .bin and .idx of one split through Megatron's own builder."""

from __future__ import annotations

import array
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.indexed import sha256_of_file
from mlra_scale.megatron import DType, IndexedDatasetBuilder


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the token type that Megatron chooses for a vocabulary: uint16 if it fits, else int32."""
    return np.dtype(DType.optimal_dtype(vocabulary_size))


class SplitWriter:
    """Writes documents as an indexed data set, one sequence per document.

    Args:
        prefix: Path of the files without suffix.
        dtype: Type of the tokens.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._bin, self._idx = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
        self._dtype = dtype
        self._builder = IndexedDatasetBuilder(str(self._bin), dtype=dtype.type)
        # The builder keeps one Python integer per document in two lists; arrays hold the same in a fifth of the memory.
        self._builder.sequence_lengths = array.array("i")
        self._builder.document_indices = array.array("q", [0])
        self._digest = hashlib.sha256()
        self.documents = 0
        self.tokens = 0

    def add(self, tokens: NDArray) -> None:
        """Appends one document, its end-of-document token included."""
        self._builder.add_document(tokens, [len(tokens)])
        self._digest.update(tokens.tobytes())
        self.documents += 1
        self.tokens += len(tokens)

    def close(self) -> None:
        """Closes the .bin file without an index, after an error."""
        self._builder.data_file.close()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Writes the index.

        Returns:
            Size and SHA-256 of the two files, by name.
        """
        self._builder.finalize(str(self._idx))
        return {
            self._bin.name: {"bytes": self.tokens * self._dtype.itemsize, "sha256": self._digest.hexdigest()},
            self._idx.name: {"bytes": self._idx.stat().st_size, "sha256": sha256_of_file(self._idx)},
        }
