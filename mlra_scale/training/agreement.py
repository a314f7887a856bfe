"""All ranks agree on a checkpoint that every one of them can read, before any of its content reaches the model.

Rank 0 decides, because ranks on several machines may see a shared file system at different moments. The checksums of
all files are compared by all ranks together, each with a share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.config import ConfigError, Problem
from mlra_scale.parallel import Topology
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import TrainingStopped
from mlra_scale.training.start import Asked, Start, prepare


class StartRefused(Exception):
    """The start cannot be made; raised on all ranks together.

    Attributes:
        problems: What is wrong, found by rank 0.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)


def settle(asked: Asked, start: Start, topology: Topology) -> Start:
    """Agrees on the start, and verifies the checkpoint that it goes on from; collective.

    With `--resume auto` a bad checkpoint gives way to the next one.

    Args:
        asked: What the command line asks for.
        start: What this rank has made of it.
        topology: The mesh.

    Returns:
        The start of all ranks.

    Raises:
        StartRefused: There is no good checkpoint; on all ranks.
    """
    excluded: dict[Path, str] = {}
    while True:
        start = _of_rank_0(start, topology)
        if start.checkpoint is None:
            return start
        faults = faults_of(start.checkpoint, topology)
        if not faults:
            return start
        excluded[start.checkpoint] = "; ".join(faults)
        problems: list[Problem] = []
        if topology.rank == 0:
            try:
                start = prepare(asked, excluded)
            except ConfigError as error:
                problems = error.problems
        problems = _of_rank_0(problems, topology)
        if problems:
            raise StartRefused(problems)


def faults_of(checkpoint: Path, topology: Topology) -> list[str]:
    """Compares the checksums of a checkpoint, each rank those of a share of its files; collective.

    Returns:
        What is wrong with it; the same on every rank.
    """
    return _gathered(_faults(checkpoint, topology), topology)


def on_rank_0(
    work: Callable[[], None], topology: Topology, step: int, exit_code: ExitCode = ExitCode.BAD_INPUT
) -> None:
    """Lets rank 0 do what only rank 0 does, such as writing files; collective.

    Without this the others would train on, and wait for a rank that has ended.

    Args:
        work: What is to be done.
        topology: The mesh.
        step: Where the run begins or goes on, for the event log.
        exit_code: How the run ends if it cannot be done.

    Raises:
        TrainingStopped: It cannot be done, because of a full disk or a damaged file; on all ranks.
    """
    fault: str | None = None
    if topology.rank == 0:
        try:
            work()
        except (OSError, ValueError, CheckpointError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
            fault = f"the run directory cannot be written: {reason}; mend that and start again"
    if (fault := _of_rank_0(fault, topology)) is not None:
        raise TrainingStopped(fault, {"step": step}, exit_code)


def _faults(checkpoint: Path, topology: Topology) -> list[str]:
    """What this rank finds wrong with its share of a checkpoint."""
    try:
        return Store.open(checkpoint).verify(topology.rank, topology.world_size)
    except CheckpointError as error:
        return [str(error)]


def _gathered(faults: list[str], topology: Topology) -> list[str]:
    """All ranks' faults, each one once; the same on every rank."""
    found: list[list[str]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(found, faults, group=topology.control_group)
    return list(dict.fromkeys(fault for of_rank in found for fault in of_rank))


def _of_rank_0(thing: Any, topology: Topology) -> Any:
    """Returns rank 0's object on every rank."""
    packed = [thing]
    dist.broadcast_object_list(packed, src=0, group=topology.control_group)
    return packed[0]
