"""Where a run's numbers go: the record, the console, the progress bar and wandb. Rank 0 writes, the others forget."""

from __future__ import annotations

import math
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
from mlra_scale.training.dry_run import short_report
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import TrainingStopped
from mlra_scale.training.launch import resolve_device
from mlra_scale.training.metrics import tev_text, train_line, validation_line
from mlra_scale.training.progress import Progress
from mlra_scale.training.record import (
    EventLog,
    JsonLines,
    RecordLost,
    check_same,
    cut_record,
    lost_from,
    read_record,
    replace_last,
    set_aside,
)
from mlra_scale.training.source import commit
from mlra_scale.training.start import Start
from mlra_scale.training.wandb_log import WandbLog, open_wandb

_CURVES = ("loss", "validation_loss", "tev_mean", "tev_std")
"""What the summary tells the first and the last value of."""


def report_nothing_to_do(start: Start) -> None:
    """Tells that a run is to be resumed which has done its steps; its configuration and record stay as they are.

    Args:
        start: What is to be resumed.
    """
    step, total, checkpoint = start.progress.step, start.config.train.steps, str(start.checkpoint)
    events = EventLog(start.run.events)
    for rejected in start.rejected:
        events.write("fallback", passed_over=str(rejected.path), reason=rejected.reason, used=checkpoint)
        print(f"fallback: {rejected.path} is passed over: {rejected.reason}")
    events.write("finished", steps=step, checkpoint=checkpoint, reason=f"already at train.steps={total}")
    events.close()
    print(f"already at step {step} ({checkpoint}): nothing to do up to train.steps={total}, raise it to go on")
    sys.stdout.flush()


