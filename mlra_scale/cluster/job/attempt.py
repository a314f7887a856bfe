"""One start of all ranks: srun, what the job hears of the nodes until its end, and how it ended."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Literal

from mlra_scale.cluster.channel import Hub
from mlra_scale.cluster.job import policy
from mlra_scale.cluster.job.policy import End, EndKind
from mlra_scale.cluster.job.step import AttemptPlan, start_step
from mlra_scale.cluster.messages import NodeMessage, RankFailure, RankStatus
from mlra_scale.cluster.slurm import SlurmError, end_process, hostnames
from mlra_scale.cluster.versions import odd_ones, versions
from mlra_scale.training.exit_codes import ExitCode

_WORKING = ("training", "evaluating", "saving", "rolling back")
_EVIDENCE_SECONDS = 5.0
"""After the first rank has failed, how long the others may take to report their own errors, before they are killed."""
_END_SECONDS = 60.0
"""After ranks of one node have ended well, how long those of others may take."""
_STACKS_SECONDS = 2.0
_CONNECT_SECONDS = 300.0
"""How long a node may take from srun to its first message: a container must be fetched, a cold file system read."""
_MEET_SECONDS = 300.0
"""How long ranks may take, once all have started, to connect and to check each other."""
_BROKEN_SECONDS = 2.0
"""How long srun may take to end after a connection broke or one of its tasks ended, if it ends with all tasks then;
and how long the last messages of a task may take to arrive."""
_KILL_SECONDS = 30.0
"""How long killed ranks and their nodes' agents may take to be gone."""
_DISCARD_SECONDS = 2.0
"""How long ranks that have not begun may take to end, and then srun."""
_TASK_ENDED = re.compile(rb"srun: error: (\S+): tasks? [\d,-]+: (.+)")
"""What srun prints when tasks of it end badly, with the nodes that they ran on."""
_SRUN_SECONDS = 3.0
"""How long srun may take to end ranks that nothing is heard of."""
_GONE_SECONDS = 0.5
"""How long srun may take to end when only lost nodes have not: it would wait until Slurm has given them up."""


