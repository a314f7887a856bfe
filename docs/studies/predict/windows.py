"""Runs as series, and the windows that are cut from them: what was known at a step, and what came after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from docs.studies.predict.events import Event, Numbers, Protocol

SERIES = ("tev_mean", "tev_std", "gradient_norm", "shallow_gradient_variance", "largest_logit", "loss")
"""What is measured; the first two are the primary ones."""
BASELINES = ("step", "learning_rate")
SIGNALS = (*SERIES, *(f"{name}_change" for name in SERIES), *BASELINES)
"""All signals of a window: levels, rates of change, baselines."""

Comparison = Literal["pooled", "matched", "twins"]
COMPARISONS: tuple[Comparison, ...] = ("pooled", "matched", "twins")


@dataclass(frozen=True)
class Run:
    """One run, from its first step to its event or its end.

    Attributes:
        cell: Its name in the sweep.
        variant: Its variant in the sweep.
        seed: Its seed.
        shape: Text that is equal for models of the same shape.
        twin: Text that is equal for runs that differ in nothing but the seed.
        rates: [T], the learning rates of the steps 1 to T.
        series: By name of SERIES, [T] each; nan where it was not measured.
        event: Its first event.
    """

    cell: str
    variant: str
    seed: int
    shape: str
    twin: str
    rates: Numbers
    series: dict[str, Numbers]
    event: Event | None

    @property
    def steps(self) -> int:
        """Number of steps that were recorded."""
        return len(self.rates)


@dataclass(frozen=True)
class Windows:
    """Windows of many runs.

    Attributes:
        run: [W], the index of the run.
        step: [W], the last step of which the window knows.
        is_positive: [W], whether an event comes within the stretch, or none comes up to its end.
        signals: By name of SIGNALS, [W] each; nan where nothing was measured.
    """

    run: NDArray[np.int64]
    step: NDArray[np.int64]
    is_positive: NDArray[np.bool_]
    signals: dict[str, Numbers]


def level(values: Numbers, step: int, steps: int) -> float:
    """Returns the mean logarithm of the positive values among the last ones up to a step; nan without any.

    Args:
        values: [T], of the steps 1 to T.
        step: The last step to look at.
        steps: How many.
    """
    logarithms = _logarithms(values[max(0, step - steps) : step])
    known = logarithms[np.isfinite(logarithms)]
    return float(known.mean()) if len(known) else np.nan


def change(values: Numbers, step: int, steps: int) -> float:
    """Returns the least-squares slope per step of the logarithms of the positive values; nan with fewer than three.

    Args:
        values: [T], of the steps 1 to T.
        step: The last step to look at.
        steps: How many.
    """
    logarithms = _logarithms(values[max(0, step - steps) : step])
    known = np.flatnonzero(np.isfinite(logarithms))
    if len(known) < 3:
        return np.nan
    places, heights = known - known.mean(), logarithms[known]
    return float(places @ (heights - heights.mean()) / (places @ places))


def _logarithms(values: Numbers) -> Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(values)


def cut_windows(runs: Sequence[Run], nearest: int, farthest: int, protocol: Protocol) -> Windows:
    """Cuts the windows of all runs whose event, if any, leaves room for one.

    Args:
        runs: The runs.
        nearest: Steps from a positive window to its event, at least.
        farthest: The same, at most; negative windows have no event so far ahead, and their runs were seen so far.
        protocol: Stride and signals.

    Returns:
        The windows, in the order of runs and steps.
    """
    places: list[tuple[int, int, bool]] = []
    for index, run in enumerate(runs):
        for step in range(protocol.change_steps, run.steps + 1, protocol.stride):
            ahead = run.event.step - step if run.event is not None else None
            is_free = step + farthest <= run.steps if ahead is None else ahead > farthest
            if is_free or (ahead is not None and nearest <= ahead):
                places.append((index, step, not is_free))
    signals = {
        name: np.array([_signal(name, runs[run], step, protocol) for run, step, _ in places]) for name in SIGNALS
    }
    columns = list(zip(*places, strict=True)) or [(), (), ()]
    return Windows(np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], bool), signals)


def _signal(name: str, run: Run, step: int, protocol: Protocol) -> float:
    if name == "step":
        return float(step)
    if name == "learning_rate":
        return float(run.rates[step - 1])
    if name.endswith("_change"):
        return change(run.series[name.removesuffix("_change")], step, protocol.change_steps)
    return level(run.series[name], step, protocol.level_steps)


def comparison_keys(runs: Sequence[Run], windows: Windows, comparison: Comparison) -> NDArray[np.int64]:
    """Returns a number for each window; windows are compared where theirs are equal.

    Args:
        runs: The runs that the windows are of.
        windows: The windows.
        comparison: pooled: all with all. matched: the same step, the same learning rate at every step up to it, and
            the same shape. twins: matched, and nothing different but the seed.

    Returns:
        [W], from 0.
    """
    if comparison == "pooled":
        return np.zeros(len(windows.run), np.int64)
    numbers: dict[tuple[int, bytes, str], int] = {}
    keys = []
    for index, step in zip(windows.run.tolist(), windows.step.tolist(), strict=True):
        run = runs[index]
        key = (step, run.rates[:step].tobytes(), run.twin if comparison == "twins" else run.shape)
        keys.append(numbers.setdefault(key, len(numbers)))
    return np.array(keys, np.int64)