def _without_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what is no curve: extreme tokens, and numbers of every block."""
    return {
        key: _without_lists(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not isinstance(value, list)
    }


class Report:
    """The reporting of one run; a context manager that also tells how the run ended."""

    def __init__(self, start: Start, is_main: bool) -> None:
        self._start, self._is_main = start, is_main
        self._config, self._plan, self._run = start.config, start.plan, start.run
        self._metrics, self._events, self._wandb = JsonLines(None), EventLog(None), WandbLog()
        self._is_open = False
        self._folder: int | None = None
        self._checkpoints: tuple[int, int] | None = None
        self._bar: Any = None
        self._last_tev: dict[str, Any] = {}
        self._records: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._step = 0

    def start(self, num_rollbacks: int = 0) -> None:
        """Makes the run directory, cuts the record back to the resumed step and opens everything.

        Args:
            num_rollbacks: How often the guard has taken the run back so far.
        """
        start, progress = self._start, self._start.progress
        self._step = progress.step
        if not self._is_main:
            return
        self._run.create(self._config, start.checkpoint)
        self._folder = os.open(self._run.path, os.O_RDONLY | os.O_DIRECTORY)
        num_cut = cut_record(self._run.metrics, progress.step if start.kind == "training" else -1)
        self._records = read_record(self._run.metrics)
        self._metrics, self._events = JsonLines(self._run.metrics), EventLog(self._run.events)
        self._is_open = True
        self._events.write("start", step=progress.step, world_size=self._plan.world_size, commit=commit())
        self.say(short_report(self._config, self._plan, resolve_device(self._config)))
        if start.layout is not None:
            self.say("\n".join(choice_lines(start.layout)))
        self._tell_origin(num_cut)
        if num_cut > 0:
            self.say(f"removed from {self._run.metrics.name}: {num_cut} line(s) of steps that are done again")
        self._wandb = open_wandb(self._config, self._run, num_rollbacks)
        self.say(f"run directory {self._run.path}, wandb {self._wandb.mode}")
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._config.train.steps, initial=progress.step, unit="step", dynamic_ncols=True)

    def _tell_origin(self, num_cut: int) -> None:
        """Says where the run goes on, what was passed over on the way there, and what differs from now on.

        Args:
            num_cut: Lines removed from the record.
        """
        start, progress, checkpoint = self._start, self._start.progress, str(self._start.checkpoint)
        for rejected in start.rejected:
            self._events.write("fallback", passed_over=str(rejected.path), reason=rejected.reason, used=checkpoint)
            self.say(f"fallback: {rejected.path} is passed over: {rejected.reason}")
        if start.kind == "training":
            self._events.write("resume", step=progress.step, checkpoint=checkpoint, records_cut=num_cut)
            self.say(f"resumed from {checkpoint}: step {progress.step}, {progress.consumed_samples:,} samples read")
            self._tell_lost_record()
        elif start.kind == "weights":
            self._events.write("initialized_from", checkpoint=checkpoint, records_cut=num_cut)
            self.say(f"begins with the weights of {checkpoint}")
        elif num_cut > 0:
            self._events.write("begun_anew", records_cut=num_cut)
            self.say(f"the run here was stopped before its first checkpoint: it begins anew, from step {progress.step}")
        if start.notice is not None:
            self.say(start.notice)
        for change in start.changes:
            self._events.write("changed", field=change.field, was=change.was, now=change.now)
            self.say(f"changed from here on: {change}")

    def _tell_lost_record(self) -> None:
        """Says that the end of the record, up to the checkpoint of this start, is missing."""
        start, step = self._start, self._start.progress.step
        every = [change.was for change in start.changes if change.field == "train.log_every"]
        first = lost_from(self._records, step, max([self._config.train.log_every, *every]))
        if first is not None and start.goes_on_in_place:
            self._events.write("record_lost", first_step=first, last_step=step)
            self.say(f"{self._run.metrics} has no losses of steps {first} to {step}: the file was changed since then")

    def say(self, text: str) -> None:
        """Prints to the console, above the progress bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def event(self, event: str, **values: Any) -> None:
        """Appends to events.jsonl."""
        self._events.write(event, **values)

    def sync(self) -> str | None:
        """Puts the record on disk: a checkpoint must not outlive the lines of the steps before it.

        Returns:
            What another program has done to a file of the record, so that its lines can be found no more; else None.

        Raises:
            RecordLost: The run directory has been moved, removed or replaced: checkpoints have no place either.
        """
        if self._folder is None:
            return None
        check_same(self._run.path, self._folder)
        self._look_at_checkpoints()
        lost = []
        for log in (self._metrics, self._events):
            # Of one that is lost the other one still goes to disk.
            try:
                log.sync()
            except RecordLost as error:
                lost.append(str(error))
        return "; ".join(lost) or None

    def _look_at_checkpoints(self) -> None:
        """Says if the folder of checkpoints is another one than before: the run continues and saves into this one."""
        before, path = self._checkpoints, self._run.checkpoints
        try:
            found = path.stat()
            self._checkpoints = (found.st_dev, found.st_ino)
        except OSError:
            self._checkpoints = None
        if before is not None and self._checkpoints != before:
            self.event("checkpoints_replaced", path=str(path))
            self.say(
                f"{path} was moved, removed or replaced: the checkpoints that it held are not in its place any more"
            )

    def amend(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """Records what was measured late, after the run was resumed, in the line of its step; for rank 0.

        Args:
            progress: The counters of the step.
            values: What was measured.
        """
        if not values or not self._records or self._records[-1]["step"] != progress.step:
            self.measured(progress, values)
            return
        record = {**self._records.pop(), **values}
        self._metrics.close()
        replace_last(self._run.metrics, record)
        self._metrics = JsonLines(self._run.metrics)
        self._publish(record, values)

    def saved(self, save: FinishedSave) -> None:
        """Records a checkpoint that is complete."""
        self.event(
            "checkpoint",
            step=save.step,
            path=str(save.path),
            bytes=save.bytes,
            stall_seconds=round(save.stall_seconds, 4),
            write_seconds=round(save.write_seconds, 4),
        )
        if save.drift is not None:
            self.event("copies_differ", step=save.step, reason=save.drift)
            self.say(f"step {save.step}: {save.drift}; the owner's copy was saved")
        if save.not_removed is not None:
            self.event("not_removed", step=save.step, reason=save.not_removed)
            self.say(f"step {save.step}: the checkpoint is complete, but of earlier ones {save.not_removed}")

    def guarded(self, actions: Sequence[Action], factor: float, until: int | None) -> None:
        """Tells what the guard has decided, but for going back, which is told when it has been done.

        Args:
            actions: Its decisions.
            factor: What the learning rate of the next step is multiplied by.
            until: First step whose rate is the schedule's again; None: the next one's is.
        """
        for action in actions:
            if action.kind == "rollback":
                continue
            more = {"factor": factor, "until": until} if action.kind == "lower_rate" else {}
            self._events.write(f"guard_{action.kind}", step=action.step, reason=action.reason, **more)
            self._wandb.log(action.step, {f"guard/{action.kind}": more.get("factor", 1)})
            told = {"skip": "update left out", "lower_rate": f"learning rate times {factor:g}"}
            self.say(f"guard, step {action.step}: {told.get(action.kind, 'gives up')}: {action.reason}")

    def went_back(self, action: Action, number: int, progress: Progress, factor: float, until: int | None) -> None:
        """Takes the record back to where the run has gone back to; for rank 0.

        Args:
            action: The guard's decision.
            number: Of this rollback, from 1.
            progress: The counters to go on with.
            factor: What the learning rate of the next step is multiplied by.
            until: See `guarded`.
        """
        assert action.skipped is not None
        self._events.write(
            "guard_rollback",
            step=action.step,
            to_step=progress.step,
            skipped_from=action.skipped[0],
            skipped_to=action.skipped[1],
            factor=factor,
            until=until,
            reason=action.reason,
        )
        lowered = "" if until is None else f", learning rate times {factor:g}"
        self.say(
            f"guard, step {action.step}: back to step {progress.step}, samples {action.skipped[0]:,} to "
            f"{action.skipped[1] - 1:,} are not read again{lowered}: {action.reason}"
        )
        self._metrics.close()
        set_aside(self._run.metrics, self._run.rolled_back, progress.step, number)
        self._metrics, self._records = JsonLines(self._run.metrics), read_record(self._run.metrics)
        self._step = progress.step
        if self._bar is not None:
            self._bar.n = progress.step
            self._bar.refresh()
        self._wandb.log(action.step, {"guard/rollback": number, "guard/to_step": progress.step})
        # wandb's steps cannot go back: the run goes on under an id of its own.
        self._wandb.finish(ExitCode.DONE)
        self._wandb = open_wandb(self._config, self._run, number)

    def step_done(self, progress: Progress) -> None:
        """Notes how far the run has come, and moves the progress bar."""
        self._step = progress.step
        if self._bar is not None:
            self._bar.update()

    def measured(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """Records what was measured after a step; nothing measured, nothing recorded.

        Args:
            progress: The counters after the step.
            values: Any of the parts that the trainer makes: of the training step, of TEV, of the evaluation.
        """
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
        self._publish(record, values)

    def _publish(self, record: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Shows a line of the record, of which `values` are new."""
        step = record["step"]
        self._records.append(record)
        self._wandb.log(step, _without_lists(record))
        self._last_tev |= {key: value for key, value in values.items() if key in ("tev_mean", "tev_std")}
        total = self._config.train.steps
        if "loss" in values:
            self.say(train_line({**self._last_tev, **record}, total))
        elif "tev_mean" in values and step == 0:
            self.say(f"step {0:>{len(str(total))}}/{total} | {tev_text(values)}")
        if "validation_loss" in values:
            self.say(validation_line(record, total))

    def finished(self, progress: Progress, tokens_per_second: float, peak_memory_gib: float) -> None:
        """Prints the summary of a run that reached its last step."""
        if not self._is_main:
            return
        seconds = time.perf_counter() - self._started
        summary = {
            "steps": progress.step,
            "wall_seconds": round(seconds, 1),
            "tokens_per_second": round(tokens_per_second, 1),
            "peak_memory_gib": round(peak_memory_gib, 3),
            **{f"{name}_first": self._value(name, 0) for name in _CURVES},
            **{f"{name}_last": self._value(name, -1) for name in _CURVES},
        }
        self._events.write("finished", **summary)
        self._wandb.finish(ExitCode.DONE, {key: value for key, value in summary.items() if value is not None})
        self._close_bar()
        self.say("\n".join(self._summary_lines(summary)))

    def _value(self, name: str, index: int) -> float | None:
        """Returns the first (0) or last (-1) recorded value of a curve."""
        values = [record[name] for record in self._records if record.get(name) is not None]
        return values[index] if values else None

    def _summary_lines(self, summary: Mapping[str, Any]) -> list[str]:
        def curve(name: str, digits: int) -> str:
            first, last = summary[f"{name}_first"], summary[f"{name}_last"]
            return "not measured" if last is None else f"{first:.{digits}f} -> {last:.{digits}f}"

        def perplexity(name: str) -> str:
            last = summary[f"{name}_last"]
            return "" if last is None or last > 100 else f" (perplexity {math.exp(last):,.1f})"

        lines = [
            "",
            f"done: step {summary['steps']}/{self._config.train.steps} in {summary['wall_seconds']:.1f} s, "
            f"{summary['tokens_per_second']:,.0f} tokens/s on average, "
            f"peak memory {summary['peak_memory_gib']:.2f} GiB per rank",
            f"  train loss       {curve('loss', 4)}{perplexity('loss')}",
            f"  validation loss  {curve('validation_loss', 4)}{perplexity('validation_loss')}",
            f"  TEV mean         {curve('tev_mean', 5)}",
            f"  TEV std          {curve('tev_std', 5)}",
            f"record: {self._run.metrics} (one JSON object per line), events: {self._run.events}",
            f"next: continue with --resume auto and a larger train.steps; checkpoints are in {self._run.checkpoints}",
        ]
        if self._config.wandb.mode != "disabled" and any(self._run.wandb.glob("offline-run-*")):
            lines.append(f"      upload to Weights & Biases: wandb sync {self._run.wandb}/offline-run-*")
        return lines

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tells how the run ended, and closes everything."""
        self._close_bar()
        if self._is_main and error is not None and not self._is_open and self._run.events.exists():
            # A run that was to go on here ends before its first step; a new one leaves nothing behind.
            self._events = EventLog(self._run.events)
        code = ExitCode.DONE
        if isinstance(error, TrainingStopped):
            code = error.exit_code
            reason = "; ".join([str(error), *getattr(error, "__notes__", [])])
            event = "preempted" if code == ExitCode.PREEMPTED else "stopped"
            self._events.write(event, exit_code=int(code), reason=reason, **error.values)
            if self._is_main:
                print(f"stopped: {reason}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            code = ExitCode.INTERRUPTED
            self._events.write("interrupted", step=self._step, exit_code=int(code))
        elif error is not None:
            code = ExitCode.FAILED
            reason = f"{type(error).__name__}: {error}"[:2000]
            self._events.write("failed", step=self._step, exit_code=int(code), reason=reason)
        self._metrics.close()
        self._events.close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None
        # Last, since it may wait for a network.
        self._wandb.finish(code)
