"""The report of a run on rank 0: record, events, console, wandb and TensorBoard. On other ranks it does nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mlra_scale.checkpoint.saver import FinishedSave
from mlra_scale.planning.choice import choice_lines
from mlra_scale.stability.guard import Action
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.log.console import (
    summary_lines,
    summary_of,
    task_lines,
    tev_line,
    train_line,
    validation_line,
)
from mlra_scale.training.log.tensorboard_log import TensorBoardLog, open_tensorboard
from mlra_scale.training.log.wandb_log import WandbLog, open_wandb
from mlra_scale.training.record import (
    EventLog,
    JsonLines,
    RecordLost,
    check_same,
    commit,
    cut_record,
    first_lost_step,
    read_record,
    replace_last,
)
from mlra_scale.training.resume import Change
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.device import resolve_device
from mlra_scale.training.start.plan import short_report
from mlra_scale.training.start.request import ResolvedRun
from mlra_scale.training.start.resume_choice import Rejected


def report_nothing_to_do(run: ResolvedRun) -> None:
    """Reports that a run to be resumed has done all its steps; its configuration and record are not changed."""
    step, total, checkpoint = run.resume.progress.step, run.config.train.steps, str(run.resume.checkpoint)
    events = EventLog(run.directory.events)
    for rejected in run.resume.rejected:
        print(_note_fallback(events, rejected, checkpoint))
    events.event("finished", steps=step, checkpoint=checkpoint, reason=f"already at train.steps={total}")
    events.close()
    print(f"already at step {step} ({checkpoint}): nothing to do up to train.steps={total}, raise it to continue")
    sys.stdout.flush()


def _note_fallback(events: EventLog, rejected: Rejected, used: str) -> str:
    events.event("fallback", passed_over=str(rejected.path), reason=rejected.reason, used=used)
    return f"fallback: {rejected.path} is passed over: {rejected.reason}"


def _without_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are curves: neither extreme tokens nor numbers of every block."""
    return {
        key: _without_lists(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not isinstance(value, list)
    }


class Report:
    """The report of one run; a context manager that also records how the run ended."""

    def __init__(self, run: ResolvedRun, is_main: bool) -> None:
        self._run, self._is_main = run, is_main
        self._directory, self._total_steps = run.directory, run.config.train.steps
        self._metrics, self._events = JsonLines(None), EventLog(None)
        self._wandb, self._tensorboard = WandbLog(), TensorBoardLog()
        self._folder: int | None = None
        self._checkpoints: tuple[int, int] | None = None
        self._bar: Any = None
        self._last_tev: dict[str, Any] = {}
        self._records: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._step = run.resume.progress.step

    def open(self, num_rollbacks: int = 0) -> None:
        """Makes the run directory, cuts the record back to the resumed step and opens everything; for rank 0."""
        run, resume, directory = self._run, self._run.resume, self._directory
        directory.create(run.config, resume.checkpoint)
        num_cut = cut_record(directory.metrics, self._step if resume.kind == "training" else -1)
        self._records = read_record(directory.metrics)
        self._metrics, self._events = JsonLines(directory.metrics), EventLog(directory.events)
        self._folder = os.open(directory.path, os.O_RDONLY | os.O_DIRECTORY)  # from here on the record is open
        self._events.event("start", step=self._step, world_size=run.plan.world_size, commit=commit())
        self.say(short_report(run.config, run.plan, resolve_device(run.config)))
        if run.layout is not None:
            self.say("\n".join(choice_lines(run.layout)))
        self._report_origin(num_cut)
        if num_cut > 0:
            self.say(f"removed from {directory.metrics.name}: {num_cut} line(s) of steps that are done again")
        self._wandb = open_wandb(run.config, directory, num_rollbacks)
        self._tensorboard = open_tensorboard(run.config, directory, self._step + 1 if resume.kind == "training" else 0)
        self.say(f"run directory {directory.path}, wandb {self._wandb.mode}")
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total_steps, initial=self._step, unit="step", dynamic_ncols=True)

    def _report_origin(self, num_cut: int) -> None:
        """Reports where the run starts, which checkpoints were passed over, and what changes from now on."""
        resume, checkpoint = self._run.resume, str(self._run.resume.checkpoint)
        for rejected in resume.rejected:
            self.say(_note_fallback(self._events, rejected, checkpoint))
        if resume.kind == "training":
            text = f"resumed from {checkpoint}: step {self._step}, {resume.progress.consumed_samples:,} samples read"
            self.note("resume", text, step=self._step, checkpoint=checkpoint, records_cut=num_cut)
            if resume.is_in_place:
                self._report_lost_record(resume.changes)
        elif resume.kind == "weights":
            text = f"begins with the weights of {checkpoint}"
            self.note("initialized_from", text, checkpoint=checkpoint, records_cut=num_cut)
        elif num_cut > 0:
            text = f"the run here was stopped before its first checkpoint: it begins anew, from step {self._step}"
            self.note("begun_anew", text, records_cut=num_cut)
        for notice in resume.notices:
            self.say(notice)
        for change in resume.changes:
            text = f"changed from here on: {change}"
            self.note("changed", text, field=change.field, was=change.was, now=change.now)

    def _report_lost_record(self, changes: Sequence[Change]) -> None:
        """Reports that lines before the checkpoint of this start are missing at the end of the record."""
        every = [change.was for change in changes if change.field == "train.log_every"]
        first = first_lost_step(self._records, self._step, max([self._run.config.train.log_every, *every]))
        if first is not None:
            steps = f"steps {first} to {self._step}"
            text = f"{self._directory.metrics} has no losses of {steps}: the file was changed since then"
            self.note("record_lost", text, first_step=first, last_step=self._step)

    def say(self, text: str) -> None:
        """Prints to the console, above the progress bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def note(self, event: str, text: str, **values: Any) -> None:
        """Appends to events.jsonl, and prints."""
        self._events.event(event, **values)
        self.say(text)

    def sync(self) -> str | None:
        """Puts the record on disk: a checkpoint must not outlive the lines of the steps before it.

        Returns:
            What another program has done to a file of the record, whose next lines would be lost; else None.

        Raises:
            RecordLost: The run directory has been moved, removed or replaced: checkpoints would be lost too.
        """
        if self._folder is None:
            return None
        check_same(self._directory.path, self._folder)
        self._note_replaced_checkpoints()
        lost = []
        for log in (self._metrics, self._events):  # both, also if the first one is lost
            try:
                log.sync()
            except RecordLost as error:
                lost.append(str(error))
        return "; ".join(lost) or None

    def _note_replaced_checkpoints(self) -> None:
        """Reports that the folder of checkpoints is another one than before; the run continues and saves into it."""
        before, path = self._checkpoints, self._directory.checkpoints
        try:
            found = path.stat()
            self._checkpoints = (found.st_dev, found.st_ino)
        except OSError:
            self._checkpoints = None
        if before is not None and self._checkpoints != before:
            text = f"{path} was moved, removed or replaced: its earlier checkpoints are no longer there"
            self.note("checkpoints_replaced", text, path=str(path))

    def record(
        self, progress: Progress, values: Mapping[str, Any], measuring_seconds: Mapping[str, float] | None = None
    ) -> None:
        """Records what was measured after a step and in how many seconds; if nothing was, only the bar moves."""
        self._step = progress.step
        if self._bar is not None:
            self._bar.update(progress.step - self._bar.n)
        if measuring_seconds:
            rounded = {name: round(seconds, 6) for name, seconds in measuring_seconds.items()}
            values = {**values, "measuring_seconds": rounded}
        if not self._is_main or not values:
            return
        record = {
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "seconds": round(time.perf_counter() - self._started, 3),
            **values,
        }
        self._metrics.write(record)
        self._show(record, values, record)

    def amend(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """Adds to the record of its last step what was measured only after the run was resumed; for rank 0."""
        if not values or not self._records or self._records[-1]["step"] != progress.step:
            self.record(progress, values)
            return
        record = {**self._records.pop(), **values}
        self._metrics.close()
        replace_last(self._directory.metrics, record)
        self._metrics = JsonLines(self._directory.metrics)
        self._show(record, values, values)  # the other curves have this step already

    def _show(self, record: dict[str, Any], values: Mapping[str, Any], sent: Mapping[str, Any]) -> None:
        """Prints what is new (`values`) in a line of the record, and sends what wandb and TensorBoard lack (`sent`)."""
        step, total = record["step"], self._total_steps
        self._records.append(record)
        self._send(step, _without_lists(sent))
        if "tev_mean" in values:
            self._last_tev = {"tev_mean": values["tev_mean"], "tev_std": values["tev_std"], "tev_step": step}
        if "loss" in values:
            elapsed, done = time.perf_counter() - self._started, step - self._run.resume.progress.step
            remaining = elapsed / done * (total - step) if done > 0 else None
            self.say(train_line({**self._last_tev, **record}, total, elapsed, remaining))
        elif "tev_mean" in values and step == 0:
            self.say(tev_line(record, total))
        if "validation_loss" in values:
            self.say(validation_line(record, total))
        if "tasks" in values or "harness" in values:
            self.say("\n".join(task_lines(record, total)))

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        self._wandb.log(step, values)
        self._tensorboard.log(step, values)

    def on_saved(self, save: FinishedSave) -> None:
        """Records a checkpoint that is complete."""
        self._events.event(
            "checkpoint",
            step=save.step,
            path=str(save.path),
            bytes=save.bytes,
            stall_seconds=round(save.stall_seconds, 4),
            write_seconds=round(save.write_seconds, 4),
        )
        if save.drift is not None:
            text = f"step {save.step}: {save.drift}; the owner's copy was saved"
            self.note("copies_differ", text, step=save.step, reason=save.drift)
        if save.not_removed is not None:
            text = f"step {save.step}: the checkpoint is complete, but of earlier ones {save.not_removed}"
            self.note("not_removed", text, step=save.step, reason=save.not_removed)

    def on_guard_actions(self, actions: Sequence[Action], rate: Mapping[str, Any]) -> None:
        """Reports the guard's decisions, but not a rollback before it is done; `rate`: see Guard.rate_after."""
        for action in actions:
            if action.kind == "rollback":
                continue
            more = rate if action.kind == "lower_rate" else {}
            self._send(action.step, {f"guard/{action.kind}": more.get("factor", 1)})
            outcomes = {"skip": "update skipped", "lower_rate": f"learning rate times {rate['factor']:g}"}
            text = f"guard, step {action.step}: {outcomes.get(action.kind, 'gives up')}: {action.reason}"
            self.note(f"guard_{action.kind}", text, step=action.step, reason=action.reason, **more)

    def on_corruption(self, action: Action) -> None:
        """Records a step that was computed wrong, before anything is done about it."""
        nodes = {str(rank): node for rank, node in action.nodes.items()}
        text = f"guard, step {action.step}: {action.reason}"
        self.note("corruption", text, step=action.step, nodes=nodes, reason=action.reason)

    def on_rollback(self, action: Action, number: int, progress: Progress, rate: Mapping[str, Any]) -> None:
        """Cuts the record back to the checkpoint of rollback `number` (from 1); for rank 0."""
        assert action.skipped is not None
        start, stop = action.skipped
        lowered = "" if rate["until"] is None else f", learning rate times {rate['factor']:g}"
        skipped = "" if start == stop else f", samples {start:,} to {stop - 1:,} are not read again"
        nodes = {"nodes": {str(rank): node for rank, node in action.nodes.items()}} if action.nodes else {}
        self.note(
            "guard_rollback",
            f"guard, step {action.step}: back to step {progress.step}{skipped}{lowered}: {action.reason}",
            step=action.step,
            to_step=progress.step,
            skipped_from=start,
            skipped_to=stop,
            **rate,
            **nodes,
            reason=action.reason,
        )
        self._metrics.close()
        cut_record(self._directory.metrics, progress.step, self._directory.rolled_back, number)
        self._metrics, self._records = JsonLines(self._directory.metrics), read_record(self._directory.metrics)
        self._step = progress.step
        values = {"guard/rollback": number, "guard/to_step": progress.step}
        self._wandb.log(action.step, values)
        # wandb's steps cannot go back: the run continues under a new id.
        self._wandb.finish(ExitCode.DONE)
        self._wandb = open_wandb(self._run.config, self._directory, number)
        self._tensorboard.finish()
        self._tensorboard = open_tensorboard(self._run.config, self._directory, progress.step + 1)
        self._tensorboard.log(action.step, values)  # the files before this one lose what they have from that step on

    def finish(self, progress: Progress, tokens_per_second: float, peak_memory_gib: float) -> None:
        """Records and prints the summary of a run that reached its last step."""
        if not self._is_main:
            return
        seconds = time.perf_counter() - self._started
        summary = summary_of(self._records, progress.step, seconds, tokens_per_second, peak_memory_gib)
        self._events.event("finished", **summary)
        self._wandb.finish(ExitCode.DONE, {key: value for key, value in summary.items() if value is not None})
        self._close_bar()
        directory = self._directory
        lines = [
            *summary_lines(summary, self._total_steps),
            f"record: {directory.metrics} (one JSON object per line), events: {directory.events}",
            f"next: continue with --resume auto and a larger train.steps; checkpoints are in {directory.checkpoints}",
        ]
        if self._run.config.wandb.mode != "disabled" and any(directory.wandb.glob("offline-run-*")):
            lines.append(f"      upload to Weights & Biases: wandb sync {directory.wandb}/offline-run-*")
        if self._run.config.tensorboard.enabled:
            lines.append(f"      look at the curves: tensorboard --logdir {directory.tensorboard}")
        self.say("\n".join(lines))

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Records how the run ended, and closes everything."""
        self._close_bar()
        if self._is_main and error is not None and self._folder is None and self._directory.events.exists():
            # A run that was to be resumed ends before its first step; a new one leaves nothing behind.
            self._events = EventLog(self._directory.events)
        code = ExitCode.DONE
        if isinstance(error, TrainingStopped):
            code = error.exit_code
            reason = "; ".join([str(error), *getattr(error, "__notes__", [])])
            name = "preempted" if code == ExitCode.PREEMPTED else "stopped"
            self._events.event(name, exit_code=int(code), reason=reason, **error.values)
            if self._is_main:
                print(f"stopped: {reason}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            code = ExitCode.INTERRUPTED
            self._events.event("interrupted", step=self._step, exit_code=int(code))
        elif error is not None:
            code = ExitCode.FAILED
            reason = f"{type(error).__name__}: {error}"[:2000]
            self._events.event("failed", step=self._step, exit_code=int(code), reason=reason)
        self._metrics.close()
        self._events.close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None
        self._tensorboard.finish()
        self._wandb.finish(code)  # last, since it may wait for a network
