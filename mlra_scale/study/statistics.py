"""Paired differences with Student's t, Holm's adjustment and learning-rate sensitivity, in numpy alone.

Student 1908, Biometrika 6(1); Holm 1979, Scand. J. Statist. 6(2); Wortsman et al. 2023, arXiv 2309.14322.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Coverage of every interval."""

Numbers = Sequence[float] | npt.NDArray[np.float64]


def _share_within(theta: float, dof: int) -> float:
    """Returns P(|T| < t) for t = sqrt(dof) tan(theta): a finite sum (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    cosine, term, total = math.cos(theta), 1.0, 0.0
    if dof % 2 == 0:
        for index in range(dof // 2):
            total += term
            term *= cosine * cosine * (2 * index + 1) / (2 * index + 2)
        return math.sin(theta) * total
    term = cosine
    for index in range((dof - 1) // 2):
        total += term
        term *= cosine * cosine * (2 * index + 2) / (2 * index + 3)
    return 2.0 / math.pi * (theta + math.sin(theta) * total)


def t_two_sided(t: float, dof: int) -> float:
    """Returns the two-sided p-value of Student's t.

    Args:
        t: The statistic; infinity gives 0.
        dof: Degrees of freedom, from 1 on.

    Returns:
        P(|T| >= |t|), exact to about 1e-15 absolutely.
    """
    return max(0.0, 1.0 - _share_within(math.atan2(abs(t), math.sqrt(dof)), dof))


def t_quantile(dof: int, level: float = LEVEL) -> float:
    """Returns t such that P(|T| < t) is the level.

    Args:
        dof: Degrees of freedom, from 1 on.
        level: The two-sided coverage, in (0, 1).

    Returns:
        The quantile, such as 12.706 for 1 degree of freedom and 0.95.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, dof) < level else (low, middle)
    return math.sqrt(dof) * math.tan(low)


@dataclass(frozen=True)
class Mean:
    """A mean over independent units (seeds, runs) with what the units say about its error.

    Attributes:
        n: Number of units.
        value: The mean; nan without units.
        error: Standard error: sample standard deviation (ddof 1) / sqrt(n); nan for n < 2.
        low: Lower end of the t-based interval of coverage LEVEL; nan for n < 2.
        high: Its upper end.
        p: Two-sided p-value of Student's t against 0; nan for n < 2, and where the units do not differ at all.
    """

    n: int
    value: float
    error: float
    low: float
    high: float
    p: float

    @property
    def has_spread(self) -> bool:
        """Whether the units differ by more than rounding: without, nothing is known about the error."""
        return self.n > 1 and self.error > 1e-12 * abs(self.value)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.has_spread and (self.low > 0.0 or self.high < 0.0)


def mean_of(values: Numbers) -> Mean:
    """Returns mean, standard error, t interval and p-value of independent finite values.

    Of differences within pairs it is the paired t-test: what the two of a pair share (seed, data, place on the axes)
    has gone out of them.
    """
    array = np.asarray(values, dtype=np.float64)
    n, nan = array.size, math.nan
    if n == 0:
        return Mean(0, nan, nan, nan, nan, nan)
    value = float(array.mean())
    if n == 1:
        return Mean(1, value, nan, nan, nan, nan)
    error = float(array.std(ddof=1)) / math.sqrt(n)
    half = t_quantile(n - 1) * error
    mean = Mean(n, value, error, value - half, value + half, nan)
    if not mean.has_spread:
        return mean
    return Mean(n, value, error, mean.low, mean.high, t_two_sided(value / error, n - 1))


def holm(p_values: Numbers) -> list[float]:
    """Adjusts p-values for their number by Holm's step-down method.

    With m values in rising order, the k-th (from 0) becomes the largest of (m - j) p_j over j <= k, at most 1. Naming
    the differences whose adjusted value is below a has a chance of at most a of naming any wrongly, however the
    comparisons depend on each other.

    Args:
        p_values: One per comparison.

    Returns:
        The adjusted values in the order given.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    factors = np.arange(values.size, 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order])) if values.size else values
    return [float(value) for value in adjusted]


def learning_rate_sensitivity(losses: Numbers, initial_losses: Numbers) -> float:
    """Returns how much of the loss is lost, on average, by not knowing the best learning rate.

    The mean over the learning rates of min(loss, loss at initialization) - best loss (Wortsman et al. 2023).

    Args:
        losses: The final loss per learning rate, these evenly spaced in their logarithm; nan where the run diverged,
            which counts as the loss at initialization.
        initial_losses: The loss at initialization of the same runs.

    Returns:
        The sensitivity in the unit of the loss, at least 0; nan if no run ended below its initial loss, of which the
        formula would make 0, the value of a model that every learning rate suits.
    """
    initial = np.asarray(initial_losses, dtype=np.float64)
    ended = np.asarray(losses, dtype=np.float64)
    capped = np.minimum(np.where(np.isfinite(ended), ended, initial), initial)
    if capped.size == 0 or not (capped < initial).any():
        return math.nan
    return float((capped - capped.min()).mean())


def num_shallow(num_blocks: int) -> int:
    """Returns how many blocks are called shallow: the first quarter, at least one."""
    return max(1, num_blocks // 4)
