"""From a checked configuration to a running job: devices, process groups, the loop, and the code it ends with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import EXPENDABLE_SECONDS, Interruption
from mlra_scale.training.layout import Devices, memory_of_node
from mlra_scale.training.quiet import quiet_libraries

if TYPE_CHECKING:
    from mlra_scale.training.overseer import Overseer
    from mlra_scale.training.start import Asked, Start


def resolve_device(config: Config) -> str:
    """Returns `cpu` or `cuda`: what `train.device` says, or what this machine has."""
    if config.train.device != "auto":
        return config.train.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(config: Config) -> list[Problem]:
    """Finds out whether this process has the device it needs."""
    device, local_rank = resolve_device(config), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cpu":
        return []
    num_devices = torch.cuda.device_count()
    if num_devices == 0:
        return [Problem("train.device", config.train.device, "torch sees no GPU here; use train.device=cpu or auto")]
    if local_rank >= num_devices:
        remedy = f"torch sees {num_devices} GPU(s) here and this is local rank {local_rank}; start fewer ranks per node"
        return [Problem("train.device", config.train.device, remedy)]
    # With emulation, the default, torch says yes for every GPU, and DeepSpeed's kernels then fail or crawl.
    if config.train.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        return [Problem("train.precision", "bf16", f"{name} has no bf16; use train.precision=fp16 or fp32")]
    return []


def devices_here(number: int, kind: str, per_node: int | None = None) -> Devices:
    """Returns the devices of a start of which one is this process's, or on its machine.

    Args:
        number: Of all of them.
        kind: "cpu" or "cuda".
        per_node: Of a node; None: as torchrun says.
    """
    if per_node is None and "LOCAL_WORLD_SIZE" in os.environ:
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    if kind == "cpu":
        return Devices(number, per_node, kind, memory=memory_of_node() / (per_node or number))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        return Devices(number, per_node, kind)  # check_device says so
    properties = torch.cuda.get_device_properties(local_rank)
    return Devices(number, per_node, kind, properties.name, float(properties.total_memory))


def check_launcher(environment: Mapping[str, str]) -> list[Problem]:
    """Refuses to be one of many processes of which each would take itself for the only one.

    srun and mpirun start many processes but do not tell them their place in torch's words. An srun that starts one
    torchrun per node is right: torchrun sets RANK.

    Args:
        environment: Of the process.
    """
    if "RANK" in environment:
        return []
    for name, launcher in (("SLURM_NTASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        value = environment.get(name, "1")
        if value.isdecimal() and int(value) > 1:
            remedy = (
                f"{launcher} starts {value} processes, each of which would train by itself, for RANK is not set; start "
                "the processes by torchrun (under srun: one torchrun per node, with --ntasks-per-node=1), and a "
                "single process inside such an allocation by torchrun --nproc_per_node 1"
            )
            return [Problem(name, value, remedy)]
    return []


def check_same_layout(start: Start, place: torch.device) -> None:
    """Makes sure that the planner has chosen the same layout on every rank, each for its own device; collective.

    Raises:
        ConfigError: It has not.
    """
    assert start.layout is not None
    digest = int.from_bytes(hashlib.sha256(repr(start.layout.overrides).encode()).digest()[:7])
    both = torch.tensor([digest, -digest], device=place)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        remedy = "the ranks have devices of different kinds or memory, for which the planner chooses differently; name "
        remedy += "cluster.device and cluster.device_memory_gib, or the fields of the layout"
        raise ConfigError([Problem("parallel.layout", "auto", remedy)])


def run(asked: Asked, start: Start, overseer: Overseer, interruption: Interruption) -> ExitCode:
    """Starts the process groups, trains, and ends them; a default group that is running already is used and left.

    Args:
        asked: What the command line asks for.
        start: What this rank has made of it.
        overseer: Checks the ranks before they train, and is told of progress.
        interruption: Of this process.

    Returns:
        How the run ended; the same on every rank.

    Raises:
        ConfigError: On rank 0, if the checkpoints turned out to be bad; the other ranks return BAD_INPUT.
    """
    device = resolve_device(start.config)
    quiet_libraries(device)
    torch.use_deterministic_algorithms(start.config.train.deterministic)
    # Or every new tensor costs a kernel that fills it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # DeepSpeed chooses its accelerator when it is imported, hence not at the top of this file.
    from mlra_scale.parallel import build_topology, destroy_topology, initialize_distributed
    from mlra_scale.training.agreement import StartRefused, settle
    from mlra_scale.training.finite import TrainingStopped
    from mlra_scale.training.report import report_nothing_to_do
    from mlra_scale.training.trainer import fit

    is_ours = not dist.is_initialized()
    minutes = start.config.parallel.timeout_minutes
    where = "there is no checkpoint" if start.checkpoint is None else f"the checkpoint {start.checkpoint} is as it was"
    interruption.limit(EXPENDABLE_SECONDS, f"stopped before the first step of this start: {where}")
    overseer.beat("connecting", start.progress.step)
    place = initialize_distributed(device, minutes)
    overseer.check(place)
    if start.layout is not None:
        check_same_layout(start, place)
    overseer.beat("preparing", start.progress.step)
    topology = build_topology(start.plan, place, minutes)
    code, problems = ExitCode.DONE, []
    try:
        start = settle(asked, start, topology)
        if not start.is_done:
            fit(start, topology, interruption, overseer)
        elif topology.rank == 0:
            report_nothing_to_do(start)
    except StartRefused as refusal:
        code, problems = ExitCode.BAD_INPUT, refusal.problems
    except TrainingStopped as stop:
        # Printed by rank 0's report.
        code = stop.exit_code
    # A launcher ends all ranks when one ends: none may go before rank 0 has written everything, and from then on each
    # ends by itself, with the code that says why, rather than by a signal.
    dist.barrier()
    interruption.limit(EXPENDABLE_SECONDS, code=code)
    if is_ours:
        destroy_topology(topology)
        dist.destroy_process_group()
    if problems and topology.rank == 0:
        raise ConfigError(problems)
    return code
