"""What counts as an event of a run: a spike or a divergence of its loss (docs/studies/predict/README.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """The numbers that docs/studies/predict/README.md fixed before any run; their meaning stands there."""

    trailing: int = 32
    minimum_trailing: int = 16
    sigmas: float = 4.0
    spike_nats: float = 0.5
    spike_steps: int = 5
    divergence_nats: float = 1.0
    level_steps: int = 10
    change_steps: int = 20
    stride: int = 5
    gap: int = 5
    horizon: int = 25
    far_horizon: int = 50
    false_alarms: float = 0.05
    resamples: int = 2000
    useful_area: float = 0.7
    minimum_events: int = 10

    @property
    def first_step(self) -> int:
        """The first step that an event with a window before it can have."""
        return self.change_steps + self.gap


@dataclass(frozen=True)
class Event:
    """Where a run lost its stability.

    Attributes:
        kind: spike, divergence (the trailing mean rose) or non-finite.
        step: The first step that shows it, counted from 1.
    """

    kind: str
    step: int


def first_event(losses: Numbers, is_stopped: bool, protocol: Protocol) -> Event | None:
    """Returns the first event of a run, or None.

    Args:
        losses: [T], of the steps 1 to T.
        is_stopped: Whether the step after the last one was not finite.
        protocol: The definitions.
    """
    spike = spike_step(losses, is_stopped, protocol)
    divergence = divergence_step(losses, protocol)
    found = [Event("spike", spike)] if spike is not None else []
    if divergence is not None:
        found.append(Event("divergence", divergence))
    if is_stopped:
        found.append(Event("non-finite", len(losses) + 1))
    return min(found, key=lambda event: event.step, default=None)


def spike_step(losses: Numbers, is_stopped: bool, protocol: Protocol) -> int | None:
    """Returns the first step of the first spike, or None.

    A step is judged by itself and by the median of the next ones, so that one odd batch is no spike; near the end of a
    run that was not stopped more than half of these must be there.

    Args:
        losses: [T], of the steps 1 to T.
        is_stopped: Whether what follows counts as infinitely high.
        protocol: The definitions.
    """
    known = len(losses) if is_stopped else len(losses) - protocol.spike_steps // 2
    followed = np.append(losses, np.full(protocol.spike_steps, np.inf)) if is_stopped else losses
    for index in range(1, known):
        before = losses[max(0, index - protocol.trailing) : index]
        if index < protocol.minimum_trailing:
            usual, limit = losses[0], losses[0] + protocol.spike_nats
        else:
            usual = before.mean()
            limit = usual + max(protocol.sigmas * before.std(), protocol.spike_nats)
        lasting = np.median(followed[index : index + protocol.spike_steps])
        if losses[index] > limit and lasting > usual + protocol.spike_nats:
            return index + 1
    return None


def divergence_step(losses: Numbers, protocol: Protocol) -> int | None:
    """Returns the step at which the first rise of the trailing mean began, or None.

    The rise is seen when the mean of the last `trailing` losses is `divergence_nats` above the lowest such mean before;
    it began after the last loss that was less than `spike_nats` above that lowest mean.

    Args:
        losses: [T], of the steps 1 to T.
        protocol: The definitions.
    """
    if len(losses) <= protocol.trailing:
        return None
    means = np.convolve(losses, np.full(protocol.trailing, 1.0 / protocol.trailing), mode="valid")
    lowest = np.minimum.accumulate(means)
    risen = np.flatnonzero(means > lowest + protocol.divergence_nats)
    if len(risen) == 0:
        return None
    seen = int(risen[0]) + protocol.trailing - 1
    low = np.flatnonzero(losses[:seen] <= lowest[risen[0]] + protocol.spike_nats)
    # The lowest mean has a loss at or below itself, so there is one; index i is step i + 1, and the rise follows it.
    return int(low[-1]) + 2
