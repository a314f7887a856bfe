"""Batches in a stateless order: the tokens of sample i are a pure function of (data, mixes, seed, i).

Shape letters: B samples of the batch, S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlra_scale.data import DataError
from mlra_scale.data.mix import SampleOrder
from mlra_scale.data.one_epoch import OneEpoch
from mlra_scale.data.permutation import permute


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as the model takes them: CPU tensors of int64.

    Attributes:
        tokens_BS: Input tokens.
        targets_BS: The token after each input token.
        positions_BS: Position of each token: in the sample, or in its document where the configuration resets them.
        documents_BS: Number of the document inside the sample, from 0; the end-of-document token belongs to the
            document that it ends. All zero where the data's end-of-document token is not known.
        sample_ids_B: Global index of each sample.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    positions_BS: Tensor
    documents_BS: Tensor
    sample_ids_B: Tensor

    def pinned(self) -> Batch:
        """Returns the batch in page-locked memory, from which a GPU copies while it computes."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


class SampleStream:
    """An endless sequence of samples over one data set or a blend of several.

    A training stream (seed given) runs each data set through its epochs, every epoch in an order of its own
    (permutation.py). A validation stream (seed None) has one fixed order and starts over after samples_per_epoch.

    Args:
        epochs: One epoch of every data set of the order's last mix; those that have left the mix are not read any more.
        order: Which data set every sample comes from.
        seed: Seed of the order; None: unshuffled.
        vocabulary_size: Ids from here on are an error in the data.
        end_of_document_token: The token that ends documents; None: unknown.
        reset_positions: Whether positions start at 0 with every document.
    """

    def __init__(
        self,
        epochs: Sequence[OneEpoch],
        order: SampleOrder,
        seed: int | None,
        vocabulary_size: int,
        end_of_document_token: int | None = None,
        reset_positions: bool = False,
    ) -> None:
        assert epochs and len(epochs) == len(order.current)
        self._order = order
        self._epochs = dict(zip(order.current, epochs, strict=True))
        self._sizes = np.zeros(order.num_data_sets, dtype=np.int64)
        self._sizes[order.current] = [len(epoch) for epoch in epochs]
        self._seed = seed
        self._vocabulary_size = vocabulary_size
        self._end_of_document_token = end_of_document_token
        self._reset_positions = reset_positions
        self.sequence_length = epochs[0].sequence_length

    @property
    def samples_per_epoch(self) -> int:
        """Number of different samples: the sum over the data sets, each of which has epochs of its own."""
        return int(self._sizes.sum())

    def locate(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns, for global sample indices of shape [n], the data set and the sample of that data set's epoch."""
        if self._seed is None:
            sample_ids = sample_ids % self.samples_per_epoch
        data_sets, local = self._order.locate(sample_ids)
        assert self._sizes[data_sets].all(), "samples of a data set that has left the mix"
        epochs, rows = np.divmod(local, self._sizes[data_sets])
        if self._seed is None:
            return data_sets, rows
        for data_set in np.unique(data_sets):
            mine, size = data_sets == data_set, int(self._sizes[data_set])
            rows[mine] = permute(rows[mine], size, self._seed, epochs[mine], stream=int(data_set))
        return data_sets, rows

    def batch(self, first_sample: int, count: int) -> Batch:
        """Reads samples first_sample ... first_sample + count - 1 of the endless order.

        Raises:
            DataError: The data hold a token that the model does not have, or are not what was prepared.
        """
        assert first_sample >= 0 and count >= 1
        sample_ids = np.arange(first_sample, first_sample + count, dtype=np.int64)
        data_sets, rows = self.locate(sample_ids)
        text = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for data_set in np.unique(data_sets):
            mine = data_sets == data_set
            text[mine] = self._epochs[int(data_set)].token_rows(rows[mine])
        if text.max() >= self._vocabulary_size or text.min() < 0:
            bad = int(np.argmax(((text >= self._vocabulary_size) | (text < 0)).any(axis=1)))
            raise DataError(
                f"{self._epochs[int(data_sets[bad])].prefix}.bin holds a token outside the model's vocabulary "
                f"(ids {text[bad].min()} to {text[bad].max()} in sample {sample_ids[bad]}, "
                f"model.vocab_size {self._vocabulary_size}); mend the data set or set model.vocab_size to its "
                "tokenizer's size"
            )
        documents, positions = self._documents_and_positions(text[:, :-1])
        return Batch(
            tokens_BS=torch.from_numpy(np.ascontiguousarray(text[:, :-1])),
            targets_BS=torch.from_numpy(np.ascontiguousarray(text[:, 1:])),
            positions_BS=torch.from_numpy(positions),
            documents_BS=torch.from_numpy(documents),
            sample_ids_B=torch.from_numpy(sample_ids),
        )

    def _documents_and_positions(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(tokens), 1))
        if self._end_of_document_token is None:
            return np.zeros_like(positions), positions
        # A document starts after every end-of-document token, and at the first token of the sample.
        is_start = np.zeros(tokens.shape, dtype=bool)
        is_start[:, 1:] = tokens[:, :-1] == self._end_of_document_token
        documents = np.cumsum(is_start, axis=1, dtype=np.int64)
        if self._reset_positions:
            positions -= np.maximum.accumulate(np.where(is_start, positions, 0), axis=1)
        return documents, positions
