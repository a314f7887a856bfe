"""A run between its steps: how it begins, saves, stops, rolls back and ends. Every method is collective."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mlra_scale.checkpoint.retention import checkpoint_name, remove_after
from mlra_scale.data import Batch, OpenData
from mlra_scale.evaluation.tasks import Tasks, TaskText, read_tasks
from mlra_scale.parallel import Topology
from mlra_scale.stability.guard import Action, Guard
from mlra_scale.stability.tev import TevWatcher
from mlra_scale.stability.watcher import Step, is_due
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.interruption import EXPENDABLE_SECONDS, Interruption, Watchdog
from mlra_scale.training.log.report import Report
from mlra_scale.training.loop.batches import BadData, Read, read_collectively
from mlra_scale.training.loop.checkpoints import Checkpoints, tokenizer_folder
from mlra_scale.training.schedule import Progress, learning_rate
from mlra_scale.training.start.agreement import on_rank_0
from mlra_scale.training.start.request import ResolvedRun
from mlra_scale.training.watch.passes import DataPasses, PassResult
from mlra_scale.training.watch.step_watchers import GIB, peak_memory_bytes


@dataclass
class Session:
    """The parts of a run at work, its counters, and the learning rate of its last step.

    The methods raise TrainingStopped, on all ranks, where the run ends.
    """

    run: ResolvedRun
    topology: Topology
    datasets: OpenData
    guard: Guard
    report: Report
    checkpoints: Checkpoints
    interruption: Interruption
    watchdog: Watchdog
    progress: Progress = field(init=False)
    learning_rate: float = 0.0

    def __post_init__(self) -> None:
        self.progress = self.run.resume.progress

    def begin(self, tev: TevWatcher, passes: DataPasses) -> None:
        """Loads the checkpoint, opens the record, and makes the measurements that precede the first step."""
        resume, config = self.run.resume, self.run.config
        self.checkpoints.load()
        self.guard.adopt_rollbacks(resume.rollbacks, self.progress.step)
        if resume.resets_guard_statistics:
            self.guard.reset_statistics(self.progress.step)
        has_good_step = self.guard.good_step is not None and not resume.is_good_step_lost
        begins_here = self.guard.is_enabled and (not has_good_step or bool(resume.rejected) or not resume.is_in_place)
        if begins_here:
            self.guard.begin_at(self.progress.step)  # the first rollback needs a checkpoint too
        elif self.guard.is_enabled and self.guard.good_step is not None:
            self.checkpoints.check_rollback_to(self.guard.good_step)  # before anything is written
        on_rank_0(self._open_record, self.topology, self.progress.step)
        self._note_data()
        if self.progress.step > 0:
            self.learning_rate = learning_rate(self.progress.step, config.optim, config.train.steps)
        measured = PassResult()
        if self.progress.step == 0 and not resume.is_in_place:  # otherwise it is in the record
            measured = self._measure_before_training(tev, passes)
        elif resume.left_out:
            measured = self._measure_left_out(passes)
        if measured.left_out:
            raise measured.bad_data or self._stopped_by_signal()
        if begins_here and not resume.is_in_place:
            self.save({}, is_last=False)
        self.interruption.limit(None)  # from here on there is something to save

    def _open_record(self) -> None:
        """Makes the run directory that of a run which continues from this start's checkpoint.

        In this order: killed in between, the next start cuts the record at the step of the `latest` checkpoint.
        """
        self.checkpoints.point_to_start()
        if self.run.resume.kind != "training":
            self.run.directory.guard.unlink(missing_ok=True)  # of an earlier run that had no checkpoint yet
        self.report.open(len(self.guard.rollbacks))

    def _note_data(self) -> None:
        for notice in self.datasets.notices:
            self.report.say(notice)
        num_samples, batch_size = self.datasets.validation.samples_per_epoch, self.run.plan.global_batch_size
        if num_samples < batch_size:
            self.report.say(
                f"the validation data are {num_samples} sample(s), less than a global batch of {batch_size}: some are "
                "read more than once and weigh more in the validation loss"
            )

    def _measure_before_training(self, tev: TevWatcher, passes: DataPasses) -> PassResult:
        began = time.perf_counter()
        values = tev.measure(0)
        seconds = {"tev": time.perf_counter() - began} if values else {}
        measured = passes.run(passes.due(0), seconds)
        self.report.record(self.progress, values | measured.values, seconds)
        return measured

    def _measure_left_out(self, passes: DataPasses) -> PassResult:
        """Makes the measurements that the stop before this start has left out."""
        step = self.progress.step
        names = [name for name in passes.due(step) if name in self.run.resume.left_out]
        measured = passes.run(names, {})
        if not measured.left_out:
            amend = partial(self.report.amend, self.progress, measured.values)
            on_rank_0(amend, self.topology, step, ExitCode.CHECKPOINT_FAILED)
            if step >= self.run.config.train.steps:
                values = {**self.run.resume.measured, **measured.values}
                self.checkpoints.save(self.progress, self.learning_rate, values, is_last=True)
        return measured

    def read(self, read: Read) -> list[Batch]:
        """Reads batches on all ranks; see read_collectively."""
        return read_collectively(read, self.progress, self.topology, self.datasets.is_checked)

    def read_for_validation(self, read: Read) -> list[Batch]:
        """Reads batches on all ranks; a batch of the validation is progress too."""
        self.note_evaluation()
        return self.read(read)

    def read_tasks(self) -> Tasks:
        """Reads what `evaluation.tasks` names on rank 0, which alone needs the files or the hub.

        All ranks get the texts; the harness runs on rank 0.
        """
        config, read = self.run.config, Tasks()

        def work() -> list[TaskText]:
            nonlocal read
            is_known = self.run.resume.carries_on("evaluation.tasks")
            read = read_tasks(config, tokenizer, self.report.say, needs_all=not is_known)
            return read.texts

        if not config.evaluation.tasks:
            return read
        tokenizer = str(tokenizer_folder(config, self.datasets) or config.data.tokenizer)
        texts = on_rank_0(work, self.topology, self.progress.step)
        return Tasks(texts, read.harness)

    def note_evaluation(self) -> None:
        """Reports that an evaluation makes progress."""
        self.watchdog.heartbeat("evaluating", self.progress.step)

    def next_step(self, next_batches: Callable[[int], list[Batch]]) -> Step:
        """Reads the data of the next step by `next_batches`, which takes its first sample."""
        config, number, started = self.run.config, self.progress.step + 1, time.perf_counter()
        self.watchdog.heartbeat("training", number)
        first_sample = self.guard.first_sample(self.progress.consumed_samples)
        batches = self.read(partial(next_batches, first_sample))
        last = config.train.steps
        return Step(
            number,
            is_logged=number == 1 or is_due(number, config.train.log_every, last),
            first_sample=first_sample,
            batches=batches,
            learning_rate=learning_rate(number, config.optim, last) * self.guard.rate_factor(number),
            started=started,
            read_seconds=time.perf_counter() - started,
        )

    def count(self, step: Step) -> None:
        """Counts a step whose update was made or skipped."""
        self.progress = self.progress.after(self.run.plan, step.first_sample)
        self.learning_rate = step.learning_rate

    def save(self, measured: Mapping[str, Any], is_last: bool, left_out: Sequence[str] = ()) -> None:
        """Saves a checkpoint, with what was measured after its step, when the record of its steps is on disk."""
        step = self.progress.step
        self.watchdog.heartbeat("saving", step)
        lost = on_rank_0(self.report.sync, self.topology, step, ExitCode.CHECKPOINT_FAILED)
        self.guard.note_checkpoint(step)
        is_last = is_last or lost is not None
        self.checkpoints.save(self.progress, self.learning_rate, measured, is_last, self.guard.good_step, left_out)
        if lost is not None:
            message = (
                f"step {step}: {lost}. The run stops, since nobody would find what it records next; the checkpoint "
                f"{self.checkpoints.newest} is complete. See what became of the file, and continue with --resume auto"
            )
            values: dict[str, int | str | None] = {"step": step, "checkpoint": str(self.checkpoints.newest)}
            raise TrainingStopped(message, values, ExitCode.CHECKPOINT_FAILED)

    def stop(self, bad_data: BadData | None = None, measured: PassResult | None = None) -> NoReturn:
        """Ends the run because of bad data or, without them, a signal; steps since the last checkpoint are saved.

        `measured` is what was measured after the last step, and what was left out.
        """
        measured = measured or PassResult()
        self.checkpoints.finish(self.progress.step)
        newest, step = self.checkpoints.newest, self.progress.step
        is_saved = newest is not None and newest.name == checkpoint_name(step)
        if self.progress != self.run.resume.progress and not is_saved:
            self.save(measured.values, is_last=True, left_out=measured.left_out)
        code = ExitCode.PREEMPTED if bad_data is None else bad_data.exit_code
        self.interruption.limit(EXPENDABLE_SECONDS, code=code)
        raise bad_data or self._stopped_by_signal()

    def _stopped_by_signal(self) -> TrainingStopped:
        step, newest, origin = self.progress.step, self.checkpoints.newest, self.run.resume.checkpoint
        if newest is not None:
            left = f"the checkpoint {newest} is complete; continue with --resume auto"
        elif origin is not None:
            left = f"there is no checkpoint of this run yet: the same command begins again from {origin}"
        else:
            left = "there is no checkpoint yet: --resume auto begins anew"
        when = f"after step {step}" if step else "before the first step"
        values = {"step": step, "checkpoint": None if newest is None else str(newest)}
        return TrainingStopped(f"{when}, as a signal asked: {left}", values, ExitCode.PREEMPTED)

    def turns_back(self) -> bool:
        """Returns whether the guard takes the run back, which is then on disk, before anything that takes time.

        After a kill from here on a start continues from the checkpoint of the rollback: corruption need not come again.
        """
        action = self.guard.actions[-1] if self.guard.actions else None
        if action is None or action.kind != "rollback":
            return False
        assert action.to_step is not None
        try:
            self.checkpoints.turn_back(action.to_step)
            if action.nodes:
                note = partial(self.report.on_corruption, action)
                on_rank_0(note, self.topology, action.step, ExitCode.CHECKPOINT_FAILED)
        except TrainingStopped:
            self._exclude_node(action)
            raise
        text = f"stopped during a rollback of the guard: --resume auto continues from step {action.to_step}"
        self.interruption.limit(EXPENDABLE_SECONDS, text)
        return True

    def after_step(self, step: Step, measured: PassResult, is_stop: bool) -> None:
        """Does what follows a step: a rollback, a stop (`is_stop`: some rank was asked to) or a checkpoint."""
        last = self.run.config.train.steps
        is_stop = is_stop or bool(measured.left_out)
        self.checkpoints.poll(step.number)
        if self._carry_out_guard_actions():
            if is_stop:
                self.stop(measured.bad_data)
        elif is_stop and (step.number < last or measured.left_out):
            self.stop(measured.bad_data, measured)
        elif is_due(step.number, self.run.config.checkpoint.every, last):
            self.save(measured.values, is_last=step.number == last)

    def _carry_out_guard_actions(self) -> bool:
        """Carries out what the guard has decided; returns whether the run was rolled back."""
        if not self.guard.actions:
            return False
        last = self.guard.actions[-1]
        self.report.on_guard_actions(self.guard.actions, self.guard.rate_after(last.step))
        if last.kind == "give_up":
            raise self._given_up(last)
        if last.kind != "rollback":
            return False
        try:
            self.roll_back(last)
        except TrainingStopped:
            self._exclude_node(last)
            raise
        if last.nodes:
            self._leave_bad_node(last)
        self.interruption.limit(None)
        return True

    def roll_back(self, action: Action) -> None:
        """Returns the run to a checkpoint, and skips the data on which the trouble occurred.

        In this order: killed before guard.json is written, the run continues from that checkpoint, meets the same
        trouble and rolls back again (wrong computation need not come again); killed after it, the run continues without
        those data, and no later checkpoint is left that would take precedence.
        """
        assert action.to_step is not None
        heartbeat = partial(self.watchdog.heartbeat, "rolling back", action.to_step)
        heartbeat()
        self.progress, notice = self.checkpoints.roll_back(action.to_step, heartbeat, bool(action.nodes))
        self.guard.note_rollback(action)

        def write() -> None:
            remove_after(self.run.directory.checkpoints, self.progress.step)
            self.run.directory.write_rollbacks(self.guard.rollbacks)
            rate = self.guard.rate_after(self.progress.step)
            self.report.on_rollback(action, len(self.guard.rollbacks), self.progress, rate)
            if notice is not None:
                self.report.say(notice)

        on_rank_0(write, self.topology, self.progress.step, ExitCode.CHECKPOINT_FAILED)

    def _leave_bad_node(self, action: Action) -> None:
        """Ends the run, which is back at a good checkpoint, where it can be started without the node that is at fault.

        Where ranks of several nodes are suspected, none is left out.
        """
        nodes = sorted(set(action.nodes.values()))
        if self._exclude_node(action) or action.ends_run:
            self.interruption.limit(EXPENDABLE_SECONDS, code=ExitCode.BAD_NODE)
            remedy = f"continue without {nodes[0]}, with --resume auto"
            if len(nodes) > 1:
                remedy = (
                    f"one of {', '.join(nodes)} computes wrong: test them, and continue with --resume auto; if all are "
                    "sound, their results are no bits to compare: set guard.replay_every=0"
                )
            message = f"step {action.step}: {action.reason}. The run is back at step {action.to_step}; {remedy}"
            raise TrainingStopped(message, {"step": action.step, "node": " ".join(nodes)}, ExitCode.BAD_NODE)

    def _exclude_node(self, action: Action) -> bool:
        """Returns whether the node that computed wrong will be left out; of several suspected ones none is."""
        nodes = sorted(set(action.nodes.values()))
        return len(nodes) == 1 and self.watchdog.exclude(nodes[0], action.reason)

    def _given_up(self, action: Action) -> TrainingStopped:
        returns = [
            f"from step {item['step']} back to step {item['to_step']}: {item['reason']}"
            for item in self.guard.rollbacks
        ]
        message = (
            f"step {action.step}: the guard gives up: {action.reason}. Lower optim.lr, lengthen optim.warmup_steps, or "
            "look in rolled_back.jsonl and in the guard's events for what the episodes have in common. "
            f"What was tried: {'; '.join(returns) or 'updates were skipped, and the learning rate was lowered'}"
        )
        return TrainingStopped(message, {"step": action.step}, ExitCode.UNSTABLE)

    def end(self, tokens_per_second: float) -> None:
        """Prints and records the summary of a run that has done all its steps, which are saved."""
        memory = torch.tensor(
            peak_memory_bytes(self.topology.device) / GIB, dtype=torch.float64, device=self.topology.device
        )
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        # A signal ends the process during what the summary and wandb may still wait for.
        self.interruption.limit(EXPENDABLE_SECONDS, f"all {self.progress.step} steps are done and saved", ExitCode.DONE)
        self.report.finish(self.progress, tokens_per_second, memory.item())
