"""The job itself, on the first node of its allocation: starts attempts, and decides what follows when one has ended.

`python -m mlra_scale.cluster.job ARGUMENTS OF THE TRAINING`, inside a Slurm allocation; slurm/launch.sh calls it.

SIGUSR1 (from sbatch's --signal, before the time limit) and SIGTERM (preemption, scontrol requeue) make all ranks save
after the same step; the job then goes back to the queue. After a failure it goes on at once in its allocation where
the nodes for that are left, else through the queue, without the nodes that were found to be bad.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

from mlra_scale.cluster import slurm
from mlra_scale.cluster.attempt import Attempt as Running
from mlra_scale.cluster.attempt import Plan
from mlra_scale.cluster.channel import listening_host
from mlra_scale.cluster.check import of_ranks
from mlra_scale.cluster.checking import Checked, check_on_this_node
from mlra_scale.cluster.job_file import Attempt, JobFile, now
from mlra_scale.cluster.policy import Decision, End, EndKind, decide, seconds_before_restart
from mlra_scale.cluster.queue import ended_by_slurm, put_back
from mlra_scale.cluster.settings import Settings
from mlra_scale.config import ConfigError, Problem, validate
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.layout import Devices, settled
from mlra_scale.training.record import read_record, write_atomically
from mlra_scale.training.run_directory import RunDirectory, WaitStopped, held

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Slurm's, and those of a terminal: inside salloc a file of slurm/ can be run by hand."""
_FILE_WAITS = (10.0, 60.0, 300.0)
"""Seconds until a job that was queued again tries once more to use its run directory."""
_LOCK_SECONDS = 150.0
"""How long to wait for another job in the run directory: that of a lost node stays on a network file system a while."""


def with_absolute_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the training's arguments with absolute paths at their end: a container may start elsewhere."""
    parsed = build_parser().parse_intermixed_args(arguments)
    paths = (("--run-dir", parsed.run_dir), ("--config", parsed.config), ("--ds-config", parsed.ds_config))
    words = [word for flag, path in paths if path for word in (flag, str(Path(path).absolute()))]
    files = [value for name, _, value in (each.partition("=") for each in parsed.overrides) if name == "cluster.file"]
    is_path = bool(files) and files[-1] not in ("", "null", "~")
    return [*arguments, *words, *([f"cluster.file={Path(files[-1]).absolute()}"] if is_path else [])]


