"""TEV of a model that a DeepSpeed engine trains in somebody's own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from mlra_scale.api.tev import checked_every, embedding_of, log_values, tev
from mlra_scale.stability.tev import TevStatistics
from mlra_scale.stability.watcher import is_due


class AttachedTev:
    """What `attach_tev` returns.

    Attributes:
        history: Step and result of each measurement; empty on pipeline stages without the embedding.
    """

    def __init__(self, engine: Any, every: int, embedding: str | None, num_tokens: int | None) -> None:
        self.history: list[tuple[int, TevStatistics]] = []
        self._engine, self._every, self._embedding, self._num_tokens = engine, every, embedding, num_tokens
        self._has_embedding = _has_embedding(engine, embedding)
        self._is_attached = True
        # A pipeline engine updates in train_batch and refuses step.
        method = "train_batch" if isinstance(engine, PipelineEngine) else "step"
        setattr(engine, method, self._watched(getattr(engine, method)))

    def measure(self) -> None:
        """Measures now, adds to the history and writes to the monitors of DeepSpeed's configuration; collective."""
        engine = self._engine
        if not self._has_embedding:
            return
        statistics = tev(engine.module, embedding=self._embedding, num_tokens=self._num_tokens)
        self.history.append((engine.global_steps, statistics))
        if engine.monitor.enabled:
            values = log_values(statistics).items()
            engine.monitor.write_events([(f"Train/TEV/{name}", value, engine.global_samples) for name, value in values])

    def detach(self) -> None:
        """Ends the measurements after steps."""
        self._is_attached = False

    def _watched(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def update_then_measure(*args: Any, **kwargs: Any) -> Any:
            before = self._engine.global_steps
            result = update(*args, **kwargs)
            step = self._engine.global_steps
            # With gradient accumulation most calls of engine.step update nothing.
            if self._is_attached and step != before and is_due(step, self._every, last=-1):
                self.measure()
            return result

        return update_then_measure


def attach_tev(
    engine: Any, every: int = 100, embedding: str | None = None, num_tokens: int | None = None
) -> AttachedTev:
    """Measures TEV of a DeepSpeed engine's model now and every few of its steps.

    All data ranks attach, with the same arguments. The engine may be of any ZeRO stage, with or without offload, or a
    pipeline engine, where the stages with the embedding measure. Results also go to the monitors (TensorBoard, wandb,
    csv) of the engine's configuration, as Train/TEV/tev_mean and so on.

    Args:
        engine: What deepspeed.initialize returned.
        every: Number of steps (`engine.global_steps`) from one measurement to the next; 0: only now.
        embedding: See `tev`.
        num_tokens: See `tev`.

    Returns:
        The measurements so far (`history`), with `measure()` for one more and `detach()` to end them.

    Raises:
        ValueError: There is no embedding on any stage, or several; `every` is no number; or `engine` is none.
    """
    if not hasattr(engine, "global_steps"):
        raise ValueError(f"engine is a {type(engine).__name__}; give what deepspeed.initialize returned")
    attached = AttachedTev(engine, checked_every(every), embedding, num_tokens)
    attached.measure()
    return attached


def _has_embedding(engine: Any, embedding: str | None) -> bool:
    try:
        embedding_of(engine.module, embedding)
    except ValueError:
        if isinstance(engine, PipelineEngine) and not engine.is_first_stage():
            return False
        raise
    return True
