"""Alarms at a fixed rate of false ones, and how long before the event they sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from docs.studies.predict.events import Numbers
from docs.studies.predict.windows import Run, Windows


@dataclass(frozen=True)
class Alarms:
    """What alarms on one signal are worth.

    Attributes:
        judged: Events with a window that could be judged.
        warned: Those with an alarm in one of them.
        lead_times: Steps from the first alarm to the event, of those.
        false_share: Share of judged negative windows with an alarm, which was to be the fixed rate; None without any.
        chance: Share of controls with an alarm in windows of the same keys, mean over judged events; None without.
    """

    judged: int
    warned: int
    lead_times: tuple[int, ...]
    false_share: float | None
    chance: float | None


def halves(runs: Sequence[Run]) -> NDArray[np.int64]:
    """Returns 0 or 1 for each run: sorted by configuration and seed, alternately."""
    order = sorted(range(len(runs)), key=lambda index: (runs[index].twin, runs[index].seed, runs[index].cell))
    result: NDArray[np.int64] = np.empty(len(runs), np.int64)
    result[order] = np.arange(len(runs)) % 2
    return result


def sound(windows: Windows, values: Numbers, keys: NDArray[np.int64], half: NDArray[np.int64], rate: float) -> Numbers:
    """Says in which windows an alarm sounds, by thresholds from the other half of the runs.

    A window is judged by its distance from the mean of its key's negative windows in that half. Those of the half
    itself are centred by each other, without their own run: with few runs to a key, a mean that they are part of would
    come too close to them, and the threshold with it.

    Args:
        windows: The windows.
        values: [W], the signal; nan is not judged.
        keys: [W], of the comparison.
        half: 0 or 1 for each run.
        rate: Share of negative windows in which an alarm may sound.

    Returns:
        [W]: 1 alarm, 0 none, nan not judged.
    """
    alarms = np.full(len(values), np.nan)
    of_run_and_key = np.unique(keys * len(half) + windows.run, return_inverse=True)[1]
    for training in (0, 1):
        is_learned = (half[windows.run] == training) & ~windows.is_positive & ~np.isnan(values)
        sums, numbers = _totals(keys, is_learned, values)
        own_sums, own_numbers = _totals(of_run_and_key, is_learned, values)
        sums, numbers = sums - own_sums, numbers - own_numbers
        distances = values - np.divide(sums, numbers, out=np.full(len(values), np.nan), where=numbers > 0)
        # What is left of equal values is the rounding of their mean.
        distances[np.abs(distances) < 1e-12 * np.abs(values)] = 0.0
        known = distances[is_learned & ~np.isnan(distances)]
        if len(known):
            is_judged = (half[windows.run] != training) & ~np.isnan(distances)
            alarms[is_judged] = distances[is_judged] > np.quantile(known, 1.0 - rate)
    return alarms


def _totals(groups: NDArray[np.int64], is_counted: NDArray[np.bool_], values: Numbers) -> tuple[Numbers, Numbers]:
    """Returns, for each window, the sum and the number of the counted values of its group."""
    sums: Numbers = np.bincount(groups, weights=np.where(is_counted, values, 0.0)).astype(np.float64)
    numbers: Numbers = np.bincount(groups, weights=is_counted).astype(np.float64)
    return sums[groups], numbers[groups]


def summarize(runs: Sequence[Run], windows: Windows, keys: NDArray[np.int64], alarms: Numbers) -> Alarms:
    """Counts what the alarms are worth.

    Args:
        runs: The runs.
        windows: The windows.
        keys: [W], of the comparison.
        alarms: [W], from `sound`.
    """
    is_judged = ~np.isnan(alarms)
    lead_times, chances = [], []
    judged = np.unique(windows.run[windows.is_positive & is_judged])
    for index in judged.tolist():
        mine = (windows.run == index) & windows.is_positive & is_judged
        event = runs[index].event
        assert event is not None
        if (alarms[mine] == 1).any():
            lead_times.append(event.step - int(windows.step[mine & (alarms == 1)].min()))
        others = np.isin(keys, keys[mine]) & ~windows.is_positive & is_judged & (windows.run != index)
        controls = np.unique(windows.run[others])
        if len(controls):
            sounded = np.unique(windows.run[others & (alarms == 1)])
            chances.append(len(sounded) / len(controls))
    negative = alarms[~windows.is_positive & is_judged]
    return Alarms(
        judged=len(judged),
        warned=len(lead_times),
        lead_times=tuple(sorted(lead_times)),
        false_share=float(negative.mean()) if len(negative) else None,
        chance=float(np.mean(chances)) if chances else None,
    )
