"""One start of all ranks: srun, what is heard of it until its end, and how it ended."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Heard, Hub, endpoint
from mlra_scale.cluster.failure import Failure
from mlra_scale.cluster.hang import Seen, are_meeting, describe, hang_seconds, suspects
from mlra_scale.cluster.messages import FailedRank, NodeMessage
from mlra_scale.cluster.slurm import SlurmError, hostnames, slurm_environment, step_command
from mlra_scale.cluster.versions import odd_ones, versions
from mlra_scale.training.exit_codes import ExitCode

_EVIDENCE_SECONDS = 5.0
"""After the first rank has failed, how long the others may take to say what they met, before they are killed."""
_END_SECONDS = 60.0
"""After ranks of one node have ended well, how long those of others may take."""
_STACKS_SECONDS = 2.0
_CONNECT_SECONDS = 300.0
"""How long a node may take from srun to its first word: a container must be fetched, a cold file system read."""
_MEET_SECONDS = 300.0
"""How long ranks may take, once all are there, to connect and to check each other."""
_BROKEN_SECONDS = 2.0
"""How long srun may take to end after a connection broke or one of its tasks ended, if it ends with all tasks then;
and how long the last words of a task may be on their way."""
_KILL_SECONDS = 30.0
"""How long killed ranks and their nodes' agents may take to be gone."""
_TASK_ENDED = re.compile(rb"srun: error: (\S+): tasks? [\d,-]+: (.+)")
"""What srun says when tasks of it end badly, with the nodes that they ran on."""
_SRUN_SECONDS = 3.0
"""How long srun may take to end when only nodes that are lost have not: it would wait until Slurm has given them up."""


@dataclass(frozen=True)
class Plan:
    """What an attempt starts.

    Attributes:
        nodes: Names, in order of their ranks.
        processes: Ranks on each node.
        device: `cuda` or `cpu`.
        master: Address of the first node.
        here: Name of this process's node.
        job_address: Its address, as other nodes know it.
        listening_host: The address of this machine that it listens at; empty: all of them.
        training: Arguments of the training.
        logs: Folder of this attempt's logs; it exists.
        nonce: What the file `nonce` in it holds: a node that does not find it there does not share the run directory.
        memory: Of the ranks on each node, as srun takes it.
        cpu_bind: Their binding to cores, as srun takes it.
        srun: Further arguments of srun.
        python: What the agent of a node is started by: an interpreter, with a container's command before it perhaps.
        start_seconds: How long ranks may take to their first step.
        hang_seconds: No progress for so long is a hang.
        stop_seconds: How long ranks may take to stop once they are asked.
        lost_seconds: A node that was silent for so long is lost.
    """

    nodes: tuple[str, ...]
    processes: int
    device: str
    master: str
    here: str
    job_address: str
    listening_host: str
    training: tuple[str, ...]
    logs: Path
    nonce: str
    memory: str
    cpu_bind: str
    srun: tuple[str, ...]
    python: tuple[str, ...]
    start_seconds: float
    hang_seconds: float
    stop_seconds: float
    lost_seconds: float


@dataclass
class _Node:
    """What is known of a node."""

    heard: float
    has_connected: bool = False
    has_ended: bool = False
    has_reported: bool = False
    is_lost: bool = False
    broken_since: float | None = None
    was_misunderstood: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    ranks: list[Seen] = field(default_factory=list)


