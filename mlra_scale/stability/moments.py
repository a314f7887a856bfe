"""Means and spreads that merge exactly, from any cut of a matrix into pieces.

A set of numbers is stored as (count, mean, M2) in float64, M2 being the sum of squared deviations from the mean; two
sets merge by the formulas of Chan, Golub and LeVeque 1979 ('Updating formulae and a pairwise algorithm for computing
sample variances'). Sums of squares would lose a constant row's exact zero and the small spread of a row with a large
mean.

Legend of shape suffixes: K rows, D columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are converted to float64 this many elements at a time; on a CPU such a chunk stays in the cache.
CPU_CHUNK = 1 << 17
ACCELERATOR_CHUNK = 1 << 24


@dataclass(frozen=True)
class Moments:
    """A set of numbers: how many, their mean, and the sum of squared deviations from it."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, count: float, mean: float, std: float) -> Moments:
        """Returns the moments of a set with this standard deviation."""
        return cls(int(count), float(mean), float(count) * float(std) ** 2)

    @property
    def std(self) -> float:
        """Population standard deviation (ddof 0)."""
        return math.sqrt(self.m2 / self.count) if self.count else math.nan

    def merge(self, other: Moments) -> Moments:
        """Returns the moments of both sets together (Chan et al. 1979, eq. 1.5)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta * delta * (self.count * other.count / count))


def merge_all(sets: Iterable[Moments]) -> Moments:
    """Merges any number of sets in the given order."""
    total = Moments()
    for each in sets:
        total = total.merge(each)
    return total


def row_moments(rows_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and population standard deviation of each row, float64 [K] each.

    A row is shifted by its first element before its mean is taken: the deviations of a constant row are then exactly
    zero, and a large mean costs no digits.
    """
    return _consume_rows(rows_KD.to(torch.float64, copy=True))


def _consume_rows(rows_KD: Tensor) -> tuple[Tensor, Tensor]:
    """row_moments of a float64 copy that may be overwritten."""
    first_K1 = rows_KD[:, :1].clone()
    mean_K1 = rows_KD.sub_(first_K1).mean(dim=1, keepdim=True)
    norm_K = torch.linalg.vector_norm(rows_KD.sub_(mean_K1), dim=1)
    return (first_K1 + mean_K1).squeeze(1), norm_K / math.sqrt(rows_KD.shape[1])


def row_moments_and_column_sums(rows_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `row_moments` of many rows and the sum of each column, float64, converted chunk by chunk."""
    elements = CPU_CHUNK if rows_KD.device.type == "cpu" else ACCELERATOR_CHUNK
    means, stds = [], []
    column_sum_D = torch.zeros(rows_KD.shape[1], dtype=torch.float64, device=rows_KD.device)
    for chunk_KD in rows_KD.split(max(1, elements // rows_KD.shape[1])):
        chunk_KD = chunk_KD.to(torch.float64, copy=True)
        column_sum_D += chunk_KD.sum(dim=0)
        mean_K, std_K = _consume_rows(chunk_KD)
        means.append(mean_K)
        stds.append(std_K)
    return torch.cat(means), torch.cat(stds), column_sum_D


def split_at_rows(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cuts [start, stop) into a head that ends its row, whole rows, and a tail that begins one; skips empty ones."""
    body_start = min(stop, -(-start // width) * width)
    body_stop = max(body_start, stop // width * width)
    for low, high in ((start, body_start), (body_start, body_stop), (body_stop, stop)):
        if low < high:
            yield low, high
