"""One epoch of a Megatron GPTDataset, as a list of samples that depends on the data and the sequence length only.

Megatron's GPTDataset packs documents, in an order shuffled by its random seed, into samples of sequence_length + 1
tokens that overlap by one token. With num_samples=None it builds exactly one epoch: no repetition, no separate last
epoch, so the document order and the sample index are pure functions of (documents, sequence_length, random seed).
The seed is a constant here: the packing belongs to the data, and the order in which samples are read is ours
(permutation.py), keyed by (seed, epoch). Megatron's third index, a shuffle of the samples, is not used.

Where the indices live. Megatron lets rank 0 write them to a cache and makes the others wait in a barrier; that needs
torch.distributed, a writable folder and one caller. Here every process builds small ones in memory (a few
milliseconds). Large ones are built once under a file lock in a cache folder beside the data, renamed into place and
memory-mapped by everybody (index_cache.py); where the folder cannot be written, they are built in memory as well.
Whichever way, the result is the same and no process depends on another.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.blocks import CheckedFile
from mlra_scale.data.index_cache import cached_indices
from mlra_scale.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, Split

_PACKING_SEED = 0
_FORMAT = 1
# Documents + samples from which the indices (12 bytes each and more while they are built) go to the cache folder.
CACHE_FROM = 4_000_000


@dataclass(frozen=True)
class SequenceRange:
    """The sequences [first, stop) of an indexed data set: one split of it.

    Attributes:
        prefix: Path of the .bin and .idx files without suffix.
        first: First sequence.
        stop: One past the last sequence.
        num_tokens: Tokens in the range.
        index_sha256: SHA-256 of the .idx file (names the cache).
        cache: Folder for large indices.
        table: Hashes of the blocks of the .bin file (blocks.py); None: there are none.
    """

    prefix: str
    first: int
    stop: int
    num_tokens: int
    index_sha256: str
    cache: Path
    table: Path | None = None

    def num_samples(self, sequence_length: int) -> int:
        """Returns how many whole samples one epoch has (each needs one token more than its length)."""
        return max(0, self.num_tokens - 1) // sequence_length


class _NoTokenizer:
    """Stands where GPTDatasetConfig wants a tokenizer: nothing is tokenized and nothing is padded here."""

    vocab_size = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 (Megatron reads it from the instance)
    pad = -1
    eod = -2


class OneEpoch(GPTDataset):
    """One epoch of packed samples of a range of sequences.

    Args:
        data_range: Which sequences; must hold at least one whole sample.
        sequence_length: Tokens per sample, without the extra one for the targets.
        cache_from: Documents + samples from which the indices are kept in the cache folder.
    """

    def __init__(self, data_range: SequenceRange, sequence_length: int, cache_from: int = CACHE_FROM) -> None:
        # GPTDataset would count epochs for ever on a range without tokens.
        assert data_range.num_samples(sequence_length) >= 1, "an epoch needs at least one whole sample"
        self._range = data_range
        self._num_samples = data_range.num_samples(sequence_length)
        self._cache_from = cache_from
        config = GPTDatasetConfig(
            random_seed=_PACKING_SEED,
            sequence_length=sequence_length,
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        # Without a blend the configuration counts as a mock, which for GPTDataset means one thing only: indices are
        # built in memory by every process, whether or not torch.distributed runs.
        assert config.mock and config.path_to_cache is None
        indexed = IndexedDataset(data_range.prefix)
        sequences = np.arange(data_range.first, data_range.stop, dtype=np.int32)
        super().__init__(indexed, data_range.prefix, sequences, None, Split.train, config)
        del self.indices  # 4 bytes per document that nobody reads any more
        dtype = np.dtype(indexed.index.dtype)
        count = os.path.getsize(data_range.prefix + ".bin") // dtype.itemsize
        self._tokens = np.asarray(np.memmap(data_range.prefix + ".bin", dtype=dtype, mode="r", shape=(count,)))
        self._checked = None
        if data_range.table is not None:
            self._checked = CheckedFile(Path(data_range.prefix + ".bin"), data_range.table)

    def __len__(self) -> int:
        return self._num_samples

    def token_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Reads samples, all at once: no Python per sample, document or token.

        Args:
            rows: Sample indices in [0, len(self)), shape [B].

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
        places = np.repeat(begins[:, 0] - first_piece, pieces_per_row) + np.arange(last_piece[-1] + 1)
        sequences = self.document_index[places]
        starts = self.dataset.index.sequence_pointers[sequences] // self._tokens.itemsize
        lengths = self.dataset.sequence_lengths[sequences].astype(np.int64)
        # A sample ends one token into the next one (offset + 1) and starts at an offset of its first document.
        lengths[last_piece] = ends[:, 1] + 1
        starts[first_piece] += begins[:, 1]
        lengths[first_piece] -= begins[:, 1]
        if self._checked is not None:
            self._checked.check(starts * self._tokens.itemsize, (starts + lengths) * self._tokens.itemsize)
        before = np.cumsum(lengths) - lengths
        places_of_tokens = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
        width = self.config.sequence_length + 1
        return self._tokens[places_of_tokens].astype(np.int64).reshape(len(rows), width)

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        """Replaces GPTDataset's: builds or loads the two indices; the samples keep their order."""
        num_documents = self._range.stop - self._range.first
        indices, data_range = None, self._range
        if num_documents + self._num_samples >= self._cache_from:
            place = f"{data_range.first} {data_range.stop} {self.config.sequence_length}"
            identity = f"{_FORMAT} {data_range.index_sha256} {place}"
            indices = cached_indices(data_range.cache, identity, self._built_indices)
        document_index, sample_index = indices or self._built_indices()
        assert document_index.shape == (num_documents,) and sample_index.shape == (self._num_samples + 1, 2)
        return document_index, sample_index, range(self._num_samples)

    def _built_indices(self) -> tuple[NDArray, NDArray]:
        logger = logging.getLogger("megatron.core.datasets.gpt_dataset")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns that the indices are not saved, which is meant
        try:
            document_index, sample_index, _ = super()._build_document_sample_shuffle_indices()
        finally:
            logger.setLevel(level)
        return document_index, sample_index
