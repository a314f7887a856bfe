"""The job itself, on the first node of its allocation: starts attempts, and decides what follows when one has ended.

`python -m mlra_scale.cluster.job ARGUMENTS OF THE TRAINING`, inside a Slurm allocation; slurm/launch.sh calls it.

SIGUSR1 (from sbatch's --signal, before the time limit) and SIGTERM (preemption, scontrol requeue) make all ranks save
after the same step; the job then goes back to the queue. After a failure it goes on at once in its allocation where
the nodes for that are left, else through the queue, without the nodes that were found to be bad.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlra_scale.cluster import slurm
from mlra_scale.cluster.attempt import Attempt as Running
from mlra_scale.cluster.attempt import Plan
from mlra_scale.cluster.job_file import Attempt, JobFile, now
from mlra_scale.cluster.policy import Decision, End, EndKind, decide, seconds_before_restart
from mlra_scale.cluster.queue import ended_by_slurm, put_back
from mlra_scale.cluster.settings import Settings
from mlra_scale.config import Config, ConfigError, Problem, load_config, validate
from mlra_scale.train import build_parser
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.record import read_record
from mlra_scale.training.run_directory import RunDirectory, held

_CHECK_SECONDS = 300.0
_LOCK_SECONDS = 150.0
"""How long to wait for another job in the run directory: that of a lost node stays on a network file system a while."""


class Job:
    """A job in its allocation.

    Args:
        arguments: Of the training.
        allocation: From Slurm.
        settings: From the launcher.
        signals: Those that have come, which ask for a stop; handlers add to it.

    Raises:
        ConfigError: The arguments are wrong, or the run directory cannot be used.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        allocation: slurm.Allocation,
        settings: Settings,
        signals: Sequence[int] = (),
    ) -> None:
        self._allocation, self._settings = allocation, settings
        parsed = build_parser().parse_intermixed_args(arguments)
        self._run = RunDirectory(Path(parsed.run_dir).absolute())
        # A container may start elsewhere.
        paths = (("--run-dir", parsed.run_dir), ("--config", parsed.config), ("--ds-config", parsed.ds_config))
        absolute = [word for flag, path in paths if path is not None for word in (flag, str(Path(path).absolute()))]
        self._arguments = [*arguments, *absolute]
        self._config: Config = load_config(parsed.preset, parsed.config, parsed.ds_config, parsed.overrides)
        self._device = settings.device if self._config.train.device == "auto" else self._config.train.device
        self._signals = signals
        with _told_as_problems(self._run.path):
            self._run.logs.mkdir(parents=True, exist_ok=True)
            self._file = JobFile.read(self._run.job)
            self._console = (self._run.logs / "console.log").open("ab", buffering=0)
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
        earlier, nodes = self._file.ends, self._first_nodes()
        end = self._check(nodes) or self._attempt(nodes)
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
            nodes, earlier = decision.nodes, self._file.ends
            end = self._stopped_before() or self._attempt(nodes)

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
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.is_stop_asked:
            time.sleep(1.0)

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
        num_nodes = len(nodes)
        world_size, expected = num_nodes * self._settings.processes, self._config.parallel.world_size
        if expected not in (None, world_size) and not self._config.cluster.elastic:
            remedy = f"Slurm has given {num_nodes} node(s) for {self._settings.processes} rank(s) each; correct one"
            return self._refused("bad_input", str(Problem("parallel.world_size", expected, remedy)))
        command = ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={self._allocation.here}"]
        command += ["--overlap", "--input=none", *self._settings.srun]
        command += [*self._settings.python, "-m", "mlra_scale.train", *self._arguments, "--dry-run"]
        try:
            result = subprocess.run(
                [*command, f"parallel.world_size={world_size}"],
                env=slurm.step_environment(os.environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CHECK_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return self._refused("failed", str(error))
        self._print(result.stdout.encode())
        if result.returncode == 0:
            return self._stopped_before()
        if (stopped := self._stopped_before()) is not None:
            return stopped
        # srun ends with its task's exit code, and says so itself.
        lines = [line for line in result.stderr.splitlines() if not line.startswith("srun: error: ")]
        said = "\n".join(lines).strip() or f"the dry run ended with exit code {result.returncode}: {result.stderr}"
        return self._refused("bad_input" if result.returncode == ExitCode.BAD_INPUT else "failed", said)

    def _refused(self, kind: EndKind, said: str) -> End:
        self._print(f"{said}\n".encode())
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
        running = Running(self._plan(nodes, number), self._print, self._say, lambda: self.is_stop_asked, told)
        kind, reason, bad_nodes = running.run()
        reason = self._reason_of_run(kind, attempt) or reason
        attempt.end, attempt.reason, attempt.ended, attempt.failures = kind, reason, now(), running.failures
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
        (logs / "nonce").write_text(nonce, encoding="ascii")
        world_size = len(nodes) * settings.processes
        training = [*self._arguments, f"train.device={self._device}", f"parallel.world_size={world_size}"]
        hang_minutes = cluster.hang_minutes or self._config.parallel.timeout_minutes / 2
        return Plan(
            nodes=nodes,
            processes=settings.processes,
            device=self._device,
            master=slurm.address(nodes[0]),
            here=self._allocation.here,
            job_address=slurm.address(self._allocation.here),
            training=tuple(training),
            logs=logs,
            nonce=nonce,
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
        self._file.become("failed", reason)
        self._say(f"the job ends and is not queued again: {reason}")
        return code

    def _divides_over(self, num_nodes: int) -> bool:
        parallel = self._config.parallel.model_copy(update={"world_size": None})
        config = self._config.model_copy(update={"parallel": parallel})
        try:
            validate(config, num_nodes * self._settings.processes, device=self._device)
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
        return next((event["reason"] for event in reversed(events) if event["event"] == "stopped"), None)

    def _events(self) -> list[dict[str, Any]]:
        with contextlib.suppress(ValueError):
            return read_record(self._run.events)
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
        self._print(f"[job {datetime.now().astimezone().isoformat(timespec='milliseconds')}] {text}\n".encode())

    def _print(self, text: bytes) -> None:
        # Where a disk is full, the run goes on as long as its checkpoints find room.
        with contextlib.suppress(OSError):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        with contextlib.suppress(OSError):
            self._console.write(text)


def _is_progress(event: Mapping[str, Any]) -> bool:
    return event["event"] == "checkpoint" and event["step"] > 0


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
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    try:
        allocation, settings = slurm.Allocation.of(os.environ), Settings.of(os.environ)
        if "--dry-run" in arguments:
            world_size = f"parallel.world_size={len(allocation.nodes) * settings.processes}"
            return subprocess.run(
                [sys.executable, "-m", "mlra_scale.train", *arguments, world_size], check=False
            ).returncode
        parsed = build_parser().parse_intermixed_args(arguments)
        if parsed.run_dir is None:
            raise ConfigError([Problem("--run-dir", None, "is required: name a directory on a shared file system")])
        # A mistake leaves nothing behind.
        load_config(parsed.preset, parsed.config, parsed.ds_config, parsed.overrides)
        with held(RunDirectory(Path(parsed.run_dir)), _LOCK_SECONDS, ".job.lock"):
            return _run(Job(arguments, allocation, settings, signals))
    except ConfigError as error:
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        print(f"mlra_scale.cluster.job: bad input\n{lines}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    except slurm.SlurmError as error:
        print(f"mlra_scale.cluster.job: {error}", file=sys.stderr, flush=True)
        return ExitCode.FAILED


def _run(job: Job) -> int:
    try:
        return job.run()
    except Exception as error:  # whatever it is, job.json must not go on saying that the job runs
        traceback.print_exc()
        return job.fail(f"{type(error).__name__}: {error}", ExitCode.FAILED)


if __name__ == "__main__":
    sys.exit(main())
