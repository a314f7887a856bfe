"""TEV in the Trainer of Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mlra_scale.api.tev import checked_every, log_values, tev
from mlra_scale.stability.tev import TevStatistics
from mlra_scale.stability.watcher import is_due


class LightningTevCallback(Callback):
    """Measures TEV before the first step, every few steps and at the end, and gives it to the Trainer's loggers.

        Trainer(callbacks=[LightningTevCallback(every=100)])

    Args:
        every: Number of optimizer steps (`trainer.global_step`) from one measurement to the next; 0: only the first and
            the last.
        embedding: See `tev`.
        num_tokens: See `tev`.

    Attributes:
        history: Step and result of each measurement.

    Raises:
        ValueError: `every` is no number of steps.
    """

    def __init__(self, every: int = 100, embedding: str | None = None, num_tokens: int | None = None) -> None:
        self.history: list[tuple[int, TevStatistics]] = []
        self._every, self._embedding, self._num_tokens = checked_every(every), embedding, num_tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation several batches end at one step.
        if is_due(trainer.global_step, self._every, trainer.max_steps) and not self._is_measured(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_measured(trainer):
            self._measure(trainer, pl_module)

    def _is_measured(self, trainer: Trainer) -> bool:
        return bool(self.history) and self.history[-1][0] == trainer.global_step

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        statistics = tev(pl_module, embedding=self._embedding, num_tokens=self._num_tokens)
        self.history.append((trainer.global_step, statistics))
        for logger in trainer.loggers:
            logger.log_metrics(log_values(statistics), step=trainer.global_step)
