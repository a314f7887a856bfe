"""The protocol of everything that watches training steps: checks, the guard, measurements, profilers.

`fit` in training/loop/trainer.py lists the watchers of a run in their order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # importing an engine imports DeepSpeed
    from mlra_scale.parallel import MicroBatch, StepResult, UpdateProposal


def is_due(step: int, every: int, last: int) -> bool:
    """Returns whether a step is the last one or a multiple of `every` (0: only the last one)."""
    return step == last or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        number: Counted from 1.
        is_logged: Whether its loss is recorded.
        first_sample: Global index of its first sample.
        batches: This data rank's micro-batches.
        learning_rate: Of its update.
        started: time.perf_counter() before its data were read.
        read_seconds: Time that this rank waited for its data.
        measuring_seconds: Time of each measurement on this rank; on a GPU with the wait for what was queued before.
    """

    number: int
    is_logged: bool
    first_sample: int
    batches: Sequence[MicroBatch] = ()
    learning_rate: float = 0.0
    started: float = 0.0
    read_seconds: float = 0.0
    measuring_seconds: dict[str, float] = field(default_factory=dict)


class Watcher:
    """Watches training steps. A subclass overrides the hooks that it needs; those here do nothing.

    Every hook is called on all ranks, with the same values but for the batches, so it may be collective.

    Attributes:
        name: The key of its state in a checkpoint and of its time in the record; "" where it has neither.
        is_timed: Whether its time is recorded in the steps at which it measures something.
    """

    name: ClassVar[str] = ""
    is_timed: ClassVar[bool] = False

    def before_step(self, step: Step) -> None:
        """Called when the step's data are read, before its forward pass."""

    def before_update(self, proposal: UpdateProposal) -> bool:
        """Called with loss and gradient norm, while the gradients exist; not when fp16 gradients overflow.

        Returns:
            Whether the update may be applied; the same on every rank.
        """
        return True

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        """Called after the update, or after it was left out; returns values for the record of the step."""
        return {}

    def state(self) -> Any:
        """Returns what a checkpoint stores of it, as plain values for JSON; None: it is stateless."""
        return None

    def load_state(self, state: Any) -> None:
        """Continues from what `state` returned."""


class Watchers(Watcher):
    """Calls several watchers in their order, as one."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers
        self._seconds: dict[str, float] = {}

    def before_step(self, step: Step) -> None:
        self._seconds.clear()
        for watcher in self._watchers:
            with self._timed(watcher):
                watcher.before_step(step)

    def before_update(self, proposal: UpdateProposal) -> bool:
        is_approved = True
        for watcher in self._watchers:  # all of them, also after a refusal: each has to see every proposal
            with self._timed(watcher):
                is_approved &= watcher.before_update(proposal)
        return is_approved

    def after_step(self, step: Step, result: StepResult) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for watcher in self._watchers:
            with self._timed(watcher):
                found = watcher.after_step(step, result)
            if watcher.is_timed and found:
                name = "noise" if "noise" in found else watcher.name  # the noise scale takes a pass of its own
                step.measuring_seconds[name] = self._seconds[watcher.name]
            values |= found
        return values

    def state(self) -> dict[str, Any]:
        states = {watcher.name: watcher.state() for watcher in self._watchers}
        return {name: state for name, state in states.items() if state is not None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned; watchers that an older checkpoint does not know stay as they are.

        Raises:
            ValueError: The state of a watcher cannot be read; the message begins with its name.
        """
        for watcher in self._watchers:
            if watcher.name in state:
                try:
                    watcher.load_state(state[watcher.name])
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                    raise ValueError(f"`{watcher.name}` cannot be read ({type(error).__name__}: {error})") from error

    @contextlib.contextmanager
    def _timed(self, watcher: Watcher) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[watcher.name] = self._seconds.get(watcher.name, 0.0) + time.perf_counter() - began
