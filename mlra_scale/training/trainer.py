"""The training loop. One path for both engines, and no mathematics: it says what happens when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mlra_scale.config import BatchPlan, Config
from mlra_scale.data import Batch, SampleStream, open_datasets
from mlra_scale.parallel import Engine, StepResult, Topology, build_engine
from mlra_scale.stability.guard import Guard
from mlra_scale.stability.spikes import SpikeScores
from mlra_scale.training.agreement import on_rank_0
from mlra_scale.training.checkpoints import Checkpoints, Stateful
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.expectation import Expectation
from mlra_scale.training.feed import BadData, Feed, Read, on_all_ranks, read_batches
from mlra_scale.training.finite import FiniteCheck
from mlra_scale.training.garbage import GarbageCollection
from mlra_scale.training.guarding import approval, carry_out, decide
from mlra_scale.training.interruption import EXPENDABLE_SECONDS, Interruption
from mlra_scale.training.measuring import Measurements, is_due
from mlra_scale.training.metrics import Throughput, peak_memory_bytes
from mlra_scale.training.overseer import Overseer
from mlra_scale.training.profiling import StepProfiler
from mlra_scale.training.progress import Progress
from mlra_scale.training.quiet import muted
from mlra_scale.training.report import Report
from mlra_scale.training.schedule import learning_rate
from mlra_scale.training.start import Start
from mlra_scale.training.stopping import StopHeard, Stops, record_lost, stopped_by_signal

_GIB = 2.0**30


def fit(start: Start, topology: Topology, interruption: Interruption, overseer: Overseer) -> Progress:
    """Trains to `train.steps`; collective.

    Args:
        start: What the run is, and where it begins or goes on; there are steps to do.
        topology: The mesh.
        interruption: Of this process.
        overseer: Told of progress.

    Returns:
        The counters at the end.

    Raises:
        TrainingStopped: A loss or gradient norm was not finite, the guard has given up, the data are bad, a checkpoint
            could not be written, or a signal asked for a stop; on all ranks on the same step. What was done before bad
            data or a signal is saved.
    """
    config, plan, progress = start.config, start.plan, start.progress
    datasets = open_datasets(config, start.mixes, start.found)
    with muted():
        engine = build_engine(config, plan, topology)
    stops = Stops(interruption, topology)
    measurements = Measurements(engine, config, plan, datasets.validation, stops.hear)
    finite = FiniteCheck(config.train, is_guarded=config.guard.enabled)
    guard, spikes = Guard(config.guard, plan.global_batch_size), SpikeScores()
    windows: dict[str, Stateful] = {"finite": finite, "guard": guard, "spikes": spikes}
    throughput = Throughput(config, plan.world_size, topology.device)
    # Only rank 0 says it, and reads the file of the cluster for it.
    expectation = Expectation.of(config, plan, topology.device) if topology.rank == 0 else Expectation()
    profiler = StepProfiler(config.profile, start.run.profile, topology.device, is_active=topology.rank == 0)
    last, approve = config.train.steps, approval(guard, finite.approve, measurements.before_update)
    together = partial(on_all_ranks, topology=topology, is_checked=datasets.is_checked)

    def measure_validation() -> dict[str, float]:
        # A batch of the evaluation is progress too.
        read = partial(together, progress=progress, before=partial(overseer.beat, "evaluating", progress.step))
        return evaluate(engine, datasets.validation, config, plan, read, stops.hear)

    def passes_due(step: int) -> dict[str, Callable[[], dict[str, Any]]]:
        passes: dict[str, Callable[[], dict[str, Any]]] = {}
        if is_due(step, config.evaluation.every, last) and (step > 0 or config.evaluation.every > 0):
            passes["validation"] = measure_validation
        if measurements.are_activations_due(step):
            passes["activations"] = partial(measurements.activations, step, partial(together, progress=progress))
        return passes

    with (
        Report(start, is_main=topology.rank == 0) as report,
        Feed(datasets.train, plan, topology.data_rank, pins_memory=topology.device.type == "cuda") as feed,
        Checkpoints(start, engine, datasets, windows, report.saved) as checkpoints,
        GarbageCollection(config.train.garbage_every) as garbage,
    ):

        def save(rate: float, validation_loss: float | None, is_last: bool, left_out: Sequence[str] = ()) -> None:
            overseer.beat("saving", progress.step)
            lost = on_rank_0(report.sync, topology, progress.step, ExitCode.CHECKPOINT_FAILED)
            guard.saved(progress.step)
            is_last = is_last or lost is not None
            checkpoints.save(progress, rate, validation_loss, is_last, guard.good_step, left_out)
            if lost is not None:
                raise record_lost(progress.step, lost, checkpoints.newest)

        def stop(
            rate: float,
            validation_loss: float | None = None,
            left_out: Sequence[str] = (),
            bad_data: BadData | None = None,
        ) -> NoReturn:
            """Ends the run on all ranks; what was done since the last checkpoint is saved."""
            checkpoints.finish(progress.step)
            if progress != start.progress and checkpoints.newest_step != progress.step:
                save(rate, validation_loss, True, left_out)
            interruption.limit(EXPENDABLE_SECONDS, code=ExitCode.PREEMPTED if bad_data is None else bad_data.exit_code)
            raise bad_data or stopped_by_signal(progress.step, checkpoints.newest, start.checkpoint)

        checkpoints.load()
        guard.recall(start.rollbacks, progress.step)
        if start.changes_what_is_usual:
            guard.forget(progress.step)
        on_rank_0(partial(begin, start, checkpoints, report, guard), topology, progress.step)
        for notice in datasets.notices:
            report.say(notice)
        num_validation = datasets.validation.samples_per_epoch
        if num_validation < plan.global_batch_size:
            report.say(
                f"the validation data are {num_validation} sample(s), less than a global batch of "
                f"{plan.global_batch_size}: some are read more than once and weigh more in the validation loss"
            )
        left_out: tuple[str, ...] = ()
        bad_data: BadData | None = None
        rate = learning_rate(progress.step, config.optim, last) if progress.step > 0 else 0.0
        if progress.step == 0 and not start.goes_on_in_place:  # otherwise it is in the record
            values = measurements.tev(0)
            more, left_out, bad_data = until_stop(passes_due(0))
            report.measured(progress, values | more | measurements.costs())
        elif start.left_out:
            passes = {name: measure for name, measure in passes_due(progress.step).items() if name in start.left_out}
            values, left_out, bad_data = until_stop(passes)
            if not left_out:
                on_rank_0(partial(report.amend, progress, values), topology, progress.step, ExitCode.CHECKPOINT_FAILED)
                if start.progress.step >= last:
                    checkpoints.save(progress, rate, values.get("validation_loss"), is_last=True)
        if left_out:
            raise bad_data or stopped_by_signal(progress.step, checkpoints.newest, start.checkpoint)
        has_good_step = guard.good_step is not None and not start.is_good_step_lost
        if guard.is_enabled and (not has_good_step or start.rejected or not start.goes_on_in_place):
            # Something to go back to from the first step on.
            guard.begins_at(progress.step)
            if not start.goes_on_in_place:
                lost = on_rank_0(report.sync, topology, progress.step, ExitCode.CHECKPOINT_FAILED)
                checkpoints.save(progress, rate, None, is_last=lost is not None)
                if lost is not None:
                    raise record_lost(progress.step, lost, checkpoints.newest)

        interruption.limit(None)  # From here on there is something to save.
        while progress.step < last:
            step = progress.step + 1
            overseer.beat("training", step)
            profiler.before(step)
            throughput.start()
            place = guard.place(progress.consumed_samples)
            try:
                batches = together(partial(feed.take, place), progress)
                waited = throughput.so_far
                measurements.before_step(step, batches)
            except StopHeard:
                stop(rate)
            except BadData as error:
                stop(rate, bad_data=error)
            rate = learning_rate(step, config.optim, last) * guard.rate_factor(step)
            result = engine.train_batch(batches, rate, approve, interruption.is_stop_asked)
            finite.check(step, result, place)
            progress = progress.after(plan, place)
            if not result.overflow:  # which is usual in fp16, and no spike
                spikes.update(result.loss, result.gradient_norm)

            values = measurements.after_update(step, result, rate, batches, place)
            seconds = throughput.stop(plan.tokens_per_step)
            if (compared := expectation.after_step(seconds - waited, not measurements.has_measured)) is not None:
                report.say(compared)
            if step == 1 or is_due(step, config.train.log_every, last):
                values |= step_values(result, rate, throughput.since_last(), topology.device)
                values["spike_scores"] = spikes.values
            more, left_out, bad_data = until_stop(passes_due(step), result.is_stop_wanted)
            values |= more | measurements.costs()
            is_stop = result.is_stop_wanted or bool(left_out)
            report.measured(progress, values)
            report.step_done(progress)
            if (profile := profiler.after(step, last)) is not None:
                report.say(profile)
            checkpoints.poll(step)
            garbage.after(step)
            actions = decide(guard, finite, step, place, result)
            if any(action.kind == "rollback" for action in actions):
                interruption.limit(EXPENDABLE_SECONDS, "stopped while the guard took the run back: --resume auto does")
            returned = carry_out(actions, guard, checkpoints, report, start.run.guard, topology, overseer)
            interruption.limit(None)
            if returned is not None:
                progress = returned
                if is_stop:
                    stop(rate, bad_data=bad_data)
                continue
            if is_stop and (step < last or left_out):
                stop(rate, values.get("validation_loss"), left_out, bad_data)
            if is_due(step, config.checkpoint.every, last):
                save(rate, values.get("validation_loss"), step == last)

        memory_gib = largest_over_ranks(peak_memory_bytes(topology.device) / _GIB, topology)
        # Everything is saved: a signal ends what the summary and wandb still wait for.
        interruption.limit(EXPENDABLE_SECONDS, f"all {last} steps are done and saved", ExitCode.DONE)
        report.finished(progress, throughput.mean, memory_gib)
    return progress


def begin(start: Start, checkpoints: Checkpoints, report: Report, guard: Guard) -> None:
    """Leaves the run directory as a run has it that goes on from this start's checkpoint; for rank 0.

    In this order: killed in between, the next start cuts the record to where the pointer says.
    """
    checkpoints.point_to_start()
    if start.kind != "training":
        # Of a run that was here before its first checkpoint.
        start.run.guard.unlink(missing_ok=True)
    report.start(guard.num_rollbacks)


def until_stop(
    passes: Mapping[str, Callable[[], dict[str, Any]]], is_stop: bool = False
) -> tuple[dict[str, Any], tuple[str, ...], BadData | None]:
    """Measures what takes passes over data, until a signal asks for a stop or the data are bad; collective.

    Args:
        passes: By name, what measures; raises StopHeard on all ranks.
        is_stop: Whether a signal has asked already.

    Returns:
        What was measured, the names of what was left out, and what is wrong with the data.
    """
    values: dict[str, Any] = {}
    for number, measure in enumerate(passes.values()):
        if is_stop:
            return values, tuple(passes)[number:], None
        try:
            values |= measure()
        except StopHeard:
            return values, tuple(passes)[number:], None
        except BadData as error:
            return values, tuple(passes)[number:], error
    return values, (), None


def evaluate(
    engine: Engine,
    stream: SampleStream,
    config: Config,
    plan: BatchPlan,
    together: Callable[[Read], list[Batch]],
    between: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Returns validation loss and perplexity over the first samples of the stream, always the same ones; collective.

    Args:
        engine: The model.
        stream: Validation samples.
        config: `evaluation.batches` global batches are read, or as many as the data set has: no sample twice, unless
            the data set is smaller than a single global batch.
        plan: The batch plan.
        together: Reads on all ranks (feed.on_all_ranks).
        between: See Engine.eval_batch.
    """
    whole_batches = max(1, stream.samples_per_epoch // plan.global_batch_size)
    num_batches = min(config.evaluation.batches, whole_batches)
    total = 0.0
    for index in range(num_batches):
        read = partial(read_batches, stream, plan, engine.topology.data_rank, index * plan.global_batch_size)
        total += engine.eval_batch(together(read), between)
    loss = total / num_batches
    return {"validation_loss": loss, "validation_perplexity": math.exp(loss) if loss < 700.0 else math.inf}


def step_values(
    result: StepResult, rate: float, throughput: Mapping[str, float], device: torch.device
) -> dict[str, Any]:
    """Returns what is recorded of a training step."""
    values: dict[str, Any] = {
        "loss": result.loss,
        "gradient_norm": result.gradient_norm,
        "learning_rate": rate,
        **throughput,
        "memory_gib": peak_memory_bytes(device) / _GIB,
    }
    if result.loss_scale is not None:
        values |= {"loss_scale": result.loss_scale, "overflow": result.overflow}
    return values


def largest_over_ranks(value: float, topology: Topology) -> float:
    """Returns the largest of every rank's value; collective."""
    packed = torch.tensor(value, dtype=torch.float64, device=topology.device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return packed.item()
