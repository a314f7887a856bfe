"""Passes over data after a step: validation, the activation probe, and `evaluation.tasks`.

A stop request ends them on all ranks alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mlra_scale.config import BatchPlan, Config
from mlra_scale.config.text_tasks import harness_tasks
from mlra_scale.data import Batch, SampleStream
from mlra_scale.stability.activations import ActivationProbe
from mlra_scale.stability.watcher import is_due
from mlra_scale.training.interruption import Interruption
from mlra_scale.training.loop.batches import BadData, Read, read_batches
from mlra_scale.training.watch.text_tasks import TextTasks

if TYPE_CHECKING:
    from mlra_scale.parallel import Engine, Topology


class StopRequested(Exception):
    """Some rank was asked to stop; raised on all ranks at the same point."""


def raise_if_stopped(interruption: Interruption, topology: Topology) -> None:
    """Asks all ranks whether one of them was asked to stop; collective, before every micro-batch of such a pass.

    A GPU first finishes its queue: otherwise the whole pass would be queued before a signal arrives.

    Raises:
        StopRequested: On all ranks alike.
    """
    if topology.device.type == "cuda":
        torch.cuda.current_stream(topology.device).synchronize()
    is_requested = interruption.is_stop_requested()
    if topology.world_size > 1:
        packed = torch.tensor(int(is_requested))
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=topology.control_group)
        is_requested = bool(packed)
    if is_requested:
        raise StopRequested


@dataclass(frozen=True)
class PassResult:
    """Values for the record, and the passes that were left out, because of a stop request or of `bad_data`."""

    values: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    bad_data: BadData | None = None


class DataPasses:
    """Measures validation loss, activations and tasks; every method is collective.

    Args:
        engine: The model.
        config: How often, and on how many samples; what is on is also measured at the last step.
        plan: The batch plan.
        validation: Validation samples; the first of them are the probe batch.
        read: Reads batches on all ranks (Session.read).
        hear_stop: See raise_if_stopped.
        tasks: Of `evaluation.tasks`; measured where a checkpoint follows.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        plan: BatchPlan,
        validation: SampleStream,
        read: Callable[[Read], list[Batch]],
        hear_stop: Callable[[], None],
        tasks: TextTasks,
    ) -> None:
        self._engine, self._config, self._plan, self._validation = engine, config, plan, validation
        self._read, self._hear_stop, self._tasks = read, hear_stop, tasks
        self._probe = ActivationProbe(engine, config.model, config.activations, plan)
        self._probe_batches: list[Batch] | None = None

    def due(self, step: int) -> tuple[str, ...]:
        """Returns the names of the passes that are due after a step, in their order."""
        evaluation, activations = self._config.evaluation, self._config.activations
        last, names = self._config.train.steps, []
        if is_due(step, evaluation.every, last) and (step > 0 or evaluation.every > 0):
            names.append("validation")
        if activations.every > 0 and is_due(step, activations.every, last):
            names.append("activations")
        if self._config.evaluation.tasks and step > 0 and is_due(step, self._config.checkpoint.every, last):
            names.append("tasks")
        return tuple(names)

    def run(self, names: Sequence[str], measuring_seconds: dict[str, float], is_stop: bool = False) -> PassResult:
        """Makes passes until a stop is requested (`is_stop`: it was already) or the data are bad.

        `measuring_seconds` receives the time of the activation probe and of the tasks.
        """
        values: dict[str, Any] = {}
        if is_stop:
            return PassResult(values, tuple(names))
        passes = {
            "validation": self._measure_validation,
            "activations": self._measure_activations,
            "tasks": self._measure_tasks,
        }
        for number, name in enumerate(names):
            try:
                values |= passes[name](measuring_seconds)
            except (StopRequested, BadData) as reason:
                bad_data = reason if isinstance(reason, BadData) else None
                return PassResult(values, tuple(names[number:]), bad_data)
        return PassResult(values)

    def _measure_validation(self, measuring_seconds: dict[str, float]) -> dict[str, Any]:
        """Returns mean validation loss and perplexity for the record; no sample counts twice if there are enough."""
        plan, stream, data_rank = self._plan, self._validation, self._engine.topology.data_rank
        num_batches = min(self._config.evaluation.batches, max(1, stream.samples_per_epoch // plan.global_batch_size))
        total = 0.0
        for index in range(num_batches):
            batches = self._read(partial(read_batches, stream, plan, data_rank, index * plan.global_batch_size))
            total += self._engine.eval_batch(batches, self._hear_stop)
        loss = total / num_batches
        return {"validation_loss": loss, "validation_perplexity": math.exp(loss) if loss < 700.0 else math.inf}

    def _measure_activations(self, measuring_seconds: dict[str, float]) -> dict[str, Any]:
        if self._probe_batches is None:
            size, plan = self._plan.micro_batch_size, self._plan
            firsts = [m * plan.data + self._engine.topology.data_rank for m in range(self._probe.num_micro_batches)]
            self._probe_batches = self._read(lambda: [self._validation.batch(first * size, size) for first in firsts])
        began = time.perf_counter()
        activations = self._probe.measure(self._probe_batches, self._hear_stop)
        measuring_seconds["activations"] = time.perf_counter() - began
        return {"activations": activations}

    def _measure_tasks(self, measuring_seconds: dict[str, float]) -> dict[str, Any]:
        began = time.perf_counter()
        values = self._tasks.measure(bool(harness_tasks(self._config.evaluation.tasks)))
        measuring_seconds["tasks"] = time.perf_counter() - began
        return values
