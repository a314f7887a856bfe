"""Spike scores: how often a curve jumped, by the two definitions of the field, and when it left for good.

All of it is streaming and goes through a checkpoint, so that a resumed run tells what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


class Window:
    """The last values of a curve, with their mean and spread.

    Both are taken anew over all values at every call: running sums would drift, and those of a resumed run differently.

    Args:
        size: How many values are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values = np.zeros(0)

    def __len__(self) -> int:
        return self._values.size

    def append(self, value: float) -> None:
        """Adds a value; the oldest goes if there is no room."""
        self._values = np.append(self._values, value)[-self._size :]

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return float(self._values.mean())

    @property
    def std(self) -> float:
        """Population standard deviation of the values."""
        return float(self._values.std())

    def state(self) -> list[float]:
        """Returns the values, oldest first."""
        values: list[float] = self._values.tolist()
        return values

    def load(self, values: Iterable[float]) -> None:
        """Replaces the values."""
        self._values = np.array([*values], dtype=np.float64)[-self._size :]


@dataclass(frozen=True)
class SpikeRule:
    """What a spike is.

    Attributes:
        window: So many values before it say what is usual.
        min_window: Nothing is judged before so many are there (a choice of ours: the sources do not say).
        sigmas: It is so many standard deviations away from their mean, or more.
        is_downward_too: Whether a fall counts as well.
        horizon: The score is the share of spikes among so many last values; None: among all.
    """

    window: int
    min_window: int
    sigmas: float
    is_downward_too: bool
    horizon: int | None


OLMO2 = SpikeRule(window=1000, min_window=100, sigmas=7.0, is_downward_too=True, horizon=None)
"""OLMo 2 (arXiv 2501.00656): values at least 7 sigma from the rolling mean of the last 1,000."""
OLMO_CORE = SpikeRule(window=128, min_window=64, sigmas=6.0, is_downward_too=False, horizon=10_000)
"""OLMo-core's stability monitor: values above mean + 6 sigma of the last 128; mean over the last 10,000 steps."""


class SpikeScore:
    """Share of the values of a curve that are spikes.

    Args:
        rule: What a spike is.
    """

    def __init__(self, rule: SpikeRule) -> None:
        self._rule = rule
        self._window = Window(rule.window)
        self._count = 0
        self._spikes: list[int] = []

    def update(self, value: float) -> bool:
        """Takes the next value; returns whether it is a spike.

        One that is not finite is a spike, and no part of what is usual.
        """
        rule, self._count = self._rule, self._count + 1
        is_spike = not math.isfinite(value)
        if not is_spike and len(self._window) >= rule.min_window:
            away = value - self._window.mean
            away = abs(away) if rule.is_downward_too else away
            # A constant window has no spread: what equals its mean is no spike.
            is_spike = away > 0.0 and away >= rule.sigmas * self._window.std
        if math.isfinite(value):
            self._window.append(value)
        if is_spike:
            self._spikes.append(self._count)
        if rule.horizon is not None:
            self._spikes = [place for place in self._spikes if place > self._count - rule.horizon]
        return is_spike

    @property
    def score(self) -> float:
        """Share of spikes, in [0, 1]."""
        length = self._count if self._rule.horizon is None else min(self._count, self._rule.horizon)
        return len(self._spikes) / length if length else 0.0

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        return {"window": self._window.state(), "count": self._count, "spikes": list(self._spikes)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._window.load(state["window"])
        self._count, self._spikes = state["count"], list(state["spikes"])


class SpikeScores:
    """Both scores of the loss and of the gradient norm."""

    def __init__(self) -> None:
        self._scores = {
            f"{curve}_{name}": SpikeScore(rule)
            for curve in ("loss", "gradient")
            for name, rule in (("olmo2", OLMO2), ("olmo_core", OLMO_CORE))
        }

    def update(self, loss: float, gradient_norm: float) -> None:
        """Takes the numbers of the next step."""
        for name, score in self._scores.items():
            score.update(loss if name.startswith("loss") else gradient_norm)

    @property
    def values(self) -> dict[str, float]:
        """All four, as they are recorded."""
        return {name: score.score for name, score in self._scores.items()}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of them."""
        return {name: score.state() for name, score in self._scores.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned; an older checkpoint has none, and they begin anew."""
        for name, score in self._scores.items():
            if name in state:
                score.load(state[name])


class Divergence:
    """Tells when a loss has left for good: the mean of the last steps is far above the lowest such mean.

    Args:
        margin: In nats, how far.
        steps: How many steps the mean is over.
    """

    def __init__(self, margin: float, steps: int) -> None:
        self._margin, self._recent = margin, Window(steps)
        self._steps = steps
        self._lowest = math.inf

    def update(self, loss: float) -> bool:
        """Takes the next loss; returns whether it has diverged. One that is not finite has."""
        if not math.isfinite(loss):
            return True
        self._recent.append(loss)
        if len(self._recent) < self._steps:
            return False
        mean = self._recent.mean
        self._lowest = min(self._lowest, mean)
        return mean > self._lowest + self._margin

    @property
    def is_rising(self) -> bool:
        """Whether the mean is more than a quarter of the margin above the lowest one."""
        return len(self._recent) == self._steps and self._recent.mean > self._lowest + self._margin / 4

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        return {"recent": self._recent.state(), "lowest": self._lowest if math.isfinite(self._lowest) else None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._recent.load(state["recent"])
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]


def time_to_divergence(losses: Iterable[float], margin: float = 1.0, steps: int = 32) -> int | None:
    """Returns the number (from 1) of the first loss at which a run had diverged, or None.

    Args:
        losses: Of every step, in order.
        margin: See Divergence.
        steps: See Divergence.
    """
    watch = Divergence(margin, steps)
    return next((number for number, loss in enumerate(losses, start=1) if watch.update(loss)), None)
