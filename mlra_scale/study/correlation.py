"""Correlations with the errors they deserve: by value or by rank, with groups or a third variable taken out.

Runs are the units: values of one run at neighbouring steps are no independent observations, so that the bootstrap
draws whole runs (Efron 1979, Ann. Statist. 7(1); Field & Welsh 2007, J. R. Statist. Soc. B 69(3): drawing clusters).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlra_scale.study.statistics import LEVEL

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Kind = Literal["Spearman", "Pearson"]
KINDS: tuple[Kind, ...] = ("Spearman", "Pearson")

MIN_UNITS = 5
"""Fewer runs give neither a coefficient worth reading nor a bootstrap."""
RESAMPLES = 1000
_SEED = 20240909


@dataclass(frozen=True)
class Correlation:
    """One coefficient.

    Attributes:
        kind: Spearman or Pearson.
        value: The coefficient; nan where it is undefined (a variable without spread) or the runs are too few.
        low: Lower end of the bootstrap's percentile interval of coverage LEVEL; nan without one.
        high: Its upper end.
        n: Number of observations.
        units: Number of runs that they come from.
    """

    kind: Kind
    value: float
    low: float
    high: float
    n: int
    units: int

    @property
    def is_supported(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0.0 or self.high < 0.0


def ranks(values: Array) -> Array:
    """Returns ranks from 1 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def pearson(x: Array, y: Array) -> float:
    """Returns the correlation of two variables; nan with fewer than 3 values or without spread in one of them."""
    return _coefficient("Pearson", x, y, np.zeros(x.size, dtype=np.int64))


def without_groups(values: Array, groups: Labels) -> Array:
    """Returns values minus the mean of their group: what is left when the group (rate, step) is known."""
    means = np.bincount(groups, weights=values) / np.maximum(1, np.bincount(groups))
    rest = values - means[groups]
    # What is left of a constant is its rounding.
    return np.where(np.abs(rest) > 1e-12 * np.abs(values).max(initial=0.0), rest, 0.0)


def spearman_of_changes(x: Array, y: Array) -> float:
    """Returns Spearman's coefficient of the changes of two series from one place to the next.

    What rises or falls throughout both, as most things do while a model is trained, is in no change.
    """
    return _coefficient("Spearman", _changes(x), _changes(y), np.zeros(max(0, x.size - 1), dtype=np.int64))


def _changes(x: Array) -> Array:
    """Returns what comes after minus what comes before; equal changes are equal, whatever the subtraction rounds to."""
    return np.round(np.diff(x) / max(np.abs(x).max(initial=0.0), np.finfo(np.float64).tiny), 12)


def _coefficient(kind: Kind, x: Array, y: Array, groups: Labels) -> float:
    if x.size < 3:
        return math.nan
    if kind == "Spearman":
        x, y = ranks(x), ranks(y)
    a, b = without_groups(x, groups), without_groups(y, groups)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / norms, -1.0, 1.0)) if norms > 0.0 else math.nan


def correlation(kind: Kind, x: Array, y: Array, units: Labels, groups: Labels | None = None) -> Correlation:
    """Returns a coefficient with an interval over runs.

    Args:
        kind: Pearson, or Spearman: Pearson of the ranks.
        x: Finite values.
        y: As many.
        units: The number of the run that each comes from.
        groups: What is to be held fixed, as the number of a group: the group's mean is taken out of x and y (of their
            ranks). None: nothing.

    Returns:
        The coefficient; without value where there are fewer than MIN_UNITS runs.
    """
    groups = np.zeros(x.size, dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(units == unit) for unit in np.unique(units)]
    if len(members) < MIN_UNITS:
        return Correlation(kind, math.nan, math.nan, math.nan, x.size, len(members))

    def statistic(chosen: Labels) -> float:
        return _coefficient(kind, x[chosen], y[chosen], groups[chosen])

    value = statistic(np.arange(x.size))
    low, high = (math.nan, math.nan) if math.isnan(value) else _interval(statistic, members)
    return Correlation(kind, value, low, high, x.size, len(members))


def _interval(statistic: Callable[[Labels], float], members: list[Labels]) -> tuple[float, float]:
    """Draws runs with replacement, always from the same seed, so that a report comes out the same twice."""
    generator = np.random.default_rng(_SEED)
    drawn = generator.integers(len(members), size=(RESAMPLES, len(members)))
    values = np.array([statistic(np.concatenate([members[unit] for unit in row])) for row in drawn])
    # A draw of one run, many times, has no spread and says nothing.
    values = values[np.isfinite(values)]
    if values.size < RESAMPLES // 2:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
