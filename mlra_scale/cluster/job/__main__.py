"""The job: starts attempts, and does what follows when one has ended.

slurm/launch.sh runs `python -m mlra_scale.cluster.job ARGUMENTS OF THE TRAINING` inside a Slurm allocation. SIGUSR1
(from sbatch's --signal, before the time limit) and SIGTERM (preemption, scontrol requeue) make all ranks save after the
same step; the job then goes back to the queue. After a failure it restarts at once in its allocation where enough nodes
are left, else through the queue, without the nodes that were found to be bad.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from mlra_scale.cluster import slurm
from mlra_scale.cluster.check import CheckResult, check_on_this_node, overrides_of_ranks, with_absolute_paths
from mlra_scale.cluster.job.attempt import AttemptRunner
from mlra_scale.cluster.job.console import Console, in_words
from mlra_scale.cluster.job.policy import Decision, End, EndKind, decide, seconds_before_restart
from mlra_scale.cluster.job.spare import Spare
from mlra_scale.cluster.job.step import AttemptPlan
from mlra_scale.cluster.job_file import JobAttempt, JobFile, events_of, now, num_checkpoints, read_job_file, reason_of
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.config import ConfigError, Problem
from mlra_scale.model.validation import validate
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.run_directory import RunDirectory, WaitStopped, run_lock
from mlra_scale.training.start.device import Devices
from mlra_scale.training.start.plan import resolve_layout

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Slurm's, and those of a terminal: inside salloc a file of slurm/ can be run by hand."""
_FILE_WAITS = (10.0, 60.0, 300.0)
"""Seconds until a job that was queued again tries once more to use its run directory."""
_LOCK_SECONDS = 150.0
"""How long to wait for the lock of the run directory: a network file system keeps that of a lost node a while."""


