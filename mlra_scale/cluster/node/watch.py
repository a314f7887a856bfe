"""The thread of a node's agent between the ranks and the job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Link, host_and_port
from mlra_scale.cluster.job_file import JobAttempt, JobFile
from mlra_scale.cluster.messages import Heartbeat, NodeMessage, RankMessage, RankStatus
from mlra_scale.cluster.rank.heartbeat import HeartbeatSocket
from mlra_scale.cluster.rank.latch import Latch
from mlra_scale.cluster.slurm import SlurmError, requeue
from mlra_scale.cluster.versions import versions
from mlra_scale.process_tree import process_state, send_signal
from mlra_scale.training.run_directory import RunDirectory

_REPORT_SECONDS = 1.0
_JOB_SECONDS = 30.0
_RESTART_SECONDS = 360.0
"""How long a job that lives may wait between two attempts."""
_KILL_SECONDS = 15.0
"""How long torchrun may take to notice that its killed ranks are gone."""


def connect(job: str, node: str) -> Link:
    """Connects a node, by its name, with the job that listens at HOST:PORT."""
    host, port = host_and_port(job)
    token = os.environ[TOKEN_VARIABLE]
    return Link(host, port, {"node": node, "token": token, "pid": os.getpid(), "versions": versions()})


class Watch:
    """Listens to the ranks and to the job.

    Args:
        link: To the job.
        heartbeats: Where those of the ranks arrive.
        latch: Where the ranks wait until the job lets them begin.
        logs: Folder of this attempt's logs, in the run directory.
        node_rank: The node's number.
        lost_seconds: A job that was silent for so long is lost.
        processes: Returns all processes that were started here, the ranks among them; they are killed on order.
    """

    def __init__(
        self,
        link: Link,
        heartbeats: HeartbeatSocket,
        latch: Latch,
        logs: Path,
        node_rank: int,
        lost_seconds: float,
        processes: Callable[[], Iterable[int]],
    ) -> None:
        self._link, self._socket, self._latch = link, heartbeats, latch
        self._logs, self._node_rank, self._lost_seconds = logs, node_rank, lost_seconds
        self._directory = RunDirectory(logs.parents[1])
        self._processes = processes
        self._ranks: dict[int, tuple[Heartbeat, float]] = {}
        self._stopped: set[int] = set()
        self._stop = threading.Event()
        self._kill_at: float | None = None
        self._end: NodeMessage | None = None
        self._has_ended = threading.Event()
        self._has_lost_job = False
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals that ask for a stop; the job decides how long that may take."""
        self._stop.set()

    def report_end(self, end: NodeMessage) -> None:
        """Reports to the job how the ranks ended, and waits until the report is on its way."""
        self._end = end
        self._has_ended.wait(30.0)
        if self._has_lost_job:
            self._thread.join()  # it ends the process

    def _watch(self) -> None:
        try:
            self._run()
        except Exception:  # ranks that nobody watches must end: they and the job no longer hear each other
            traceback.print_exc()
            self._kill()
            os._exit(1)

    def _run(self) -> None:
        last_heard, last_report, has_reported_stop = time.monotonic(), 0.0, False
        while True:
            end = self._end  # before the last messages of the ranks are read
            self._hear_ranks()
            for message in self._link.receive():
                last_heard = time.monotonic()
                self._obey(message)
            now = time.monotonic()
            if end is not None:
                self._link.send(end.model_dump(exclude_unset=True))
                self._link.close()
                self._has_ended.set()
                return
            if not self._link.is_open or now - last_heard > self._lost_seconds:
                self._leave_lost_job()
            if self._stop.is_set():
                self._stop_ranks()
                if not has_reported_stop:
                    has_reported_stop = True
                    self._link.send({"signalled": True})
            if self._kill_at is not None and now > self._kill_at + _KILL_SECONDS:
                os._exit(1)  # the main thread is stuck, in a rendezvous perhaps
            if now - last_report >= _REPORT_SECONDS:
                last_report = now
                self._link.send({"ranks": [self._status(*rank) for rank in self._ranks.values()]})
            time.sleep(0.1)

    def _hear_ranks(self) -> None:
        for values in self._socket.receive():
            try:
                message = RankMessage.of(values)
            except ValueError:
                continue  # cut short, or of no rank of ours
            if message.heartbeat is not None:
                self._ranks[message.heartbeat.rank] = (message.heartbeat, time.monotonic())
            if message.bad_nodes is not None:
                self._link.send({"bad_nodes": message.bad_nodes})

    def _status(self, heartbeat: Heartbeat, heard: float) -> dict[str, Any]:
        silence = round(time.monotonic() - heard, 3)
        return RankStatus(heartbeat=heartbeat, silence=silence, state=process_state(heartbeat.pid)).model_dump()

    def _obey(self, message: dict[str, Any]) -> None:
        order = message.get("order")
        if order in ("begin", "stop"):
            self._latch.open()
        if order == "stop":
            self._stop.set()
        elif order == "stacks":
            for heartbeat, _ in self._ranks.values():
                send_signal(heartbeat.pid, signal.SIGUSR2)
        elif order == "kill":
            self._kill()

    def _stop_ranks(self) -> None:
        for heartbeat, _ in self._ranks.values():
            if heartbeat.pid not in self._stopped:
                self._stopped.add(heartbeat.pid)
                send_signal(heartbeat.pid, signal.SIGUSR1)

    def _kill(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic()
        # Not only ranks that have sent a heartbeat: one that has just been started has not.
        for pid in self._processes():
            send_signal(pid, signal.SIGKILL)
        if not self._ranks and not self._has_lost_job:
            os._exit(1)  # there is nothing to wait for

    def _leave_lost_job(self) -> NoReturn:
        """Ends the ranks, and sends the job back to the queue if its process is lost with the job's first node.

        With --no-kill Slurm would leave such a job on the nodes that are left until its time limit. Where only the
        batch script has ended, Slurm ends the job and signals this process; where the job continues without this node,
        it has begun another attempt. Ranks that only waited to begin leave that to those that train.
        """
        self._has_lost_job = True
        self._kill()
        if not self._latch.is_open:
            os._exit(1)
        time.sleep(_JOB_SECONDS + 2.0 * self._node_rank)  # of several nodes, the first queues the job again
        if any(attempt.ended is not None for attempt in self._attempts()[-1:]):
            time.sleep(_RESTART_SECONDS)  # the job may be waiting before it starts again
        attempts, job_id = self._attempts(), os.environ.get("SLURM_JOB_ID")
        is_newest = not attempts or self._logs == self._directory.attempt_logs(attempts[-1].number)
        if job_id is not None and not self._stop.is_set() and is_newest:
            with contextlib.suppress(SlurmError):
                requeue(job_id)
        os._exit(1)

    def _attempts(self) -> list[JobAttempt]:
        try:
            return JobFile.read(self._directory.job).attempts
        except (OSError, ValueError):
            return []
