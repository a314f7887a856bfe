"""Paired differences, correlations over runs, learning-rate sensitivity.

Student 1908, Biometrika 6(1); Holm 1979, Scand. J. Statist. 6(2); Efron 1979, Ann. Statist. 7(1); Field & Welsh 2007,
J. R. Statist. Soc. B 69(3); Wortsman et al. 2023, arXiv 2309.14322.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95
"""Coverage of every interval."""
MIN_RUNS = 5
"""With fewer runs no correlation is computed."""
RESAMPLES = 1000
_SEED = 20240909

Numbers = Sequence[float] | npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Kind = Literal["Spearman", "Pearson"]
KINDS: tuple[Kind, ...] = ("Spearman", "Pearson")


@dataclass(frozen=True)
class Mean:
    """A mean over independent units (seeds, runs) with its error; what too few units do not give is nan.

    Attributes:
        n: Number of units.
        value: The mean.
        error: Standard error: sample standard deviation (ddof 1) / sqrt(n).
        low, high: The interval of Student's t with coverage LEVEL.
        p: Two-sided p-value of Student's t against 0; nan without spread too.
    """

    n: int
    value: float
    error: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan

    @property
    def has_spread(self) -> bool:
        """Whether the units differ by more than rounding; without spread the error is unknown."""
        return self.n > 1 and self.error > 1e-12 * abs(self.value)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.has_spread and (self.low > 0.0 or self.high < 0.0)


def mean_of(values: Numbers) -> Mean:
    """Returns mean, standard error, t interval and p-value of finite values of independent units.

    Applied to differences within pairs it is the paired t-test.
    """
    array = np.asarray(values, dtype=np.float64)
    n, value = array.size, float(array.mean()) if array.size else math.nan
    if n < 2:
        return Mean(n, value)
    error = float(stats.sem(array))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    mean = Mean(n, value, error, value - half, value + half)
    if not mean.has_spread:
        return mean
    return Mean(n, value, error, mean.low, mean.high, 2 * float(stats.t.sf(abs(value) / error, n - 1)))


def holm(p_values: Numbers) -> list[float]:
    """Returns p-values adjusted for their number by Holm's step-down method, in the order given.

    Of m sorted values, the k-th (from 0) becomes the largest of (m - j) p_j over j <= k, at most 1. Claiming the
    differences whose adjusted value is below a has a probability of at most a of any false claim.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.arange(values.size, 0, -1) * values[order]))
    return adjusted.tolist()


def learning_rate_sensitivity(losses: Numbers, initial_losses: Numbers) -> float:
    """Returns the mean over learning rates of min(loss, loss at initialization) - best loss (Wortsman et al. 2023).

    Args:
        losses: The final loss per learning rate, these evenly spaced in their logarithm; nan: the run diverged.
        initial_losses: The loss at initialization of the same runs.

    Returns:
        The sensitivity in the unit of the loss, at least 0; nan if no run ended below its initial loss: the formula
        would give 0 there, the value of a model that trains equally well at every rate.
    """
    initial, final = (np.asarray(values, dtype=np.float64) for values in (initial_losses, losses))
    capped = np.minimum(np.where(np.isfinite(final), final, initial), initial)
    return float((capped - capped.min()).mean()) if (capped < initial).any() else math.nan


@dataclass(frozen=True)
class Correlation:
    """One coefficient of n observations from a number of runs.

    Attributes:
        value: The coefficient; nan if a variable has no spread or there are fewer than MIN_RUNS runs.
        low, high: The percentile bootstrap interval of coverage LEVEL; nan without one.
    """

    kind: Kind
    n: int
    runs: int
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def is_supported(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0.0 or self.high < 0.0


def correlation(kind: Kind, x: Numbers, y: Numbers, runs: Labels, groups: Labels | None = None) -> Correlation:
    """Returns a coefficient with a bootstrap interval that resamples whole runs.

    Values of one run at neighbouring steps are not independent observations; runs are.

    Args:
        kind: Pearson, or Spearman: Pearson of the ranks.
        x: Finite values.
        y: As many.
        runs: The number of the run of each observation.
        groups: What is held fixed, as the number of a group: its mean is subtracted from x and y (from their ranks).
    """
    x, y = np.asarray(x), np.asarray(y)
    groups = np.zeros(x.size, dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(runs == run) for run in np.unique(runs)]
    if len(members) < MIN_RUNS:
        return Correlation(kind, x.size, len(members))

    def statistic(drawn: Labels) -> float:
        chosen = np.concatenate([members[run] for run in drawn])
        return coefficient(kind, x[chosen], y[chosen], groups[chosen])

    everything = np.arange(len(members))
    if math.isnan(value := statistic(everything)):
        return Correlation(kind, x.size, len(members))
    low, high = _bootstrap_interval(statistic, everything)
    return Correlation(kind, x.size, len(members), value, low, high)


def _bootstrap_interval(statistic: object, units: Labels) -> tuple[float, float]:
    """Returns the percentile interval; the seed is fixed, so that two reports of one sweep are equal."""
    with warnings.catch_warnings():
        # A resample of one run only has no spread and gives nan; scipy's own interval would then be nan too.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (units,), statistic, n_resamples=RESAMPLES, vectorized=False, method="percentile", rng=_SEED
        )
    values = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
    if values.size < RESAMPLES // 2:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def coefficient(kind: Kind, x: Numbers, y: Numbers, groups: Labels | None = None) -> float:
    """Returns a correlation with the means of groups subtracted; nan with fewer than 3 values or without spread."""
    if len(x) < 3:
        return math.nan
    groups = np.zeros(len(x), dtype=np.int64) if groups is None else groups
    values = np.array([x, y], dtype=np.float64)
    ranked = stats.rankdata(values, axis=1) if kind == "Spearman" else values
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.corrcoef([without_groups(row, groups) for row in ranked])[0, 1])


def without_groups(values: npt.NDArray[np.float64], groups: Labels) -> npt.NDArray[np.float64]:
    """Returns values minus the mean of their group; 0 where only rounding is left."""
    rest = values - (np.bincount(groups, weights=values) / np.maximum(1, np.bincount(groups)))[groups]
    return np.where(np.abs(rest) > 1e-12 * np.abs(values).max(initial=0.0), rest, 0.0)


def spearman_of_changes(x: Numbers, y: Numbers) -> float:
    """Returns Spearman's coefficient of the changes of two series: a trend that both share is not in it."""
    return coefficient("Spearman", _changes(np.asarray(x)), _changes(np.asarray(y)))


def _changes(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the differences of neighbours, rounded so that equal changes are equal."""
    return np.round(np.diff(x) / max(np.abs(x).max(initial=0.0), np.finfo(np.float64).tiny), 12)
