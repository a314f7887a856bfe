"""TEV in the Trainer of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mlra_scale.api.tev import checked_every, log_values, tev
from mlra_scale.stability.tev import TevStatistics
from mlra_scale.stability.watcher import is_due

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class TevCallback(TrainerCallback):
    """Measures TEV before the first step, every few steps and at the last one, and logs it as the Trainer logs a loss.

        trainer.add_callback(TevCallback(trainer, every=100))

    The values are in `state.log_history` and go to everything in `report_to`. All ranks measure together.

    Args:
        trainer: The Trainer that the callback is added to: only it can log.
        every: Number of optimizer steps from one measurement to the next; 0: only the first and the last.
        embedding: See `tev`.
        num_tokens: See `tev`.

    Attributes:
        history: Step and result of each measurement.

    Raises:
        ValueError: `every` is no number of steps.
        TypeError: `trainer` is no Trainer.
    """

    def __init__(
        self, trainer: Trainer, every: int = 100, embedding: str | None = None, num_tokens: int | None = None
    ) -> None:
        self.history: list[tuple[int, TevStatistics]] = []
        if not hasattr(trainer, "log"):
            raise TypeError(f"trainer is {trainer!r}; give the Trainer that the callback is added to")
        self._trainer, self._every = trainer, checked_every(every)
        self._embedding, self._num_tokens = embedding, num_tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._measure(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if is_due(state.global_step, self._every, state.max_steps):
            self._measure(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.history[-1][0] != state.global_step:  # it was stopped early
            self._measure(state, control)

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        statistics = tev(self._trainer.model, embedding=self._embedding, num_tokens=self._num_tokens)
        self.history.append((state.global_step, statistics))
        # Logging clears the Trainer's note that the loss of this step is to be logged as well.
        should_log = control.should_log
        self._trainer.log(log_values(statistics))
        control.should_log = should_log
