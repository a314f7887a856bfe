"""The training loop, with one path for both engines."""

from __future__ import annotations

from functools import partial

from mlra_scale.data import open_datasets
from mlra_scale.parallel import Topology, build_engine
from mlra_scale.stability.gradients import GradientStatistics
from mlra_scale.stability.guard import Guard
from mlra_scale.stability.qk_clip import QkClip
from mlra_scale.stability.spikes import SpikeScores
from mlra_scale.stability.tev import TevWatcher
from mlra_scale.stability.watcher import Watchers
from mlra_scale.training.interruption import Interruption
from mlra_scale.training.log.libraries import suppressed_output
from mlra_scale.training.log.report import Report
from mlra_scale.training.loop.batches import BadData, Prefetcher
from mlra_scale.training.loop.checkpoints import Checkpoints
from mlra_scale.training.loop.session import Session
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.request import ResolvedRun
from mlra_scale.training.watch.finite import FiniteCheck
from mlra_scale.training.watch.passes import DataPasses, StopRequested, raise_if_stopped
from mlra_scale.training.watch.process import GarbageCollection, StepProfiler
from mlra_scale.training.watch.step_metrics import StepMetrics
from mlra_scale.training.watchdog import Watchdog


def fit(run: ResolvedRun, topology: Topology, interruption: Interruption, watchdog: Watchdog) -> Progress:
    """Trains to `train.steps`; collective.

    Raises:
        TrainingStopped: A loss or gradient norm was not finite, the guard gave up, the data are bad, a checkpoint could
            not be written, or a signal requested a stop; on all ranks on the same step. Before bad data or a signal
            end the run, its steps are saved.
    """
    config, plan, device, is_main = run.config, run.plan, topology.device, topology.rank == 0
    hear_stop = partial(raise_if_stopped, interruption, topology)
    datasets = open_datasets(config, run.resume.mixes, run.parts)
    with suppressed_output():
        engine = build_engine(config, plan, topology)
    finite = FiniteCheck(config.train, ends_run=not config.guard.enabled)
    guard = Guard(config.guard, plan.global_batch_size, finite.overflow_fault)
    report = Report(run, is_main)
    say = report.say if is_main else None
    tev, metrics = TevWatcher(engine, config), StepMetrics(config, plan, device, say)
    garbage = GarbageCollection(config.train.garbage_every)
    watchers = Watchers(
        finite,  # first: after a step that ends the run nothing is measured; the guard needs its count of overflows
        guard,
        SpikeScores(),
        GradientStatistics(engine, config, hear_stop),  # before QK-clip, which changes weights after the update
        QkClip(engine, config.model, config.qk_clip, plan),
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
        passes = DataPasses(engine, config, plan, datasets.validation, session.read_for_validation, hear_stop)
        session.begin(tev, passes)
        while session.progress.step < config.train.steps:
            try:
                step = session.next_step(prefetcher.next_batches)
                watchers.before_step(step)
            except (StopRequested, BadData) as reason:
                session.stop(reason if isinstance(reason, BadData) else None)
            rate, is_stop_requested = step.learning_rate, interruption.is_stop_requested
            result = engine.train_batch(step.batches, rate, watchers.before_update, is_stop_requested)
            values = watchers.after_step(step, result)
            session.count(step)
            measured = passes.run(passes.due(step.number), step.measuring_seconds, result.is_stop_wanted)
            report.record(session.progress, values | measured.values, step.measuring_seconds)
            session.after_step(step, measured, result.is_stop_wanted)
        session.end(metrics.mean_tokens_per_second)
    return session.progress
