"""What is measured of a run beside its loss, and when: TEV, gradients, activations; and QK-clip, which acts on it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlra_scale.config import BatchPlan, Config
from mlra_scale.data import Batch, SampleStream
from mlra_scale.parallel import Engine, StepResult, Topology, UpdateProposal
from mlra_scale.stability.activations import ActivationProbe
from mlra_scale.stability.gradients import GradientStatistics
from mlra_scale.stability.qk_clip import QkClip
from mlra_scale.stability.tev import TevHook, TevStatistics
from mlra_scale.training.feed import Read


def is_due(step: int, every: int, last: int) -> bool:
    """Returns whether something that happens every so many steps (0: at the end only), and at the end, happens now."""
    return step == last or (every > 0 and step % every == 0)


class Measurements:
    """All of it; every method is collective at the steps at which something is due, and does nothing at others.

    Args:
        engine: The model.
        config: What is wanted, and how often; what is on is measured at the last step too.
        plan: The batch plan.
        validation: The probe batch is its first samples.
        hear_stop: Called on all ranks before every micro-batch of a pass that changes nothing; may raise on all ranks.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        plan: BatchPlan,
        validation: SampleStream,
        hear_stop: Callable[[], None] | None = None,
    ) -> None:
        topology: Topology = engine.topology
        self._engine, self._config, self._last = engine, config, config.train.steps
        self._tev = TevHook(engine.table, topology, config.tev, config.model.vocab_size)
        self._gradients = GradientStatistics(engine, config)
        self._probe = ActivationProbe(engine, config.model, config.activations, plan)
        self._clip = QkClip(engine, config.model, config.qk_clip, plan)
        self._validation, self._plan, self._hear_stop = validation, plan, hear_stop
        self._probe_batches: list[Batch] | None = None
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    @property
    def has_measured(self) -> bool:
        """Whether something was measured since the last call of `costs`."""
        return bool(self._seconds)

    def costs(self) -> dict[str, Any]:
        """Returns what is recorded of this rank's time for the measurements since the last call, in seconds by name.

        The noise scale's contains that of gradient statistics in the same step. On a GPU a measurement may have waited
        for what was queued before it.
        """
        seconds, self._seconds = self._seconds, {}
        return {"measuring_seconds": {name: round(value, 6) for name, value in seconds.items()}} if seconds else {}

    def before_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Begins a step.

        Args:
            step: Its number.
            batches: This data rank's micro-batches.
        """
        with self._timed("gradients"):
            self._gradients.before_step(step, batches, self._hear_stop)

    def before_update(self, proposal: UpdateProposal) -> None:
        """Measures the gradient; inside the engine's gate."""
        with self._timed("gradients"):
            self._gradients.in_gate(proposal)

    def after_update(
        self, step: int, result: StepResult, rate: float, batches: Sequence[Batch], place: int
    ) -> dict[str, Any]:
        """Measures the update and the new weights; returns what is recorded of them.

        Args:
            step: The step.
            result: What the engine reported.
            rate: The learning rate that it was given.
            batches: This data rank's micro-batches.
            place: Index of the step's first sample.
        """
        with self._timed("gradients"):
            values = self._gradients.after_update(result, rate)
        spent = self._seconds.pop("gradients")
        if values:
            self._seconds["noise" if "noise" in values else "gradients"] = spent
        clip = self._config.qk_clip
        if clip.threshold is not None and result.applied and step % clip.every == 0:
            with self._timed("qk_clip"):
                values["qk_clip"] = self._clip.apply(batches, place)
        return values | self.tev(step)

    def tev(self, step: int) -> dict[str, Any]:
        """Measures TEV; returns what is recorded of it."""
        every = self._config.tev.every
        if every == 0 or not is_due(step, every, self._last):
            return {}
        with self._timed("tev"):
            return tev_values(self._tev.measure(self._engine.owned_fragments()))

    def are_activations_due(self, step: int) -> bool:
        """Returns whether activations are measured after a step."""
        every = self._config.activations.every
        return every > 0 and is_due(step, every, self._last)

    def activations(self, step: int, together: Callable[[Read], list[Batch]]) -> dict[str, Any]:
        """Measures activations on the probe batch, which is always the same; returns what is recorded of them.

        Args:
            step: The step before.
            together: Reads on all ranks (feed.on_all_ranks).
        """
        if not self.are_activations_due(step):
            return {}
        if self._probe_batches is None:
            size, plan = self._plan.micro_batch_size, self._plan
            firsts = [m * plan.data + self._engine.topology.data_rank for m in range(self._probe.num_micro_batches)]
            self._probe_batches = together(lambda: [self._validation.batch(first * size, size) for first in firsts])
        with self._timed("activations"):
            return {"activations": self._probe.measure(self._probe_batches, self._hear_stop)}


def tev_values(statistics: TevStatistics) -> dict[str, Any]:
    """Returns what is recorded of a TEV measurement."""
    values: dict[str, Any] = {
        "tev_mean": statistics.mean,
        "tev_std": statistics.std,
        "tev_quantiles": {f"{quantile:g}": value for quantile, value in statistics.quantiles.items()},
        "mean_embedding_norm": statistics.mean_embedding_norm,
        "mean_row_rms": statistics.mean_row_rms,
    }
    if statistics.highest:
        values |= {"tev_highest": statistics.highest, "tev_lowest": statistics.lowest}
    return values
