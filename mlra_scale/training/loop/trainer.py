"""The training loop, with one path for both engines, and the process groups in which it runs."""

from __future__ import annotations

import hashlib
from functools import partial

import torch
import torch.distributed as dist

from mlra_scale.config import ConfigError, Problem
from mlra_scale.data import Batch, open_datasets
from mlra_scale.parallel import Topology, build_engine, build_topology, destroy_topology, initialize_distributed
from mlra_scale.planning.choice import LayoutChoice
from mlra_scale.stability.corruption import CorruptionCheck
from mlra_scale.stability.gradients import GradientStatistics
from mlra_scale.stability.guard import Guard
from mlra_scale.stability.qk_clip import QkClip
from mlra_scale.stability.spikes import SpikeScores
from mlra_scale.stability.tev import TevWatcher
from mlra_scale.stability.watcher import Watchers
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.interruption import EXPENDABLE_SECONDS, Interruption, Watchdog
from mlra_scale.training.log.console import suppressed_output
from mlra_scale.training.log.report import Report, report_nothing_to_do
from mlra_scale.training.loop.batches import BadData, Prefetcher, read_batches
from mlra_scale.training.loop.checkpoints import Checkpoints
from mlra_scale.training.loop.session import Session
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.agreement import StartRefused, agree_on_checkpoint
from mlra_scale.training.start.device import resolve_device
from mlra_scale.training.start.request import LaunchRequest, ResolvedRun
from mlra_scale.training.watch.passes import DataPasses, StopRequested, raise_if_stopped
from mlra_scale.training.watch.step_watchers import FiniteCheck, GarbageCollection, StepMetrics, StepProfiler
from mlra_scale.training.watch.text_tasks import TextTasks, seconds_between_signs


def fit(run: ResolvedRun, topology: Topology, interruption: Interruption, watchdog: Watchdog) -> Progress:
    """Trains to `train.steps`; collective.

    Raises:
        TrainingStopped: A loss or gradient norm was not finite, the guard gave up, the data are bad, a checkpoint could
            not be written, or a signal requested a stop; on all ranks on the same step. Before bad data or a signal
            end the run, its steps are saved.
    """
    config, plan, device, is_main = run.config, run.plan, topology.device, topology.rank == 0
    hear_stop = partial(raise_if_stopped, interruption, topology)
    datasets = open_datasets(config, run.resume.mixes, run.found_data)
    with suppressed_output():
        engine = build_engine(config, plan, topology, run.resume.adam_begun_at)
    finite = FiniteCheck(config.train, ends_run=not config.guard.enabled)
    guard = Guard(config.guard, plan.global_batch_size, finite.overflow_fault)
    report = Report(run, is_main)
    say = report.say if is_main else None
    tev, metrics = TevWatcher(engine, config), StepMetrics(config, plan, device, say)
    garbage = GarbageCollection(config.train.garbage_every)

    def read_of(data_rank: int, first_sample: int) -> list[Batch]:
        return session.read(partial(read_batches, datasets.train, plan, data_rank, first_sample))

    watchers = Watchers(
        finite,  # first: after a step that ends the run nothing is measured; the guard needs its count of overflows
        guard,
        SpikeScores(),
        GradientStatistics(engine, config, hear_stop),  # before QK-clip, which changes weights after the update
        QkClip(engine, config.model, config.qk_clip, plan),
        CorruptionCheck(engine, config, guard, watchdog.node, read_of, report.say, hear_stop),
        tev,
        metrics,  # after the measurements, whose time is part of the step's
        StepProfiler(config.profile, run.directory.profile, device, config.train.steps, say),
        garbage,  # last: the others have dropped their tensors
    )
    with (
        report,
        Prefetcher(datasets.train, plan, topology.data_rank, pins_memory=device.type == "cuda") as prefetcher,
        Checkpoints(run, engine, datasets, watchers, report.on_saved) as checkpoints,
        garbage,
    ):
        session = Session(run, topology, datasets, guard, report, checkpoints, interruption, watchdog)
        read, note, seconds = session.read_tasks(), session.note_evaluation, seconds_between_signs(config)
        tasks = TextTasks(engine, plan, read, note, hear_stop, report.say, seconds)
        passes = DataPasses(engine, config, plan, datasets.validation, session.read_for_validation, hear_stop, tasks)
        session.begin(tev, passes)
        while session.progress.step < config.train.steps:
            try:
                step = session.next_step(prefetcher.next_batches)
                watchers.before_step(step)
            except (StopRequested, BadData) as reason:
                session.stop(reason if isinstance(reason, BadData) else None)
            result = engine.train_batch(
                step.batches, step.learning_rate, watchers.before_update, interruption.is_stop_requested
            )
            values = watchers.after_step(step, result)
            session.count(step)
            due = () if session.turns_back() else passes.due(step.number)
            measured = passes.run(due, step.measuring_seconds, result.is_stop_wanted)
            report.record(session.progress, values | measured.values, step.measuring_seconds)
            session.after_step(step, measured, result.is_stop_wanted)
        session.end(metrics.mean_tokens_per_second)
    return session.progress


def launch(request: LaunchRequest, run: ResolvedRun, watchdog: Watchdog, interruption: Interruption) -> ExitCode:
    """Starts the process groups, trains, and ends them; an existing default group is used and left running.

    Returns:
        How the run ended; the same on every rank.

    Raises:
        ConfigError: On rank 0, if the checkpoints turned out to be bad; the other ranks return BAD_INPUT.
    """
    if run.config.train.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(run.config.train.deterministic)
    # Otherwise a kernel fills every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    owns_group = not dist.is_initialized()
    minutes, checkpoint = run.config.parallel.timeout_minutes, run.resume.checkpoint
    left = "there is no checkpoint" if checkpoint is None else f"the checkpoint {checkpoint} is as it was"
    interruption.limit(EXPENDABLE_SECONDS, f"stopped before the first step of this start: {left}")
    watchdog.heartbeat("connecting", run.resume.progress.step)
    device = initialize_distributed(resolve_device(run.config), minutes)
    watchdog.check(device)
    if run.layout is not None:
        check_same_layout(run.layout, device)
    watchdog.heartbeat("preparing", run.resume.progress.step)
    topology = build_topology(run.plan, device, minutes)
    code, refused = ExitCode.DONE, None
    try:
        run = agree_on_checkpoint(request, run, topology)
        if not run.is_done:
            fit(run, topology, interruption, watchdog)
        elif topology.rank == 0:
            report_nothing_to_do(run)
        if run.is_export_due:
            from mlra_scale.training.export_at_end import export_at_end  # imports transformers

            code = export_at_end(run, topology, interruption, watchdog)
    except StartRefused as error:
        code, refused = ExitCode.BAD_INPUT, error
    except TrainingStopped as stop:  # printed by rank 0's report
        code = stop.exit_code
    # A launcher ends all ranks when one ends: none may end before rank 0 has written everything. From here on each ends
    # by itself, with the exit code that gives the reason, and not by a signal.
    dist.barrier()
    interruption.limit(EXPENDABLE_SECONDS, code=code)
    if owns_group:
        destroy_topology(topology)
        dist.destroy_process_group()
    if refused is not None and topology.rank == 0:
        raise refused
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