class Attempt:
    """One start of all ranks, from srun to its end; for one thread.

    Args:
        plan: What to start.
        console: Takes the output of all ranks.
        say: Tells the user something.
        is_stop_asked: Whether a signal has asked the job to stop.
        told: Called with the step when the first step begins, and about every second from then on.
    """

    def __init__(
        self,
        plan: Plan,
        console: Callable[[bytes], None],
        say: Callable[[str], None],
        is_stop_asked: Callable[[], bool],
        told: Callable[[int], None],
    ) -> None:
        self._plan, self._console, self._say = plan, console, say
        self._is_stop_asked, self._told = is_stop_asked, told
        self._started = time.monotonic()
        self._nodes = {name: _Node(self._started) for name in plan.nodes}
        self._failures: list[Failure] = []
        self._bad_nodes: dict[str, str] = {}
        self._stopping_since: float | None = None
        self._verdict: tuple[str, str] | None = None
        self._kill_at: float | None = None
        self._killed_at: float | None = None
        self._pinged_at = 0.0
        self._has_trained = False
        self._ended_tasks: list[tuple[float, str, str]] = []

    @property
    def failures(self) -> list[str]:
        """How ranks failed, in words, the cause first."""
        return [str(failure) for failure in self._ordered_failures()]

    def run(self) -> tuple[str, str, dict[str, str]]:
        """Starts the ranks and waits for their end.

        Returns:
            Kind of the end (policy.EndKind), reason, and bad nodes with reasons.
        """
        token = secrets.token_hex(16)
        with contextlib.closing(Hub(token, self._plan.listening_host)) as hub:
            process = self._srun(hub.port, token)
            try:
                output = threading.Thread(target=self._pump, args=(process.stdout,), daemon=True)
                output.start()
                while True:
                    is_over = process.poll() is not None
                    self._hear(hub, 0.0 if is_over else 0.25)
                    if is_over:
                        # What was on its way when srun ended.
                        self._hear(hub, 0.25)
                        self._find_unstarted()
                        break
                    self._watch(hub)
                    self._end_if_due(hub, process)
                output.join(10.0)
            finally:
                # After an error of this loop; the next attempt must not meet the ranks of this one.
                if process.poll() is None:
                    _end(process)
        return self._result(process.returncode)

    def _srun(self, port: int, token: str) -> subprocess.Popen[bytes]:
        plan = self._plan
        # A task's end is judged here, with what is known of all of them.
        options = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--unbuffered", *plan.srun]
        step = step_command(plan.nodes, plan.memory, plan.cpu_bind, options)
        step += [*plan.python, "-u", "-m", "mlra_scale.cluster.node"]
        step += [f"--job={endpoint(plan.job_address, port)}", f"--master={endpoint(plan.master, free_port())}"]
        step += [f"--run-id={plan.logs.name}", f"--nodes={len(plan.nodes)}", f"--processes={plan.processes}"]
        step += [f"--device={plan.device}", f"--logs={plan.logs}", f"--nonce={plan.nonce}"]
        step += [f"--start-seconds={plan.start_seconds}"]
        step += [f"--lost-seconds={plan.lost_seconds}", "--", *plan.training]
        return subprocess.Popen(
            step,
            env={**slurm_environment(os.environ), TOKEN_VARIABLE: token},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A signal to the job's process group is for the job; the ranks are told in order.
            start_new_session=True,
        )

    def _hear(self, hub: Hub, seconds: float) -> None:
        for heard in hub.poll(seconds):
            if heard.node not in self._nodes:
                continue
            node = self._nodes[heard.node]
            node.heard = time.monotonic()
            if heard.message is None:
                self._take_break(heard.node, node)
                continue
            try:
                self._take(hub, heard, node, NodeMessage.of(heard.message))
            except ValueError as error:
                # From another version of this package, perhaps: its node is then named as one.
                if not node.was_misunderstood:
                    self._say(f"{heard.node} said something that is not understood: {error}")
                node.was_misunderstood = True

    def _take_break(self, name: str, node: _Node) -> None:
        """Notes that the connection to a node has ended."""
        if self._killed_at is not None:
            node.has_ended = True
        elif not node.has_ended:
            node.broken_since = node.heard
            if all(other.has_connected for other in self._nodes.values()):
                self._lose(name, "its connection broke")

    def _take(self, hub: Hub, heard: Heard, node: _Node, message: NodeMessage) -> None:
        unknown = {*(message.bad_nodes or {}), *(message.ended.bad_nodes if message.ended else ())} - {*self._nodes}
        if unknown:
            raise ValueError(f"bad_nodes: {', '.join(sorted(unknown))} is not of this attempt")
        if message.versions is not None:
            node.has_connected, node.versions = True, message.versions
            if all(other.has_connected for other in self._nodes.values()):
                self._blame(odd_ones({name: other.versions for name, other in self._nodes.items()}, versions()))
        if message.ranks is not None:
            node.ranks = [Seen(heard.node, rank.beat.as_beat(), rank.silence, rank.state) for rank in message.ranks]
            # Not only where ranks are watched: a short run may end with the next message.
            self._note_training(node.ranks)
        if message.signalled:
            self._stop(hub, f"{heard.node} was signalled")
        if message.bad_nodes is not None:
            self._blame(message.bad_nodes)
        if message.ended is not None:
            node.has_ended = node.has_reported = True
            self._take_end(heard.node, message.ended.failures)
            self._blame(message.ended.bad_nodes)

    def _take_end(self, name: str, failures: Sequence[FailedRank]) -> None:
        are_ours = self._killed_at is not None
        found = [
            Failure(name, item.rank, item.code, item.time, item.message, are_ours and item.code == -signal.SIGKILL)
            for item in failures
        ]
        self._failures += found
        if not found:
            self._kill_after(_END_SECONDS)
            return
        is_agreed = all(
            failure.code in (ExitCode.PREEMPTED, ExitCode.NON_FINITE, ExitCode.UNSTABLE) for failure in found
        )
        if not is_agreed and self._verdict is None and self._stopping_since is None:
            self._say(f"{found[0]}; the attempt ends")
        self._kill_after(_END_SECONDS if is_agreed else _EVIDENCE_SECONDS)

    def _watch(self, hub: Hub) -> None:
        """Looks for what nobody tells: a stop that was asked for, a node that is silent, ranks that stand still."""
        now, plan = time.monotonic(), self._plan
        if now - self._pinged_at > 1.0:
            self._pinged_at = now
            # Tells a node that the job is there; a stop also reaches nodes that were not there when it was asked for.
            hub.send({"order": "none" if self._stopping_since is None else "stop"})
        if self._is_stop_asked():
            self._stop(hub, "the job was signalled")
        self._lose_unconnected()
        for name, node in self._nodes.items():
            patience = plan.lost_seconds if node.has_connected else _CONNECT_SECONDS
            if node.has_ended or node.is_lost:
                continue
            if node.broken_since is not None and now - node.broken_since > _BROKEN_SECONDS:
                self._lose(name, "its connection broke")
            elif now - node.heard > patience:
                self._lose(name, f"nothing was heard of it for {patience:.0f} s")
        seen = [rank for node in self._nodes.values() for rank in node.ranks if not node.has_ended]
        self._note_training(seen)
        if self._verdict is not None or self._kill_at is not None:
            return
        seconds, is_starting = hang_seconds(seen)
        limit = plan.hang_seconds
        if are_meeting(seen, len(plan.nodes) * plan.processes):
            limit = min(plan.start_seconds, _MEET_SECONDS)
        elif is_starting:
            seconds, limit = now - self._started, plan.start_seconds
        if self._stopping_since is not None and now - self._stopping_since > plan.stop_seconds:
            self._say(f"ranks did not stop within {plan.stop_seconds:.0f} s of the signal; they are ended")
            self._kill_after(0.0)
        elif seconds > limit:
            what = "no first step" if is_starting else "no progress"
            reason = f"{what} for {seconds:.0f} s: {describe(suspects(seen))}"
            self._verdict = ("hung", reason)
            self._say(f"hang: {reason}")
            self._say(f"stacks are written to {plan.logs}/rank-*.stacks; the ranks are ended")
            hub.send({"order": "stacks"})
            self._kill_after(_STACKS_SECONDS)

    def _note_training(self, seen: Sequence[Seen]) -> None:
        if any(rank.beat.doing in ("training", "evaluating", "saving", "rolling back") for rank in seen):
            self._has_trained = True
            self._told(max(rank.beat.step for rank in seen))

    def _pump(self, output: IO[bytes] | None) -> None:
        """Passes srun's output on, line by line; for a thread of its own."""
        assert output is not None
        for line in output:
            self._console(line)
            if found := _TASK_ENDED.match(line):
                nodes, reason = (group.decode(errors="replace").strip() for group in found.groups())
                self._ended_tasks.append((time.monotonic(), nodes, reason))

    def _lose_unconnected(self) -> None:
        """Loses nodes whose agent has ended before it connected: srun alone notices, as no connection breaks."""
        while self._ended_tasks and time.monotonic() - self._ended_tasks[0][0] > _BROKEN_SECONDS:
            _, node_list, reason = self._ended_tasks.pop(0)
            names = [node_list]
            if node_list not in self._nodes:
                with contextlib.suppress(SlurmError):
                    names = hostnames(node_list, self._is_stop_asked)
            for name in names:
                node = self._nodes.get(name)
                if node is not None and not (node.has_connected or node.has_ended or node.is_lost):
                    self._lose(name, f"its agent ended before it connected ({reason})")

    def _find_unstarted(self) -> None:
        """Names the nodes on which nothing was started: srun ends all tasks where it cannot start one of them."""
        are_broken = any(node.broken_since is not None and not node.has_ended for node in self._nodes.values())
        if are_broken and self._killed_at is None:
            for name, node in self._nodes.items():
                if not node.has_connected:
                    self._lose(name, "its agent could not be started")

    def _stop(self, hub: Hub, why: str) -> None:
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            self._say(f"{why}: the ranks save after their step and stop")
            hub.send({"order": "stop"})

    def _lose(self, name: str, why: str) -> None:
        if name == self._plan.here:
            # This process lives there: the node does too.
            self._nodes[name].has_ended = True
            if self._verdict is None and self._kill_at is None:
                self._verdict = ("failed", f"the agent of {name} ended without a word ({why})")
                self._say(self._verdict[1])
            self._kill_after(0.0)
            return
        self._nodes[name].is_lost = True
        if self._verdict is None and self._kill_at is None:
            self._verdict = ("lost_node", f"node {name} is lost: {why}")
            self._say(self._verdict[1])
        self._kill_after(0.0)

    def _blame(self, nodes: dict[str, str]) -> None:
        if not nodes:
            return
        for name, reason in nodes.items():
            if name not in self._bad_nodes:
                self._bad_nodes[name] = reason
                self._say(f"bad node {name}: {reason}")
        self._verdict = self._verdict or ("bad_node", "; ".join(f"{name}: {why}" for name, why in nodes.items()))
        self._kill_after(_EVIDENCE_SECONDS)

    def _kill_after(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self._kill_at = at if self._kill_at is None else min(self._kill_at, at)

    def _end_if_due(self, hub: Hub, process: subprocess.Popen[bytes]) -> None:
        now = time.monotonic()
        if self._kill_at is not None and now > self._kill_at and self._killed_at is None:
            self._killed_at = now
            hub.send({"order": "kill"})
        if self._killed_at is None:
            return
        are_reachable_ended = all(node.has_ended or node.is_lost for node in self._nodes.values())
        if are_reachable_ended or now - self._killed_at > _KILL_SECONDS:
            _end(process)

    def _ordered_failures(self) -> list[Failure]:
        """The cause first: what was killed, then the earliest; ranks that died of another's death come later."""
        return sorted(self._failures, key=lambda failure: (failure.is_ours, failure.code >= 0, failure.time))

    def _result(self, srun_code: int) -> tuple[str, str, dict[str, str]]:
        codes = {failure.code for failure in self._failures}
        failures = self._ordered_failures()
        cause = str(failures[0]) if failures else ""
        if all(node.has_reported for node in self._nodes.values()) and not failures and not self._bad_nodes:
            return "done", "all steps are done", {}
        if self._verdict is not None and self._verdict[0] == "bad_node":
            return *self._verdict, self._bad_nodes
        refused = [failure for failure in failures if failure.code == ExitCode.BAD_INPUT]
        if refused and all(failure.rank != 0 for failure in refused):
            # The first node has found nothing wrong: a file or a device is missing on these only.
            bad = {failure.node: f"{failure}; see its log in {self._plan.logs}" for failure in refused}
            return "bad_node", "; ".join(bad.values()), bad
        final = (ExitCode.BAD_INPUT, "bad_input"), (ExitCode.NON_FINITE, "non_finite"), (ExitCode.UNSTABLE, "unstable")
        for code, kind in final:
            if code in codes:
                return kind, next(str(failure) for failure in failures if failure.code == code), {}
        if ExitCode.PREEMPTED in codes:
            return "preempted", "stopped by a signal, with a checkpoint", {}
        lost = {name: "was lost" for name, node in self._nodes.items() if node.is_lost}
        if self._stopping_since is not None:
            return "preempted", f"stopped by a signal, without a checkpoint of its last step ({cause or 'killed'})", {}
        if self._verdict is not None:
            return *self._verdict, lost
        if not failures:
            unheard = [name for name, node in self._nodes.items() if not node.has_connected]
            cause = f"srun ended with exit code {srun_code} and " + (
                f"nothing was heard of {', '.join(unheard)}" if unheard else "the nodes did not say why"
            )
        return "failed", cause, lost


def free_port() -> int:
    """Returns a port of this machine that nobody uses; another one each time."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends srun, and with it its tasks; by force where it waits for nodes that are lost."""
    process.terminate()
    try:
        process.wait(_SRUN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
