"""All ranks agree on a checkpoint that every one of them can read, before any of its content reaches the model.

Rank 0 decides, because ranks on several machines may see a shared file system at different moments. The checksums of
all files are compared by all ranks together, each with a share of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.config import ConfigError, Problem
from mlra_scale.parallel import Topology
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.record import RecordLost
from mlra_scale.training.start.plan import with_layout_of
from mlra_scale.training.start.request import LaunchRequest, ResolvedRun, resolve_run

T = TypeVar("T")


class StartRefused(ConfigError):
    """The run cannot start, because of what rank 0 found; raised on all ranks together."""


def agree_on_checkpoint(request: LaunchRequest, run: ResolvedRun, topology: Topology) -> ResolvedRun:
    """Returns rank 0's resolved run on all ranks, with a checkpoint whose checksums are right; collective.

    With `--resume auto` a damaged checkpoint is replaced by the next one. Each rank keeps the data that it has found.

    Raises:
        StartRefused: There is no good checkpoint; on all ranks.
    """
    excluded: dict[Path, str] = {}
    found_data = run.found_data
    while True:
        run = replace(value_of_rank_0(run, topology), found_data=found_data)
        checkpoint = run.resume.checkpoint
        faults = [] if checkpoint is None else checkpoint_faults(checkpoint, topology)
        if checkpoint is None or not faults:
            return run
        excluded[checkpoint] = "; ".join(faults)
        problems: list[Problem] = []
        if topology.rank == 0:
            try:
                run = resolve_run(_with_present_layout(request, run), excluded)
            except ConfigError as error:
                problems = error.problems
        problems = value_of_rank_0(problems, topology)
        if problems:
            raise StartRefused(problems)


def _with_present_layout(request: LaunchRequest, run: ResolvedRun) -> LaunchRequest:
    """Returns the request with the layout of the process groups, which exist already."""
    if run.layout is None:
        return request
    config, named = with_layout_of(run.config, request.config, request.named)
    return replace(request, config=config, named=named)


def checkpoint_faults(checkpoint: Path, topology: Topology) -> list[str]:
    """Returns what is wrong with a checkpoint, on every rank; each compares the checksums of a share; collective."""
    try:
        faults = Store.open(checkpoint).verify(topology.rank, topology.world_size)
    except CheckpointError as error:
        faults = [str(error)]
    found: list[list[str]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(found, faults, group=topology.control_group)
    return list(dict.fromkeys(fault for of_rank in found for fault in of_rank))


def on_rank_0(work: Callable[[], T], topology: Topology, step: int, exit_code: ExitCode = ExitCode.BAD_INPUT) -> T:
    """Returns on every rank the result of work that rank 0 does, such as writing files; collective.

    Raises:
        TrainingStopped: With `exit_code`, because of a full disk, a damaged file, or one that another program has
            removed; on all ranks, which would otherwise wait for rank 0.
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
    fault, result = value_of_rank_0(done, topology)
    if fault is not None:
        raise TrainingStopped(fault, {"step": step}, exit_code)
    return result


def value_of_rank_0(value: Any, topology: Topology) -> Any:
    """Returns rank 0's value on every rank; collective."""
    packed = [value]
    dist.broadcast_object_list(packed, src=0, group=topology.control_group)
    return packed[0]
