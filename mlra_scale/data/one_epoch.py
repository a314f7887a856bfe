"""One epoch of samples as Megatron packs them, a function of the data and the sequence length only.

Megatron's GPTDataset shuffles documents by its random seed and packs them into samples of sequence_length + 1 tokens
that overlap by one token. `OneEpoch` does this for exactly one epoch with Megatron's own packing routine and a constant
seed, so that the packing does not depend on the length of a run. The order in which samples are read is keyed by (seed,
epoch) in permutation.py; Megatron's shuffle of the samples is not used. No process depends on another here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.blocks import CheckedFile
from mlra_scale.data.index_cache import cached_indices
from mlra_scale.data.indexed import SequenceRange
from mlra_scale.megatron import build_sample_idx

_PACKING_SEED = 0
_FORMAT = 1
CACHE_FROM = 4_000_000
"""Documents + samples from which the indices (12 bytes each, more while they are built) go to a cache folder beside the
data, from which all processes map them into memory. Building smaller ones at every start takes milliseconds."""


class OneEpoch:
    """One epoch of packed samples of a range of sequences.

    Args:
        data_range: Which sequences; must hold at least one whole sample.
        sequence_length: Tokens per sample, without the extra one for the targets.
        cache_from: See CACHE_FROM.

    Attributes:
        document_index: Sequences in the order of the epoch, int32, shape [documents].
        sample_index: Where each sample begins (position in document_index, offset in tokens), shape [samples + 1, 2].
    """

    def __init__(self, data_range: SequenceRange, sequence_length: int, cache_from: int = CACHE_FROM) -> None:
        num_samples = data_range.num_samples(sequence_length)
        assert num_samples >= 1, "an epoch needs at least one whole sample"
        files, self.sequence_length, self._range = data_range.files, sequence_length, data_range
        self.prefix = files.prefix
        num_documents = data_range.stop - data_range.first
        indices = None
        if num_documents + num_samples >= cache_from:
            identity = f"{_FORMAT} {files.index_sha256} {data_range.first} {data_range.stop} {sequence_length}"
            indices = cached_indices(data_range.cache, identity, self._build_indices)
        self.document_index, self.sample_index = indices or self._build_indices()
        assert self.document_index.shape == (num_documents,) and self.sample_index.shape == (num_samples + 1, 2)
        self._tokens = files.tokens()
        # Checks of its own: what was checked at the start of the run is checked again when it is read.
        self._checked = None if files.table is None else CheckedFile(Path(f"{files.prefix}.bin"), files.table)

    def __len__(self) -> int:
        return len(self.sample_index) - 1

    def token_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Reads the samples `rows`, shape [B], all at once: no Python per sample, document or token.

        Returns:
            Token ids, int64, shape [B, sequence_length + 1].

        Raises:
            DataError: What is read is not what was prepared.
        """
        begins = np.asarray(self.sample_index[rows], dtype=np.int64)
        ends = np.asarray(self.sample_index[rows + 1], dtype=np.int64)
        # The pieces: one per (sample, document) pair, in order.
        pieces_per_row = ends[:, 0] - begins[:, 0] + 1
        last_piece = np.cumsum(pieces_per_row) - 1
        first_piece = last_piece - pieces_per_row + 1
        positions = np.repeat(begins[:, 0] - first_piece, pieces_per_row) + np.arange(last_piece[-1] + 1)
        sequences = self.document_index[positions]
        starts = self._range.files.sequence_pointers[sequences] // self._tokens.itemsize
        lengths = self._range.files.sequence_lengths[sequences].astype(np.int64)
        # A sample ends one token into the next one (offset + 1) and starts at an offset of its first document.
        lengths[last_piece] = ends[:, 1] + 1
        starts[first_piece] += begins[:, 1]
        lengths[first_piece] -= begins[:, 1]
        if self._checked is not None:
            self._checked.check(starts * self._tokens.itemsize, (starts + lengths) * self._tokens.itemsize)
        before = np.cumsum(lengths) - lengths
        offsets = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
        return self._tokens[offsets].astype(np.int64).reshape(len(rows), self.sequence_length + 1)

    def _build_indices(self) -> tuple[NDArray, NDArray]:
        """Builds document and sample index as GPTDataset does for its first epoch."""
        first, stop = self._range.first, self._range.stop
        order = np.arange(stop - first, dtype=np.int32)
        np.random.RandomState(_PACKING_SEED).shuffle(order)
        lengths = np.array(self._range.files.sequence_lengths[first:stop])
        samples = build_sample_idx(lengths, order, self.sequence_length, 1, self._range.num_tokens)
        return order + np.int32(first), samples
