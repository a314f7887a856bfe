"""Spike scores: how often a curve jumps, by the two published definitions, and when a loss has diverged.

All of it is streaming, and its state is stored in checkpoints, so a resumed run reports what an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlra_scale.stability.watcher import Step, Watcher

if TYPE_CHECKING:
    from mlra_scale.parallel import StepResult


class Window:
    """The last `size` values of a curve, with their mean and spread.

    Both are computed from all values at every call: running sums drift, and those of a resumed run drift differently.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values = np.zeros(0)

    def __len__(self) -> int:
        return self._values.size

    def append(self, value: float) -> None:
        """Adds a value, in the place of the oldest one if the window is full."""
        self._values = np.append(self._values, value)[-self._size :]

    @property
    def mean(self) -> float:
        return float(self._values.mean())

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return float(self._values.std())

    def state(self) -> list[float]:
        """Returns the values, oldest first."""
        values: list[float] = self._values.tolist()
        return values

    def load_state(self, values: Iterable[float]) -> None:
        """Replaces the values."""
        self._values = np.array([*values], dtype=np.float64)[-self._size :]


@dataclass(frozen=True)
class SpikeRule:
    """The definition of a spike.

    Attributes:
        window: Number of preceding values that it is compared with.
        min_window: With fewer preceding values nothing is a spike (a choice of ours: the sources do not say).
        sigmas: It is at least this many standard deviations away from their mean.
        is_downward_too: Whether a fall counts as well.
        horizon: The score is the share of spikes among this many last values; None: among all.
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
    """Share of the values of a curve that are spikes."""

    def __init__(self, rule: SpikeRule) -> None:
        self._rule = rule
        self._window = Window(rule.window)
        self._count = 0
        self._spikes: list[int] = []

    def update(self, value: float) -> bool:
        """Adds a value; returns whether it is a spike. A value that is not finite is one, and is not remembered."""
        rule, self._count = self._rule, self._count + 1
        is_spike = not math.isfinite(value)
        if not is_spike and len(self._window) >= rule.min_window:
            deviation = value - self._window.mean
            deviation = abs(deviation) if rule.is_downward_too else deviation
            # In a constant window the spread is zero, and a value that equals the mean is no spike.
            is_spike = deviation > 0.0 and deviation >= rule.sigmas * self._window.std
        if math.isfinite(value):
            self._window.append(value)
        if is_spike:
            self._spikes.append(self._count)
        if rule.horizon is not None:
            self._spikes = [number for number in self._spikes if number > self._count - rule.horizon]
        return is_spike

    @property
    def score(self) -> float:
        """Share of spikes, in [0, 1]."""
        length = self._count if self._rule.horizon is None else min(self._count, self._rule.horizon)
        return len(self._spikes) / length if length else 0.0

    def state(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {"window": self._window.state(), "count": self._count, "spikes": list(self._spikes)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned."""
        self._window.load_state(state["window"])
        self._count, self._spikes = state["count"], list(state["spikes"])


class SpikeScores(Watcher):
    """Both scores of the loss and of the gradient norm; an fp16 overflow, which is normal, is no spike."""

    name = "spikes"

    def __init__(self) -> None:
        self._scores = {
            f"{curve}_{name}": SpikeScore(rule)
            for curve in ("loss", "gradient")
            for name, rule in (("olmo2", OLMO2), ("olmo_core", OLMO_CORE))
        }

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        if not result.overflow:
            for name, score in self._scores.items():
                score.update(result.loss if name.startswith("loss") else result.gradient_norm)
        if not step.is_logged:
            return {}
        return {"spike_scores": {name: score.score for name, score in self._scores.items()}}

    def state(self) -> dict[str, Any]:
        return {name: score.state() for name, score in self._scores.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, score in self._scores.items():
            if name in state:
                score.load_state(state[name])


class Divergence:
    """Detects that a loss has diverged: its mean over some steps is `margin` nats above the lowest such mean."""

    def __init__(self, margin: float, steps: int) -> None:
        self._margin, self._recent = margin, Window(steps)
        self._steps = steps
        self._lowest = math.inf

    def update(self, loss: float) -> bool:
        """Adds a loss; returns whether it has diverged. One that is not finite has."""
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
        """Returns plain values for JSON."""
        return {"recent": self._recent.state(), "lowest": self._lowest if math.isfinite(self._lowest) else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned."""
        self._recent.load_state(state["recent"])
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