def wait_for_stop(seconds: float, is_asked: Callable[[], bool]) -> None:
    """Waits, or until a stop is asked for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_asked():
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


class Job:
    """A job in its allocation.

    Args:
        arguments: Of the training.
        allocation: From Slurm.
        settings: From the launcher.
        signals: Those that have come, which ask for a stop; handlers add to it.
        checked: What a check of the start on all nodes of the allocation has found; None: it was not made.

    Raises:
        ConfigError: The arguments are wrong, or the run directory cannot be used.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        allocation: slurm.Allocation,
        settings: Settings,
        signals: Sequence[int] = (),
        checked: Checked | None = None,
    ) -> None:
        self._allocation, self._settings = allocation, settings
        self._checks = {} if checked is None or checked.kind is not None else {len(allocation.nodes): checked}
        self._too_few: set[int] = set()  # numbers of nodes that a check has refused
        self._arguments = with_absolute_paths(arguments)
        parsed = build_parser().parse_intermixed_args(self._arguments)
        self._run = RunDirectory(Path(parsed.run_dir))
        self._config, self._named, _ = resolve(parsed)
        self._device = settings.device if self._config.train.device == "auto" else self._config.train.device
        self._signals = signals
        with _told_as_problems(self._run.path):
            self._run.logs.mkdir(parents=True, exist_ok=True)
            self._file = JobFile.read(self._run.job)
        self._console: IO[bytes] | None = None
        self._usable = list(allocation.nodes)
        self._settle_unfinished()
        file = self._file
        if file.job_id != allocation.job_id or file.state == "failed":
            # Submitted anew, or queued again by hand: somebody has looked into it.
            file.first_counted, file.excluded = len(file.attempts), {}
        file.job_id, file.name, file.command = allocation.job_id, allocation.name, self._arguments
        file.steps, file.num_requeues = self._config.train.steps, allocation.num_requeues
        file.console = str(self._run.logs / "console.log")
        file.become("pending")

    @property
    def is_stop_asked(self) -> bool:
        """Whether a signal has asked the job to stop."""
        return bool(self._signals)

    def run(self) -> int:
        """Runs attempts until the job ends here; returns the batch script's exit code."""
        allocation, cluster = self._allocation, self._config.cluster
        self._say(f"job {allocation.job_id} on {len(allocation.nodes)} node(s): {' '.join(allocation.nodes)}")
        earlier = self._file.ends
        nodes, end = self._checked(self._first_nodes())
        end = end or self._attempt(nodes)
        while True:
            self._usable = [node for node in self._usable if node not in end.bad_nodes]
            decision = decide(
                end,
                earlier,
                self._usable,
                len(nodes) or len(allocation.nodes),
                self._divides_over,
                cluster.elastic,
                cluster.max_failures,
                cluster.max_preemptions,
                self.is_stop_asked,
            )
            if decision.action != "restart":
                return self._carry_out(decision, end)
            self._wait(seconds_before_restart(self._file.ends))
            self._say(f"goes on, on {len(decision.nodes)} node(s)")
            nodes, earlier, end = decision.nodes, self._file.ends, self._stopped_before()
            if end is None and self._config.parallel.layout == "auto" and len(nodes) not in self._checks:
                nodes, end = self._checked(nodes)  # another number than before: the planner chooses again
            end = end or self._attempt(nodes)

    def _first_nodes(self) -> tuple[str, ...]:
        """Returns the nodes for the first attempt: all, or if fewer will do those that were not found to be bad."""
        self._usable = [node for node in self._usable if node not in self._file.excluded]
        if not self._config.cluster.elastic:
            return tuple(self._usable) if len(self._usable) == len(self._allocation.nodes) else ()
        fitting = next((number for number in range(len(self._usable), 0, -1) if self._divides_over(number)), None)
        return tuple(self._usable[: fitting or len(self._usable)])

    def _stopped_before(self) -> End | None:
        return self._refused("preempted", "stopped by a signal before it began") if self.is_stop_asked else None

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._say(f"waits {seconds:.0f} s before it starts again")
        wait_for_stop(seconds, lambda: self.is_stop_asked)

    def _check(self, nodes: Sequence[str]) -> End | None:
        """Prints the plan of the run, and finds what is wrong with it, on one node, before the ranks start.

        Returns:
            What is wrong; None: nothing.
        """
        if not nodes:
            bad = set(self._allocation.nodes) & set(self._file.excluded)
            return self._refused(
                "bad_node", f"Slurm has given nodes that were found to be bad: {' '.join(sorted(bad))}"
            )
        checked = self._checks.get(len(nodes))
        if checked is None:
            checked = check_on_this_node(
                self._arguments,
                self._allocation,
                self._settings,
                self._config,
                len(nodes),
                lambda: self.is_stop_asked,
            )
        self._print(checked.plan.encode(errors="replace"))
        if (stopped := self._stopped_before()) is not None:
            return stopped
        if checked.kind is not None:
            return self._refused(checked.kind, checked.said)
        self._checks[len(nodes)] = checked
        return None

    def _checked(self, nodes: tuple[str, ...]) -> tuple[tuple[str, ...], End | None]:
        """Returns the nodes that a check accepts, and what is wrong if there are none; see `_check`.

        That nothing fits on a part of the allocation is the loss of nodes and no bad input: fewer nodes may still do
        (over which the batch divides otherwise), and all of them will.
        """
        while True:
            end, is_part = self._check(nodes), len(nodes) < len(self._allocation.nodes)
            if end is None or end.kind != "bad_input" or not is_part or self._config.parallel.layout == "manual":
                return nodes, end
            self._too_few.add(len(nodes))
            fewer = next((number for number in range(len(nodes) - 1, 0, -1) if self._divides_over(number)), 0)
            if not fewer:
                return (), self._refused("lost_node", f"the nodes that are left do not run it: {end.reason}")
            nodes = nodes[:fewer]

    def _refused(self, kind: EndKind, said: str) -> End:
        self._print(f"{said}\n".encode(errors="replace"))
        reason = " ".join(said.split())
        if kind != "bad_input":
            # Of the cluster's making, perhaps: it counts like the end of an attempt, so that it cannot go on for ever.
            number = len(self._file.attempts) + 1
            ended = Attempt(number, self._allocation.job_id, [self._allocation.here], 1, ended=now(), end=kind)
            ended.reason = reason
            self._file.attempts.append(ended)
        return End(kind, reason, False, {})

    def _attempt(self, nodes: tuple[str, ...]) -> End:
        """Starts all ranks, waits for their end and records it."""
        number = len(self._file.attempts) + 1
        attempt = Attempt(number, self._allocation.job_id, list(nodes), len(nodes) * self._settings.processes)
        self._file.attempts.append(attempt)
        self._file.become("pending")
        checkpoints_before, started = self._num_checkpoints(), time.monotonic()

        def told(step: int) -> None:
            if attempt.first_step_seconds is None:
                attempt.first_step_seconds = round(time.monotonic() - started, 1)
                self._file.become("running")
                self._say(f"attempt {number}: training since {attempt.first_step_seconds:.1f} s after its start")

        self._say(f"attempt {number}: {attempt.num_ranks} rank(s) on {' '.join(nodes)}")
        failures: list[str] = []
        try:
            running = Running(self._plan(nodes, number), self._print, self._say, lambda: self.is_stop_asked, told)
            kind, reason, bad_nodes = running.run()
            failures = running.failures
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            # A full disk, a file server that is away, Slurm's controller too, no descriptor or thread left: as with
            # a rank that fails, a later attempt may do better.
            reason = f"the job's own process failed: {_in_words(error)}"
            kind, bad_nodes = "preempted" if self.is_stop_asked else "failed", {}
        reason = self._reason_of_run(kind, attempt) or reason
        attempt.end, attempt.reason, attempt.ended, attempt.failures = kind, reason, now(), failures
        attempt.has_progressed = self._num_checkpoints() > checkpoints_before
        self._file.excluded |= bad_nodes if kind == "bad_node" else {}
        self._file.write()
        self._say(f"attempt {number} ended: {kind}: {reason}")
        return End(kind, reason, attempt.has_progressed, bad_nodes)  # type: ignore[arg-type]

    def _plan(self, nodes: tuple[str, ...], number: int) -> Plan:
        cluster, settings = self._config.cluster, self._settings
        logs = self._run.logs / f"attempt-{number:03d}"
        logs.mkdir(parents=True, exist_ok=True)
        nonce = secrets.token_hex(8)
        write_atomically(logs / "nonce", nonce)
        world_size = len(nodes) * settings.processes
        checked = self._checks.get(len(nodes))
        layout = () if checked is None else checked.layout
        training = [*self._arguments, *layout, *of_ranks(self._config, settings.device, world_size)]
        address = partial(slurm.address, is_stop_asked=lambda: self.is_stop_asked)
        job_address = address(self._allocation.here)
        hang_minutes = cluster.hang_minutes or self._config.parallel.timeout_minutes / 2
        return Plan(
            nodes=nodes,
            processes=settings.processes,
            device=self._device,
            master=address(nodes[0]),
            here=self._allocation.here,
            job_address=job_address,
            listening_host=listening_host(job_address, map(address, nodes)),
            training=tuple(training),
            logs=logs,
            nonce=nonce,
            memory=cluster.step_memory,
            cpu_bind=cluster.cpu_bind,
            srun=settings.srun,
            python=settings.python,
            start_seconds=60 * cluster.start_minutes,
            hang_seconds=60 * hang_minutes,
            stop_seconds=60 * cluster.stop_minutes,
            lost_seconds=cluster.lost_node_seconds,
        )

    def _carry_out(self, decision: Decision, end: End) -> int:
        """Ends the job here as decided; returns the exit code."""
        if decision.action == "finish":
            self._file.become("done", decision.reason)
            return 0
        if decision.action == "fail":
            return self.fail(decision.reason, ExitCode.BAD_INPUT if end.kind == "bad_input" else ExitCode.FAILED)
        self._file.become("preempted" if end.kind == "preempted" else "requeued", decision.reason)
        # From here on Slurm's signal is the expected end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            state = ended_by_slurm(self._allocation)
            if state is None:
                self._say(f"back to the queue: {decision.reason}")
                lost = end.bad_nodes if end.kind == "lost_node" else {}
                put_back(self._allocation, lost, self._usable, self._file.excluded, self._say)
                return 0
        except slurm.SlurmError as error:
            return self.fail(f"cannot be queued again ({error}); {decision.reason}", ExitCode.FAILED)
        if not state.is_queued_again:
            self._file.become("cancelled", f"ended by Slurm (scancel, or the time limit); {decision.reason}")
        self._say(f"Slurm has the job in state {state.name} already: {self._file.state}")
        return 0

    def fail(self, reason: str, code: int) -> int:
        """Ends the job for good; returns the exit code."""
        for attempt in self._file.attempts[-1:]:
            if attempt.ended is None:
                attempt.end, attempt.reason, attempt.ended = "failed", reason, now()
        self._file.become("failed", reason)
        self._say(f"the job ends and is not queued again: {reason}")
        return code

    def _divides_over(self, num_nodes: int) -> bool:
        """Whether so many nodes can run the configuration, with some layout where the planner chooses it."""
        parallel = self._config.parallel.model_copy(update={"world_size": None})
        config = self._config.model_copy(update={"parallel": parallel})
        number = num_nodes * self._settings.processes
        if num_nodes in self._too_few:
            return False
        # As the latest check has seen them; before the first one nobody knows.
        seen = next(reversed(self._checks.values()), Checked(None))
        devices = Devices(number, self._settings.processes, self._device, seen.device, seen.memory)
        try:
            config, _ = settled(config, self._named, devices)
            validate(config, number, device=self._device)
        except ConfigError:
            return False
        return True

    def _num_checkpoints(self) -> int:
        """How many checkpoints the run has recorded so far; the one of step 0 is no progress."""
        return sum(map(_is_progress, self._events()))

    def _reason_of_run(self, kind: str, attempt: Attempt) -> str | None:
        """What the run itself recorded of its end, or said in the log of rank 0 if it did not get as far as that."""
        if kind == "bad_input":
            with contextlib.suppress(OSError):
                log = self._run.logs / f"attempt-{attempt.number:03d}" / "rank-00000.log"
                if said := " ".join(log.read_text(errors="replace").partition("bad input")[2].split()):
                    return said[:2000]
        if kind not in ("bad_input", "non_finite", "unstable", "failed"):
            return None
        events = [event for event in self._events() if event["time"] >= attempt.started]
        return next((event.get("reason") for event in reversed(events) if event["event"] == "stopped"), None)

    def _events(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            return [event for event in read_record(self._run.events) if _is_event(event)]
        return []

    def _settle_unfinished(self) -> None:
        """Finds out about an attempt that was killed together with its job whether it had completed a checkpoint."""
        for attempt in self._file.attempts:
            if attempt.ended is None:
                events = [event for event in self._events() if event["time"] >= attempt.started]
                attempt.has_progressed = any(map(_is_progress, events))
                attempt.end, attempt.ended = "failed", now()
                attempt.reason = "killed together with its job"

    def _say(self, text: str) -> None:
        line = f"[job {datetime.now().astimezone().isoformat(timespec='milliseconds')}] {text}\n"
        self._print(line.encode(errors="backslashreplace"))

    def _print(self, text: bytes) -> None:
        # Where a disk is full, the run goes on as long as its checkpoints find room.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        with contextlib.suppress(OSError):
            if self._console is None:
                self._console = (self._run.logs / "console.log").open("ab", buffering=0)
            self._console.write(text)


def _in_words(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(f"{type(error).__name__}: {error}".split())
    remedy = "; make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{error.filename or 'an operation without a file'}: {error.strerror}{remedy}"


def _is_event(event: Any) -> bool:
    return isinstance(event, dict) and isinstance(event.get("time"), str) and isinstance(event.get("event"), str)


def _is_progress(event: Mapping[str, Any]) -> bool:
    return event["event"] == "checkpoint" and isinstance(event.get("step"), int) and event["step"] > 0


@contextlib.contextmanager
def _told_as_problems(path: Path):  # type: ignore[no-untyped-def]
    try:
        yield
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); name another directory"
        raise ConfigError([Problem("--run-dir", str(path), remedy)]) from error
    except ValueError as error:
        raise ConfigError([Problem("--run-dir", str(path), str(error))]) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code of the batch script."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    signals: list[int] = []
    for stop_signal in _STOP_SIGNALS:
        signal.signal(stop_signal, lambda number, frame: signals.append(number))
    try:
        allocation = slurm.Allocation.of(os.environ, lambda: bool(signals))
        settings = Settings.of(os.environ)
        parsed = build_parser().parse_intermixed_args(arguments)
        if parsed.run_dir is None:
            raise ConfigError([Problem("--run-dir", None, "is required: name a directory on a shared file system")])
        # A mistake leaves nothing behind.
        config, _, _ = resolve(parsed)
        run, checked = RunDirectory(Path(parsed.run_dir).absolute()), None
        if not os.path.lexists(run.path):
            words, number = with_absolute_paths(arguments), len(allocation.nodes)
            checked = check_on_this_node(words, allocation, settings, config, number, lambda: bool(signals))
            if checked.kind == "bad_input":
                print(checked.said, file=sys.stderr, flush=True)
                return ExitCode.BAD_INPUT
        return _run(run, allocation, lambda: Job(arguments, allocation, settings, signals, checked), signals)
    except ConfigError as error:
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        print(f"mlra_scale.cluster.job: bad input\n{lines}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    except slurm.SlurmError as error:
        print(f"mlra_scale.cluster.job: {error}", file=sys.stderr, flush=True)
        return ExitCode.FAILED


def _run(run: RunDirectory, allocation: slurm.Allocation, make_job: Callable[[], Job], signals: Sequence[int]) -> int:
    """Runs the job alone in its run directory; whatever happens, job.json has the state in which it ended."""
    waits = list(_FILE_WAITS)
    while True:
        try:
            with held(run, _LOCK_SECONDS, ".job.lock", lambda: bool(signals)):
                job = make_job()
                try:
                    return job.run()
                except BaseException as error:
                    traceback.print_exc()
                    code = job.fail(f"{type(error).__name__}: {error}", ExitCode.FAILED)
                    if isinstance(error, Exception):
                        return code
                    raise
        except WaitStopped as stopped:
            return _put_back_unstarted(allocation, str(stopped))
        except ConfigError as error:
            # A full disk or a file server that is away; a mistake has no such cause. A job that has run is not ended
            # by it at once.
            if not isinstance(error.__cause__, OSError) or allocation.num_requeues == 0 or signals or not waits:
                _note_failure(run, allocation, str(error))
                raise
            print(f"{error}; tried again in {waits[0]:.0f} s", file=sys.stderr, flush=True)
            wait_for_stop(waits.pop(0), lambda: bool(signals))


def _put_back_unstarted(allocation: slurm.Allocation, reason: str) -> int:
    """Sends a job back to the queue that has no hold of its run directory, whose job.json it leaves alone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"stopped by a signal before it began: {reason}", file=sys.stderr, flush=True)
    if ended_by_slurm(allocation) is None:
        put_back(allocation, (), allocation.nodes, (), print)
    return 0


def _note_failure(run: RunDirectory, allocation: slurm.Allocation, reason: str) -> None:
    """Writes into job.json that this job has failed, if it is about this job."""
    with contextlib.suppress(OSError, ValueError):
        file = JobFile.read(run.job)
        if file.job_id == allocation.job_id and file.attempts:
            file.become("failed", " ".join(reason.split()))


if __name__ == "__main__":
    sys.exit(main())
