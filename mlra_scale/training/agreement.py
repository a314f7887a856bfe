"""All ranks agree on a checkpoint that every one of them can read, before any of its content reaches the model.

Rank 0 decides, because ranks on several machines may see a shared file system at different moments. The checksums of
all files are compared by all ranks together, each with a share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.config import ConfigError, Problem
from mlra_scale.parallel import Topology
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import TrainingStopped
from mlra_scale.training.layout import kept_layout
from mlra_scale.training.record import RecordLost
from mlra_scale.training.start import Asked, Start, prepare

T = TypeVar("T")


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
        The start of all ranks, with the data sets that this rank has found.

    Raises:
        StartRefused: There is no good checkpoint; on all ranks.
    """
    excluded: dict[Path, str] = {}
    found = start.found
    while True:
        start = replace(_of_rank_0(start, topology), found=found)
        if start.checkpoint is None:
            return start
        faults = faults_of(start.checkpoint, topology)
        if not faults:
            return start
        excluded[start.checkpoint] = "; ".join(faults)
        problems: list[Problem] = []
        if topology.rank == 0:
            try:
                start = prepare(_as_chosen(asked, start), excluded)
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


def on_rank_0(work: Callable[[], T], topology: Topology, step: int, exit_code: ExitCode = ExitCode.BAD_INPUT) -> T:
    """Lets rank 0 do what only rank 0 does, such as writing files; collective.

    Without this the others would train on, and wait for a rank that has ended.

    Args:
        work: What is to be done.
        topology: The mesh.
        step: Where the run begins or goes on, for the event log.
        exit_code: How the run ends if it cannot be done.

    Returns:
        What the work returned; the same on every rank.

    Raises:
        TrainingStopped: It cannot be done, because of a full disk, a damaged file, or one that another program has
            taken away; on all ranks.
    """
    done: tuple[str | None, Any] = (None, None)
    if topology.rank == 0:
        try:
            done = (None, work())
        except OSError as error:
            name, reason = error.filename2 or error.filename, error.strerror or str(error)
            fault = reason if name is None else f"{name} cannot be written: {reason}"
            done = (f"{fault}; mend that and start again", None)
        except (ValueError, CheckpointError) as error:
            done = (f"{error}; mend that and start again", None)
        except RecordLost as error:
            done = (f"step {step}: {error}. The run stops: what it would write next could not be found", None)
    fault, result = _of_rank_0(done, topology)
    if fault is not None:
        raise TrainingStopped(fault, {"step": step}, exit_code)
    return result


def _as_chosen(asked: Asked, start: Start) -> Asked:
    """Returns what is asked for with the layout of this start, whose process groups exist: it is not chosen again."""
    if start.layout is None:
        return asked
    config, named = kept_layout(asked.config, asked.named, start.config)
    return replace(asked, config=config, named=named)


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