@dataclass
class _Node:
    """What is known of a node; its `versions` come with its first message."""

    heard: float
    versions: dict[str, str] | None = None
    ranks: list[RankStatus] = field(default_factory=list)
    has_ended: bool = False
    has_reported: bool = False
    is_lost: bool = False
    broken_since: float | None = None
    was_misunderstood: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether nothing more is expected of it."""
        return self.has_ended or self.is_lost


class AttemptRunner:
    """Runs one start of all ranks, from srun to its end; for one thread.

    Args:
        plan: What to start.
        write_output: Takes the output of all ranks.
        say: Prints a line for the user.
        is_stop_asked: Whether a signal has asked the job to stop.
        on_progress: Called for each report of a node whose ranks train.
    """

    def __init__(
        self,
        plan: AttemptPlan,
        write_output: Callable[[bytes], None],
        say: Callable[[str], None],
        is_stop_asked: Callable[[], bool],
        on_progress: Callable[[], None],
    ) -> None:
        self._plan, self._write_output = plan, write_output
        self._is_spare = False
        self._say = lambda text: None if self._is_spare else say(text)
        self._is_stop_asked, self._on_progress = is_stop_asked, on_progress
        self._started = time.monotonic()
        self._nodes = {name: _Node(self._started) for name in plan.nodes}
        self._failures: list[RankFailure] = []
        self._bad_nodes: dict[str, str] = {}
        self._verdict: tuple[EndKind, str] | None = None
        self._stopping_since: float | None = None
        self._kill_at: float | None = None
        self._killed_at: float | None = None
        self._order_sent_at = 0.0
        self._step: tuple[Hub, subprocess.Popen[bytes]] | None = None
        self._ended_tasks: list[tuple[float, str, str]] = []

    def prepare(self, is_spare: bool = False) -> None:
        """Starts the nodes' agents and their ranks, which load their libraries and wait.

        `is_spare`: they do so at low priority, while others train on the nodes; until `run` nothing of them is printed.

        Raises:
            OSError: The folder of the logs cannot be written, or srun cannot be started.
        """
        self._is_spare, self._versions = is_spare, versions() if is_spare else {}
        self._step = _, process = start_step(self._plan, is_spare)
        self._output = threading.Thread(target=self._pump, args=(process.stdout,), daemon=True)
        self._output.start()

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> End:
        """Lets the ranks begin, which are started unless they are prepared, and waits for their end.

        `meanwhile` is called several times a second.

        Raises:
            OSError: See `prepare`.
        """
        if self._step is None:
            self.prepare()
        assert self._step is not None
        self._is_spare, self._started, self._order_sent_at = False, time.monotonic(), 0.0
        hub, process = self._step
        with contextlib.closing(hub):
            try:
                while process.poll() is None:
                    self._hear(hub, 0.25)
                    self._watch(hub)
                    self._end_if_due(hub, process)
                    if self._verdict is None and self._kill_at is None and self._stopping_since is None:
                        meanwhile()
                while self._hear(hub, 0.25):  # what was on its way when srun ended
                    continue
                self._find_unstarted()
                self._output.join(10.0)
            finally:
                # After an error of this loop; the next attempt must not meet the ranks of this one.
                end_process(process, _SRUN_SECONDS)
        return replace(self._judge(process.returncode), failures=tuple(map(str, self._ordered_failures())))

    def wait(self) -> Literal["failed", "loading", "waiting"]:
        """Hears of ranks that are prepared, and returns what they do, without a wait.

        It is called often: nodes that do not hear the job end their ranks.
        """
        assert self._step is not None
        hub, process = self._step
        self._hear(hub, 0.0)
        self._repeat_order(hub, "none")
        if process.poll() is not None or self._verdict is not None or self._kill_at is not None:
            return "failed"
        ranks = [rank for node in self._nodes.values() for rank in node.ranks]
        waiting = [rank for rank in ranks if rank.heartbeat.phase == "waiting" and rank.silence < policy.SILENT_SECONDS]
        return "waiting" if len(waiting) == len(self._nodes) * self._plan.settings.processes else "loading"

    def can_begin(self) -> bool:
        """Whether the ranks wait, and libraries and files are still those that they have loaded."""
        heard_since = time.monotonic() - self._plan.cluster.lost_node_seconds
        is_heard = self.wait() == "waiting" and all(node.heard > heard_since for node in self._nodes.values())
        return is_heard and versions() == self._versions

    @property
    def failure(self) -> str:
        """Why prepared ranks have failed, as far as it is known."""
        known = [*([self._verdict[1]] if self._verdict is not None else []), *map(str, self._failures)]
        return (known or [reason for _, _, reason in self._ended_tasks] or ["their srun has ended"])[0]

    def discard(self, keeps_logs: bool = False, lost: Collection[str] = ()) -> None:
        """Ends ranks that are prepared; when it returns they have ended, except on `lost` nodes and silent ones."""
        if self._step is None:
            return
        (hub, process), self._killed_at = self._step, time.monotonic()
        for name in lost:
            self._nodes[name].is_lost = True
        hub.send({"order": "kill"})
        while time.monotonic() < self._killed_at + _DISCARD_SECONDS and process.poll() is None:
            self._hear(hub, 0.1)
            if all(node.is_gone or node.versions is None for node in self._nodes.values()):
                break
        end_process(process, _GONE_SECONDS if lost else _DISCARD_SECONDS)
        hub.close()
        if not keeps_logs:
            shutil.rmtree(self._plan.logs, ignore_errors=True)

    def _pump(self, output: IO[bytes]) -> None:
        """Passes srun's output on, line by line; for a thread of its own."""
        for line in output:
            if not self._is_spare:
                self._write_output(line)
            if found := _TASK_ENDED.match(line):
                nodes, reason = (group.decode(errors="replace").strip() for group in found.groups())
                self._ended_tasks.append((time.monotonic(), nodes, reason))

    def _hear(self, hub: Hub, seconds: float) -> bool:
        """Takes what was heard, after a wait of at most so many seconds; returns whether anything was."""
        all_heard = hub.poll(seconds)
        for name, message in all_heard:
            node = self._nodes.get(name)
            if node is None:
                continue
            node.heard = time.monotonic()
            if message is None:
                self._take_break(name, node)
                continue
            try:
                self._take(hub, name, node, NodeMessage.of(message))
            except ValueError as error:
                # From another version of this package, perhaps: its node is then named as one.
                if not node.was_misunderstood:
                    self._say(f"{name} sent a message that is not understood: {error}")
                node.was_misunderstood = True
        return bool(all_heard)

    def _take_break(self, name: str, node: _Node) -> None:
        """Notes that the connection to a node has ended."""
        if self._killed_at is not None:
            node.has_ended = True
        elif not node.has_ended:
            node.broken_since = node.heard
            if self._are_connected():
                self._lose(name, "its connection broke")

    def _are_connected(self) -> bool:
        return all(node.versions is not None for node in self._nodes.values())

    def _take(self, hub: Hub, name: str, node: _Node, message: NodeMessage) -> None:
        if unknown := {*(message.bad_nodes or {})} - {*self._nodes}:
            raise ValueError(f"bad_nodes: {', '.join(sorted(unknown))} is not of this attempt")
        if message.versions is not None:
            node.versions = message.versions
            if self._are_connected():
                self._blame(odd_ones({each: other.versions or {} for each, other in self._nodes.items()}, versions()))
        if message.ranks is not None:
            node.ranks = [rank.model_copy(update={"node": name}) for rank in message.ranks]
            if any(rank.heartbeat.phase in _WORKING for rank in node.ranks):
                self._on_progress()
        if message.signalled and not self._is_spare:
            self._stop(hub, f"{name} was signalled")
        if message.failures is not None:
            node.has_ended = node.has_reported = True
            self._take_failures(name, message.failures)
        self._blame(message.bad_nodes or {})

    def _take_failures(self, name: str, failures: Sequence[RankFailure]) -> None:
        if not failures:
            self._kill_after(_END_SECONDS)
            return
        for failure in failures:
            is_ordered = self._killed_at is not None and failure.code == -signal.SIGKILL
            self._failures.append(failure.model_copy(update={"node": name, "is_ordered": is_ordered}))
        # Ranks end like this together.
        on_all = (ExitCode.PREEMPTED, ExitCode.NON_FINITE, ExitCode.UNSTABLE, ExitCode.EXPORT_FAILED)
        is_agreed = all(failure.code in on_all for failure in failures)
        if not is_agreed and self._verdict is None and self._stopping_since is None:
            self._say(f"{self._failures[-len(failures)]}; the attempt ends")
        self._kill_after(_END_SECONDS if is_agreed else _EVIDENCE_SECONDS)

    def _watch(self, hub: Hub) -> None:
        """Looks for what no message reports: a stop that was asked for, a silent node, ranks without progress."""
        now, limits = time.monotonic(), self._plan.cluster
        self._repeat_order(hub, "begin" if self._stopping_since is None else "stop")
        if self._is_stop_asked():
            self._stop(hub, "the job was signalled")
        self._lose_unconnected()
        for name, node in self._nodes.items():
            patience = _CONNECT_SECONDS if node.versions is None else limits.lost_node_seconds
            if node.is_gone:
                continue
            if node.broken_since is not None and now - node.broken_since > _BROKEN_SECONDS:
                self._lose(name, "its connection broke")
            elif now - node.heard > patience:
                self._lose(name, f"nothing was heard of it for {patience:.0f} s")
        ranks = [rank for node in self._nodes.values() for rank in node.ranks if not node.has_ended]
        if self._verdict is not None or self._kill_at is not None:
            return
        if self._stopping_since is not None and now - self._stopping_since > 60 * limits.stop_minutes:
            self._say(f"ranks did not stop within {60 * limits.stop_minutes:.0f} s of the signal; they are ended")
            self._kill_after(0.0)
        else:
            self._look_for_hang(hub, ranks)

    def _repeat_order(self, hub: Hub, order: str) -> None:
        """Repeats an order each second: it shows that the job lives, and reaches nodes that have connected since."""
        if time.monotonic() - self._order_sent_at > 1.0:
            self._order_sent_at = time.monotonic()
            hub.send({"order": order})

    def _look_for_hang(self, hub: Hub, ranks: Sequence[RankStatus]) -> None:
        plan, start_seconds = self._plan, 60 * self._plan.cluster.start_minutes
        (seconds, is_starting), limit = policy.hang_seconds(ranks), plan.hang_seconds
        if policy.are_meeting(ranks, len(plan.nodes) * plan.settings.processes):
            limit = min(start_seconds, _MEET_SECONDS)
        elif is_starting:
            seconds, limit = time.monotonic() - self._started, start_seconds
        if seconds <= limit:
            return
        whom = policy.describe(policy.suspects(ranks))
        reason = f"{'no first step' if is_starting else 'no progress'} for {seconds:.0f} s: {whom}"
        self._verdict = ("hung", reason)
        self._say(f"hang: {reason}")
        self._say(f"stacks are written to {plan.logs}/rank-*.stacks; the ranks are ended")
        hub.send({"order": "stacks"})
        self._kill_after(_STACKS_SECONDS)

    def _lose_unconnected(self) -> None:
        """Loses nodes whose agent has ended before it connected: no connection breaks; only srun's output shows it."""
        while self._ended_tasks and time.monotonic() - self._ended_tasks[0][0] > _BROKEN_SECONDS:
            _, node_list, reason = self._ended_tasks.pop(0)
            names = [node_list]
            if node_list not in self._nodes:
                with contextlib.suppress(SlurmError):
                    names = hostnames(node_list, self._is_stop_asked)
            for name in names:
                node = self._nodes.get(name)
                if node is not None and node.versions is None and not node.is_gone:
                    self._lose(name, f"its agent ended before it connected ({reason})")

    def _find_unstarted(self) -> None:
        """Names the nodes on which nothing was started: srun ends all tasks where it cannot start one of them."""
        are_broken = any(node.broken_since is not None and not node.has_ended for node in self._nodes.values())
        if are_broken and self._killed_at is None:
            for name, node in self._nodes.items():
                if node.versions is None:
                    self._lose(name, "its agent could not be started")

    def _stop(self, hub: Hub, why: str) -> None:
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            self._say(f"{why}: the ranks save after their step and stop")
            hub.send({"order": "stop"})

    def _lose(self, name: str, why: str) -> None:
        # This process lives on its own node, which is therefore not lost with its agent.
        is_here = name == self._plan.here
        self._nodes[name].has_ended |= is_here
        self._nodes[name].is_lost |= not is_here
        if self._verdict is None and self._kill_at is None:
            what = f"the agent of {name} ended without a report ({why})" if is_here else f"node {name} is lost: {why}"
            self._verdict = ("failed" if is_here else "lost_node", what)
            self._say(what)
        self._kill_after(0.0)

    def _blame(self, nodes: Mapping[str, str]) -> None:
        if not nodes:
            return
        reasons = {name: reason or "no reason is given" for name, reason in nodes.items()}
        for name, reason in reasons.items():
            if name not in self._bad_nodes:
                self._bad_nodes[name] = reason
                self._say(f"bad node {name}: {reason}")
        self._verdict = self._verdict or ("bad_node", "; ".join(f"{name}: {why}" for name, why in reasons.items()))
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
        if all(node.is_gone for node in self._nodes.values()):
            end_process(process, _GONE_SECONDS)
        elif now - self._killed_at > _KILL_SECONDS:
            end_process(process, _SRUN_SECONDS)

    def _ordered_failures(self) -> list[RankFailure]:
        """The cause first: a rank that was killed, then the earliest; ranks that the job has killed come last."""
        return sorted(self._failures, key=lambda failure: (failure.is_ordered, failure.code >= 0, failure.time))

    def _judge(self, srun_code: int) -> End:
        failures = self._ordered_failures()
        cause = str(failures[0]) if failures else ""
        if all(node.has_reported for node in self._nodes.values()) and not failures and not self._bad_nodes:
            return End("done", "all steps are done")
        if self._verdict is not None and self._verdict[0] == "bad_node":
            return End(*self._verdict, self._bad_nodes)
        if (end := policy.end_of_ranks(failures, self._plan.logs)) is not None:
            return end
        if self._stopping_since is not None:
            return End("preempted", f"stopped by a signal, without a checkpoint of its last step ({cause or 'killed'})")
        lost = {name: "was lost" for name, node in self._nodes.items() if node.is_lost}
        if self._verdict is not None:
            return End(*self._verdict, lost)
        if not failures:
            unheard = [name for name, node in self._nodes.items() if node.versions is None]
            cause = f"srun ended with exit code {srun_code} and " + (
                f"nothing was heard of {', '.join(unheard)}" if unheard else "the nodes did not report why"
            )
        return End("failed", cause, lost)
