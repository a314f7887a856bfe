"""ROC areas over comparable windows, with intervals from runs drawn anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from docs.studies.predict.events import Numbers

_CHUNK = 200
"""So many resamples are worked on at once."""
_MINIMUM_UNITS = 3
"""Fewer runs with an event, or fewer controls, give no interval."""


@dataclass(frozen=True)
class Field:
    """Which windows are compared with which, and the runs that they belong to.

    Attributes:
        positive: [P], indices of the positive windows that have a window to compare with.
        negative: [N], indices of the negative windows that some positive one is compared with.
        is_pair: [P, N], whether these two are.
        positive_unit: [P], the run of each, numbered from 0 among the units.
        negative_unit: [N], likewise.
        num_units: Number U of units.
    """

    positive: NDArray[np.int64]
    negative: NDArray[np.int64]
    is_pair: NDArray[np.bool_]
    positive_unit: NDArray[np.int64]
    negative_unit: NDArray[np.int64]
    num_units: int

    @property
    def event_units(self) -> NDArray[np.int64]:
        """The units with an event."""
        return np.unique(self.positive_unit)

    @property
    def control_units(self) -> NDArray[np.int64]:
        """The units that others are compared with; those with a later event are among them."""
        return np.unique(self.negative_unit)


def comparable(keys: NDArray[np.int64], is_positive: NDArray[np.bool_], units: NDArray[np.int64]) -> Field:
    """Pairs each positive window with the negative ones of its key that are of another unit.

    Args:
        keys: [W].
        is_positive: [W].
        units: [W], what is drawn as a whole by the bootstrap: the run.

    Returns:
        The pairs; windows without any are left out.
    """
    positive, negative = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
    is_pair = (keys[positive][:, None] == keys[negative][None, :]) & (
        units[positive][:, None] != units[negative][None, :]
    )
    rows, columns = is_pair.any(axis=1), is_pair.any(axis=0)
    positive, negative = positive[rows], negative[columns]
    used, numbers = np.unique(units[np.concatenate([positive, negative])], return_inverse=True)
    return Field(
        positive,
        negative,
        is_pair[np.ix_(rows, columns)],
        numbers[: len(positive)],
        numbers[len(positive) :],
        len(used),
    )


def roc_areas(field: Field, values: Numbers, counts: Numbers) -> Numbers:
    """Returns the area under the ROC curve of a signal, for each way of counting the units.

    A positive window's placement is the share of its pairs in which its value is the higher one (ties: half).
    Placements are averaged over the windows of a unit, then over units.

    Args:
        field: The pairs.
        values: [W], of all windows; nan takes a window out.
        counts: [B, U], how often each unit counts.

    Returns:
        [B]; nan where nothing can be compared.
    """
    high, low = values[field.positive][:, None], values[field.negative][None, :]
    is_known = field.is_pair & ~np.isnan(high) & ~np.isnan(low)
    wins = np.where(is_known, (high > low) + 0.5 * (high == low), 0.0)
    members = (field.positive_unit[:, None] == field.event_units[None, :]).astype(np.float64)
    areas = []
    for first in range(0, len(counts), _CHUNK):
        chunk = counts[first : first + _CHUNK]
        weights = chunk[:, field.negative_unit]
        totals, won = weights @ is_known.T.astype(np.float64), weights @ wins.T
        is_placed = totals > 0
        placements = np.divide(won, totals, out=np.zeros_like(won), where=is_placed)
        windows = is_placed.astype(np.float64) @ members
        means = np.divide(placements @ members, windows, out=np.zeros_like(windows), where=windows > 0)
        events = chunk[:, field.event_units] * (windows > 0)
        total = events.sum(axis=1)
        area = np.full(len(chunk), np.nan)
        areas.append(np.divide((events * means).sum(axis=1), total, out=area, where=total > 0))
    return np.concatenate(areas) if areas else np.empty(0)


def roc_area(field: Field, values: Numbers) -> float:
    """Returns the area with every unit counted once; nan where nothing can be compared."""
    return float(roc_areas(field, values, np.ones((1, field.num_units)))[0])


def resampled_counts(field: Field, resamples: int, seed: int) -> Numbers:
    """Returns how often each unit was drawn in each resample.

    Units with an event and units without are drawn with replacement, each among themselves, so that every resample has
    as many of both.

    Args:
        field: The pairs.
        resamples: Number B of resamples.
        seed: Of the draw.

    Returns:
        [B, U]; [0, U] where there are too few units for an interval.
    """
    if len(field.event_units) < _MINIMUM_UNITS or len(field.control_units) < _MINIMUM_UNITS:
        return np.empty((0, field.num_units))
    generator = np.random.default_rng(seed)
    counts = np.zeros((resamples, field.num_units))
    others = np.setdiff1d(np.arange(field.num_units), field.event_units)
    for group in (field.event_units, others):
        if len(group):
            counts[:, group] = generator.multinomial(len(group), np.full(len(group), 1.0 / len(group)), size=resamples)
    return counts


def interval(resampled: Numbers, coverage: float) -> tuple[float, float] | None:
    """Returns the percentile interval of resampled values; None without any."""
    known = resampled[~np.isnan(resampled)]
    if len(known) == 0:
        return None
    low, high = np.quantile(known, [(1.0 - coverage) / 2.0, (1.0 + coverage) / 2.0])
    return float(low), float(high)
