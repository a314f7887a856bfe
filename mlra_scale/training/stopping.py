"""Stopping in the middle of what is no training step, on all ranks at the same place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import TrainingStopped
from mlra_scale.training.interruption import Interruption

if TYPE_CHECKING:
    from pathlib import Path

    from mlra_scale.parallel import Topology


class StopHeard(Exception):
    """A signal asked some rank to stop; raised on all ranks at the same place."""


class Stops:
    """Asks all ranks whether one of them was asked to stop.

    Args:
        interruption: Of this process.
        topology: The mesh.
    """

    def __init__(self, interruption: Interruption, topology: Topology) -> None:
        self._interruption, self._topology = interruption, topology

    def hear(self) -> None:
        """Called before every micro-batch of a pass that is no training step; collective.

        A GPU first finishes what it was given: otherwise the whole pass would be queued before a signal comes.

        Raises:
            StopHeard: On all ranks alike.
        """
        if self._topology.device.type == "cuda":
            torch.cuda.current_stream(self._topology.device).synchronize()
        is_asked = self._interruption.is_stop_asked()
        if self._topology.world_size > 1:
            packed = torch.tensor(int(is_asked))
            dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self._topology.control_group)
            is_asked = bool(packed)
        if is_asked:
            raise StopHeard


def stopped_by_signal(step: int, newest: Path | None, begun_from: Path | None = None) -> TrainingStopped:
    """Returns what ends a run on all ranks after one of them was asked to stop.

    Args:
        step: Steps done.
        newest: This run's newest complete checkpoint; None: there is none.
        begun_from: The checkpoint that the run began from.
    """
    if newest is not None:
        where = f"the checkpoint {newest} is complete; continue with --resume auto"
    elif begun_from is not None:
        where = f"there is no checkpoint of this run yet: the same command begins again from {begun_from}"
    else:
        where = "there is no checkpoint yet: --resume auto begins anew"
    moment = f"after step {step}" if step else "before the first step"
    values = {"step": step, "checkpoint": None if newest is None else str(newest)}
    return TrainingStopped(f"{moment}, as a signal asked: {where}", values, ExitCode.PREEMPTED)


def record_lost(step: int, fault: str, newest: Path | None) -> TrainingStopped:
    """Returns what ends a run on all ranks whose record another program has taken away; its checkpoint is saved."""
    message = (
        f"step {step}: {fault}. The run stops, since nobody would find what it records next; the checkpoint "
        f"{newest} is complete. See what became of the file, and continue with --resume auto"
    )
    return TrainingStopped(message, {"step": step, "checkpoint": str(newest)}, ExitCode.CHECKPOINT_FAILED)