def wait_for_stop(seconds: float, is_stop_asked: Callable[[], bool]) -> None:
    """Waits, or until a stop is asked for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_stop_asked():
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


class Job:
    """A job in its allocation.

    Args:
        arguments: Of the training.
        allocation: From Slurm.
        settings: From the launcher.
        is_stop_asked: Whether a signal has asked the job to stop.

    Raises:
        ConfigError: The arguments are wrong.
    """

    _file: JobFile
    _plan: AttemptPlan
    _started: float

    def __init__(
        self,
        arguments: Sequence[str],
        allocation: slurm.Allocation,
        settings: LauncherSettings,
        is_stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._allocation, self._is_stop_asked = allocation, is_stop_asked
        self._arguments = with_absolute_paths(arguments)
        parsed = build_parser().parse_intermixed_args(self._arguments)
        if parsed.run_dir is None:
            raise ConfigError([Problem("--run-dir", None, "is required: name a directory on a shared file system")])
        self._run = RunDirectory(Path(parsed.run_dir))
        self._config, self._named, _ = resolve(parsed)
        device = self._config.train.device
        self._settings = settings if device == "auto" else replace(settings, device=device)
        self._checks: dict[int, CheckResult] = {}  # by number of nodes; those that have found nothing wrong
        # Asked once: a restart then needs no answer of Slurm's controller before its ranks begin.
        self._address = cache(lambda node: slurm.address(node, is_stop_asked))
        self._too_few: set[int] = set()  # numbers of nodes that a check has refused
        self._usable = list(allocation.nodes)
        console = Console(self._run.logs / "console.log")
        self._say, self._print = console.say, console.print
        self._spare = Spare(self._runner, self._say)

    def run(self) -> int:
        """Runs the job under the lock of its run directory; job.json has the state in which it ended, however it ended.

        Returns:
            The batch script's exit code.

        Raises:
            ConfigError: The run directory cannot be used.
        """
        if not os.path.lexists(self._run.path):
            check = self._check_start(len(self._allocation.nodes))
            if check.kind == "bad_input":  # a mistake leaves nothing behind
                print(check.message, file=sys.stderr, flush=True)
                return ExitCode.BAD_INPUT
        waits = list(_FILE_WAITS)
        while True:
            try:
                with run_lock(self._run, _LOCK_SECONDS, ".job.lock", self._is_stop_asked):
                    self._open()
                    try:
                        return self._run_attempts()
                    except BaseException as error:
                        traceback.print_exc()
                        self._spare.discard()
                        code = self._fail(f"{type(error).__name__}: {error}", ExitCode.FAILED)
                        if isinstance(error, Exception):
                            return code
                        raise
            except WaitStopped as stopped:
                # Another job holds the run directory; its job.json is left alone.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print(f"stopped by a signal before it began: {stopped}", file=sys.stderr, flush=True)
                if slurm.how_slurm_ends_it(self._allocation) is None:
                    slurm.put_back(self._allocation, (), self._allocation.nodes, (), print)
                return ExitCode.DONE
            except ConfigError as error:
                # A full disk or a file server that does not answer has an OSError as its cause, a mistake of the user
                # has not. A job that has run before is not ended by it at once.
                is_passing = isinstance(error.__cause__, OSError) and self._allocation.num_requeues > 0
                if not is_passing or self._is_stop_asked() or not waits:
                    with contextlib.suppress(OSError, ValueError):
                        file = JobFile.read(self._run.job)
                        if file.job_id == self._allocation.job_id and file.attempts:
                            file.become("failed", " ".join(str(error).split()))
                    raise
                print(f"{error}; tried again in {waits[0]:.0f} s", file=sys.stderr, flush=True)
                wait_for_stop(waits.pop(0), self._is_stop_asked)

    def _open(self) -> None:
        """Reads job.json, ends the attempts in it that were killed with their job, and makes it this job's."""
        try:
            self._run.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = f"cannot be written ({error.strerror}); name another directory"
            raise ConfigError([Problem("--run-dir", str(self._run.path), remedy)]) from error
        self._file = file = read_job_file(self._run)
        allocation = self._allocation
        for attempt in file.attempts:
            if attempt.ended is None:
                attempt.has_progressed = num_checkpoints(events_of(self._run), attempt.started) > 0
                attempt.end, attempt.reason, attempt.ended = "failed", "killed together with its job", now()
        if file.job_id != allocation.job_id or file.state == "failed":
            # Submitted anew, or queued again by hand: a user has looked into the earlier failures.
            file.first_counted, file.excluded = len(file.attempts), {}
        file.job_id, file.name, file.command = allocation.job_id, allocation.name, self._arguments
        file.steps, file.num_requeues = self._config.train.steps, allocation.num_requeues
        file.console = str(self._run.logs / "console.log")
        file.become("pending")

    def _run_attempts(self) -> int:
        """Runs attempts until the job ends here; returns the exit code."""
        allocation = self._allocation
        self._say(f"job {allocation.job_id} on {len(allocation.nodes)} node(s): {' '.join(allocation.nodes)}")
        nodes, end = self._check_or_shrink(self._first_nodes())
        while True:
            end = end or self._attempt(nodes)
            self._usable = [node for node in self._usable if node not in end.bad_nodes]
            decision = decide(
                end,
                self._file.ends,
                self._usable,
                len(nodes) or len(allocation.nodes),
                self._divides_over,
                self._config.cluster,
                self._is_stop_asked(),
            )
            seconds = seconds_before_restart(self._file.ends)
            if decision.action != "restart" or seconds:
                self._spare.discard(end.bad_nodes)
            if decision.action != "restart":
                return self._carry_out(decision, end)
            if seconds:
                self._say(f"waits {seconds:.0f} s before it starts again")
                wait_for_stop(seconds, self._is_stop_asked)
            self._say(f"restarts on {len(decision.nodes)} node(s)")
            nodes, end = decision.nodes, self._stopped_before()
            if end is None and self._config.parallel.layout == "auto" and len(nodes) not in self._checks:
                nodes, end = self._check_or_shrink(nodes)  # another number than before: the planner chooses again

    def _first_nodes(self) -> tuple[str, ...]:
        """Returns the nodes for the first attempt: all, or if fewer will do those that were not found to be bad."""
        self._usable = [node for node in self._usable if node not in self._file.excluded]
        if not self._config.cluster.elastic:
            return tuple(self._usable) if len(self._usable) == len(self._allocation.nodes) else ()
        return tuple(self._usable[: self._most_nodes(len(self._usable)) or len(self._usable)])

    def _most_nodes(self, limit: int) -> int:
        """Returns the largest number of nodes up to a limit over which the configuration divides; 0: there is none."""
        return next((number for number in range(limit, 0, -1) if self._divides_over(number)), 0)

    def _divides_over(self, num_nodes: int) -> bool:
        """Whether so many nodes can run the configuration, with some layout where the planner chooses it."""
        if num_nodes in self._too_few:
            return False
        parallel = self._config.parallel.model_copy(update={"world_size": None})
        config = self._config.model_copy(update={"parallel": parallel})
        # As the latest check has seen them; before the first one they are unknown.
        seen = next(reversed(self._checks.values()), CheckResult())
        processes, device = self._settings.processes, self._settings.device
        devices = Devices(num_nodes * processes, processes, device, seen.device, seen.memory)
        try:
            config, _ = resolve_layout(config, self._named, devices)
            validate(config, num_nodes * processes, device=device)
        except ConfigError:
            return False
        return True

    def _check_or_shrink(self, nodes: tuple[str, ...]) -> tuple[tuple[str, ...], End | None]:
        """Returns the nodes that a check accepts, and what is wrong if there are none; see `_check`.

        If nothing fits on a part of the allocation, nodes are missing and the input is not bad: fewer nodes may still
        do (over which the batch divides otherwise), and all of them will.
        """
        while True:
            end, is_part = self._check(nodes), len(nodes) < len(self._allocation.nodes)
            if end is None or end.kind != "bad_input" or not is_part or self._config.parallel.layout == "manual":
                return nodes, end
            self._too_few.add(len(nodes))
            fewer = self._most_nodes(len(nodes) - 1)
            if not fewer:
                return (), self._refused("lost_node", f"the nodes that are left do not run it: {end.reason}")
            nodes = nodes[:fewer]

    def _check(self, nodes: Sequence[str]) -> End | None:
        """Prints the plan of the run, and returns what is wrong with it, found on one node before the ranks start."""
        if not nodes:
            bad = set(self._allocation.nodes) & set(self._file.excluded)
            message = f"Slurm has given nodes that were found to be bad: {' '.join(sorted(bad))}"
            return self._refused("bad_node", message)
        check = self._check_start(len(nodes))
        if check.plan:
            self._print(f"{check.plan}\n".encode(errors="replace"))
        stopped = self._stopped_before()
        if stopped is not None or check.kind is None:
            return stopped
        return self._refused(check.kind, check.message)

    def _check_start(self, num_nodes: int) -> CheckResult:
        """Checks the start on so many nodes; one that has found nothing wrong is not made again."""
        if num_nodes not in self._checks:
            check = check_on_this_node(
                self._arguments, self._allocation, self._settings, self._config, num_nodes, self._is_stop_asked
            )
            if check.kind is not None:
                return check
            self._checks[num_nodes] = check
        return self._checks[num_nodes]

    def _stopped_before(self) -> End | None:
        return self._refused("preempted", "stopped by a signal before it began") if self._is_stop_asked() else None

    def _refused(self, kind: EndKind, message: str) -> End:
        self._print(f"{message}\n".encode(errors="replace"))
        end = End(kind, " ".join(message.split()))
        if kind != "bad_input":
            # The cluster may be the cause: it counts like the end of an attempt, so that it cannot recur for ever.
            number, allocation = len(self._file.attempts) + 1, self._allocation
            self._file.attempts.append(
                JobAttempt(number, allocation.job_id, [allocation.here], 1, ended=now(), end=kind, reason=end.reason)
            )
        return end

    def _attempt(self, nodes: tuple[str, ...]) -> End:
        """Starts all ranks, waits for their end and records it."""
        number = len(self._file.attempts) + 1
        attempt = JobAttempt(number, self._allocation.job_id, list(nodes), len(nodes) * self._settings.processes)
        self._file.attempts.append(attempt)
        self._file.become("pending")
        num_before, self._started = len(events_of(self._run)), time.monotonic()
        self._say(f"attempt {number}: {attempt.num_ranks} rank(s) on {' '.join(nodes)}")
        try:
            self._plan = self._plan_of(nodes, number)
            spare = self._spare.take(self._plan)
            if spare is not None:
                self._say("the spare ranks begin")
            end = (spare or self._runner(self._plan)).run(self._tend_spare)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            # A full disk, a file server or Slurm's controller that does not answer, no descriptor or thread left: as
            # with a rank that fails, a later attempt may succeed.
            kind: EndKind = "preempted" if self._is_stop_asked() else "failed"
            end = End(kind, f"the job's own process failed: {in_words(error)}")
        events = events_of(self._run)[num_before:]
        end = replace(end, reason=reason_of(self._run, end.kind, attempt, events) or end.reason)
        attempt.end, attempt.reason, attempt.ended, attempt.failures = end.kind, end.reason, now(), [*end.failures]
        attempt.has_progressed = num_checkpoints(events) > 0
        self._file.excluded |= end.bad_nodes if end.kind == "bad_node" else {}
        self._file.write()
        self._say(f"attempt {number} ended: {end.kind}: {end.reason}")
        return end

    def _runner(self, plan: AttemptPlan) -> AttemptRunner:
        return AttemptRunner(plan, self._print, self._say, self._is_stop_asked, self._note_progress)

    def _note_progress(self) -> None:
        attempt = self._file.attempts[-1]
        if attempt.first_step_seconds is None:
            attempt.first_step_seconds = round(time.monotonic() - self._started, 1)
            self._file.become("running")
            self._say(f"attempt {attempt.number}: training since {attempt.first_step_seconds:.1f} s after its start")
            if self._config.cluster.spares:
                self._spare.plan(replace(self._plan, logs=self._run.attempt_logs(attempt.number + 1)))

    def _tend_spare(self) -> None:
        if self._is_stop_asked():
            self._spare.discard()
        self._spare.tend()

    def _plan_of(self, nodes: tuple[str, ...], number: int) -> AttemptPlan:
        config, settings, here = self._config, self._settings, self._allocation.here
        layout = self._checks.get(len(nodes), CheckResult()).overrides
        world_size = len(nodes) * settings.processes
        return AttemptPlan(
            nodes=nodes,
            here=here,
            addresses={node: self._address(node) for node in dict.fromkeys((here, *nodes))},
            training=(*self._arguments, *layout, *overrides_of_ranks(settings.device, world_size)),
            logs=self._run.attempt_logs(number),
            settings=settings,
            cluster=config.cluster,
            hang_seconds=60 * (config.cluster.hang_minutes or config.parallel.timeout_minutes / 2),
        )

    def _carry_out(self, decision: Decision, end: End) -> int:
        """Ends the job here as decided; returns the exit code."""
        if decision.action == "finish":
            self._file.become("done", decision.reason)
            return ExitCode.DONE
        if decision.action == "fail":
            return self._fail(decision.reason, ExitCode.BAD_INPUT if end.kind == "bad_input" else ExitCode.FAILED)
        self._file.become("preempted" if end.kind == "preempted" else "requeued", decision.reason)
        # From here on Slurm's signal is the expected end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            state = slurm.how_slurm_ends_it(self._allocation)
            if state is None:
                self._say(f"back to the queue: {decision.reason}")
                lost = end.bad_nodes if end.kind == "lost_node" else {}
                slurm.put_back(self._allocation, lost, self._usable, self._file.excluded, self._say)
                return ExitCode.DONE
        except slurm.SlurmError as error:
            return self._fail(f"cannot be queued again ({error}); {decision.reason}", ExitCode.FAILED)
        if state == "cancelled":
            self._file.become("cancelled", f"ended by Slurm (scancel, or the time limit); {decision.reason}")
        self._say(f"Slurm is ending the job already: {self._file.state}")
        return ExitCode.DONE

    def _fail(self, reason: str, code: int) -> int:
        """Ends the job for good; returns the exit code."""
        for attempt in self._file.attempts[-1:]:
            if attempt.ended is None:
                attempt.end, attempt.reason, attempt.ended = "failed", reason, now()
        self._file.become("failed", reason)
        self._say(f"the job ends and is not queued again: {reason}")
        return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code of the batch script."""
    arguments = sys.argv[1:] if argv is None else argv
    signals: list[int] = []
    for stop_signal in _STOP_SIGNALS:
        signal.signal(stop_signal, lambda number, frame: signals.append(number))

    def is_stop_asked() -> bool:
        return bool(signals)

    try:
        allocation = slurm.Allocation.of(os.environ, is_stop_asked)
        return Job(arguments, allocation, LauncherSettings.of(os.environ), is_stop_asked).run()
    except ConfigError as error:
        print(f"mlra_scale.cluster.job: bad input\n{textwrap.indent(str(error), '  ')}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    except slurm.SlurmError as error:
        print(f"mlra_scale.cluster.job: {error}", file=sys.stderr, flush=True)
        return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
