"""From a resolved run to its end: process groups, agreement on the checkpoint, the loop, and the exit code."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from mlra_scale.config import ConfigError, Problem
from mlra_scale.planning.choice import LayoutChoice
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.interruption import EXPENDABLE_SECONDS, Interruption
from mlra_scale.training.log.libraries import silence_libraries
from mlra_scale.training.start.device import resolve_device
from mlra_scale.training.start.request import LaunchRequest, ResolvedRun
from mlra_scale.training.watchdog import Watchdog


def launch(request: LaunchRequest, run: ResolvedRun, watchdog: Watchdog, interruption: Interruption) -> ExitCode:
    """Starts the process groups, trains, and ends them; an existing default group is used and left running.

    Returns:
        How the run ended; the same on every rank.

    Raises:
        ConfigError: On rank 0, if the checkpoints turned out to be bad; the other ranks return BAD_INPUT.
    """
    device_type = resolve_device(run.config)
    silence_libraries(device_type)
    torch.use_deterministic_algorithms(run.config.train.deterministic)
    # Otherwise a kernel fills every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # These import DeepSpeed, which chooses its accelerator when it is imported.
    from mlra_scale.parallel import build_topology, destroy_topology, initialize_distributed
    from mlra_scale.training.log.report import report_nothing_to_do
    from mlra_scale.training.loop.trainer import fit
    from mlra_scale.training.start.agreement import StartRefused, agree_on_checkpoint

    owns_group = not dist.is_initialized()
    minutes, checkpoint = run.config.parallel.timeout_minutes, run.resume.checkpoint
    left = "there is no checkpoint" if checkpoint is None else f"the checkpoint {checkpoint} is as it was"
    interruption.limit(EXPENDABLE_SECONDS, f"stopped before the first step of this start: {left}")
    watchdog.heartbeat("connecting", run.resume.progress.step)
    device = initialize_distributed(device_type, minutes)
    watchdog.check(device)
    if run.layout is not None:
        check_same_layout(run.layout, device)
    watchdog.heartbeat("preparing", run.resume.progress.step)
    topology = build_topology(run.plan, device, minutes)
    code, problems = ExitCode.DONE, []
    try:
        run = agree_on_checkpoint(request, run, topology)
        if not run.is_done:
            fit(run, topology, interruption, watchdog)
        elif topology.rank == 0:
            report_nothing_to_do(run)
    except StartRefused as refusal:
        code, problems = ExitCode.BAD_INPUT, refusal.problems
    except TrainingStopped as stop:  # printed by rank 0's report
        code = stop.exit_code
    # A launcher ends all ranks when one ends: none may end before rank 0 has written everything. From here on each ends
    # by itself, with the exit code that gives the reason, and not by a signal.
    dist.barrier()
    interruption.limit(EXPENDABLE_SECONDS, code=code)
    if owns_group:
        destroy_topology(topology)
        dist.destroy_process_group()
    if problems and topology.rank == 0:
        raise ConfigError(problems)
    return code


def check_same_layout(layout: LayoutChoice, device: torch.device) -> None:
    """Makes sure that the planner chose the same layout on every rank, each for its own device; collective.

    Raises:
        ConfigError: It did not.
    """
    digest = int.from_bytes(hashlib.sha256(repr(layout.overrides).encode()).digest()[:7])
    both = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        remedy = "the ranks have devices of different kinds or memory, for which the planner chooses differently; name "
        remedy += "cluster.device and cluster.device_memory_gib, or the fields of the layout"
        raise ConfigError([Problem("parallel.layout", "auto", remedy)])
