"""Which data set of a blend a sample comes from: a fixed pattern, repeated.

The scheme. Time is cut into blocks of 65536 samples. In every block data set p has the same number of slots,
quota_p = weight_p * 65536 rounded by largest remainder (at least one). Its k-th slot has the ideal position
(k + phase_p) / quota_p in the block, and the slots of all data sets are sorted by it; the phases are multiples
of the golden ratio modulo 1, so that data sets with equal weights take turns instead of coming in clusters. Hence

    sample i  ->  slot i mod 65536 of block i // 65536  ->  (p, block * quota_p + rank of the slot among p's slots)

is a pure function of the weights and i: it depends neither on the length of the run nor on the sizes of the data sets,
it takes no memory beyond one block, and any window of w samples holds weight_p * w samples of p to within a few
(tests: never more than 4 for up to 36 data sets). The local index then runs through the data set's own epochs and
their permutations, so a small data set simply repeats more often. Rounding moves a weight by less than 1 / 65536.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16
_GOLDEN_RATIO = 0.6180339887498949


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Splits `total` into whole quotas in proportion to positive weights, each at least one; ties go to the earlier."""
    assert len(weights) <= total
    whole = sum(weights)
    if math.isinf(whole):  # weights near the largest number
        weights = [weight / max(weights) for weight in weights]
        whole = sum(weights)
    exact = [weight / whole * total for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda number: (quotas[number] - exact[number], number))
    for number in by_remainder[: max(0, total - sum(quotas))]:
        quotas[number] += 1
    while sum(quotas) > total:  # tiny weights were raised to one slot: the largest quota pays
        quotas[quotas.index(max(quotas))] -= 1
    return quotas


class BlendPattern:
    """The assignment of samples to the data sets of a blend, from their positive relative weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        quotas = largest_remainder(weights, BLOCK)
        self._quotas = np.array(quotas, dtype=np.int64)
        phases = [(number + 1) * _GOLDEN_RATIO % 1.0 for number in range(len(quotas))]
        ideal = np.concatenate(
            [(np.arange(quota) + phase) / quota for quota, phase in zip(quotas, phases, strict=True)]
        )
        data_set = np.repeat(np.arange(len(quotas)), quotas)
        rank = np.concatenate([np.arange(quota) for quota in quotas])
        # A stable sort: data sets with equal ideal positions follow each other in the order of the blend.
        order = np.argsort(ideal, kind="stable")
        self._data_set_of_slot = data_set[order]
        self._rank_of_slot = rank[order]

    @property
    def proportions(self) -> list[float]:
        """The share of samples of every data set, after rounding to slots."""
        return [float(quota) / BLOCK for quota in self._quotas]

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns, for global sample indices of shape [n], the data set and how many of its samples came before."""
        block, slot = np.divmod(samples, BLOCK)
        data_sets = self._data_set_of_slot[slot]
        return data_sets, block * self._quotas[data_sets] + self._rank_of_slot[slot]

    def count(self, num_samples: int) -> NDArray[np.int64]:
        """Returns how many of the first `num_samples` samples each data set gives, int64 of shape [data sets]."""
        blocks, rest = divmod(num_samples, BLOCK)
        return blocks * self._quotas + np.bincount(self._data_set_of_slot[:rest], minlength=len(self._quotas))
