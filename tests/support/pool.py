"""Pools of worker processes for multi-process tests.

A process that has imported torch, DeepSpeed and Megatron costs about ten seconds, so one pool per world size serves
all tests of a session. A case runs on every rank in a process group of its own. Whatever goes wrong on any rank fails
the test at once with that rank's traceback or stack: an exception, a hang, a death.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from tests.support.worker import Case, WorkerPlan, run_worker

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
START_TIMEOUT = 180.0
LOG_LINES = 25
KEPT_WORLD_SIZES = (1, 2, 4)


class WorkerFailure(Exception):
    """A case failed on some rank.

    Attributes:
        problems: rank -> traceback, or a description of how the rank died or where it hung.
    """

    def __init__(self, summary: str, problems: dict[int, str]):
        self.problems = problems
        details = "".join(f"\n--- rank {rank} ---\n{text.rstrip()}" for rank, text in sorted(problems.items()))
        super().__init__(summary + details)


class WorkerPool:
    """``world_size`` worker processes, started at first use and again after a failure that left them unusable.

    Args:
        world_size: number of ranks.
        group_timeout: seconds after which a collective operation without its peers raises.
        grace: seconds that the other ranks get to report once one rank has failed.
    """

    def __init__(self, world_size: int, group_timeout: float = 180.0, grace: float = 10.0):
        if world_size < 1:
            raise ValueError(f"world_size {world_size} is not positive")
        self.world_size = world_size
        self.group_timeout = group_timeout
        self.grace = grace
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        self._store: Any = None
        self._logs: tempfile.TemporaryDirectory[str] | None = None
        self._killed: set[int] = set()
        self._cases = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers by rank; empty when the pool is down."""
        return [process.pid for process in self._processes if process.pid is not None]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Calls ``function(rank, world_size, *args)`` on every rank, with gloo as the default process group.

        Args:
            function: a function at module level of an importable module (a test module will do).
            args: picklable arguments, the same for every rank.
            timeout: seconds for the whole case; start-up of the processes does not count.

        Returns:
            The results by rank.

        Raises:
            WorkerFailure: some rank raised, hung or died.
        """
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(f"{function.__qualname__} is not a function that another process can import")
        payload = pickle.dumps(args)
        if not self._processes:
            self._start()
        self._cases += 1
        case = Case(self._cases, function.__module__, function.__qualname__, payload, tuple(sys.path))
        for connection in self._connections:
            try:
                connection.send(case)
            except OSError:
                # A rank that died between two cases: its sentinel tells which, below.
                continue
        results: dict[int, Any] = {}
        problems: dict[int, str] = {}
        try:
            self._collect(f"{case.module}.{case.function}", timeout, ("idle", "unclean"), results, problems)
        except BaseException:
            self.kill()
            raise
        if problems:
            raise WorkerFailure(f"{case.function} failed on rank(s) {sorted(problems)} of {self.world_size}", problems)
        return [pickle.loads(results[rank]) for rank in range(self.world_size)]

    def _start(self) -> None:
        import torch.distributed as dist

        context = multiprocessing.get_context("spawn")
        self._logs = tempfile.TemporaryDirectory(prefix="pool")
        # The parent owns the store, so no port is picked before it is bound and no rank's death takes it away.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with _environment(WORKER_ENVIRONMENT):
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                plan = WorkerPlan(
                    rank, self.world_size, self._store.port, self.group_timeout, self._log_path(rank), os.getpid()
                )
                process = context.Process(target=run_worker, args=(plan, theirs), name=f"pool{self.world_size}r{rank}")
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        atexit.register(self.kill)
        problems: dict[int, str] = {}
        try:
            self._collect("start-up", START_TIMEOUT, ("ready",), {}, problems)
        except BaseException:
            self.kill()
            raise

    def _collect(
        self, what: str, timeout: float, final: tuple[str, ...], results: dict[int, Any], problems: dict[int, str]
    ) -> None:
        """Receives messages until every rank has sent a final one; raises when a rank dies or time is up."""
        deadline, failed_at = time.monotonic() + timeout, None
        pending = set(range(self.world_size))
        while pending:
            by_object: dict[Any, int] = {self._connections[rank]: rank for rank in pending}
            by_object.update({self._processes[rank].sentinel: rank for rank in pending})
            limit = deadline if failed_at is None else min(deadline, failed_at + self.grace)
            ready = wait(list(by_object), timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                raise self._stuck(what, timeout, pending, problems)
            for rank in sorted({by_object[item] for item in ready}):
                message = self._receive(rank)
                if message is None:
                    raise self._died(what, rank, problems)
                kind, content = message
                if kind == "result":
                    results[rank] = content
                elif kind in ("error", "unclean"):
                    problems[rank] = problems.get(rank, "") + content
                    failed_at = failed_at or time.monotonic()
                if kind in final:
                    pending.discard(rank)
                if kind == "unclean":
                    raise WorkerFailure(f"{what}: rank {rank} could not clean up", problems)

    def _receive(self, rank: int) -> tuple[str, Any] | None:
        try:
            return self._connections[rank].recv() if self._connections[rank].poll() else None
        except (EOFError, ConnectionResetError):
            return None

    def _died(self, what: str, rank: int, problems: dict[int, str]) -> WorkerFailure:
        # A dying process closes its pipes first and has an exit code a moment later.
        wait([self._processes[rank].sentinel], timeout=1.0)
        self._kill_group(rank)
        self._processes[rank].join(2.0)
        code = self._processes[rank].exitcode
        how = f"killed by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        others = {other: text for other, text in problems.items() if other != rank}
        return WorkerFailure(f"{what}: rank {rank} died ({how})", others | {rank: self._log_tail(rank)})

    def _stuck(self, what: str, timeout: float, pending: set[int], problems: dict[int, str]) -> WorkerFailure:
        for rank in pending:
            os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.5)
        stacks = {rank: problems.get(rank, "") + self._log_tail(rank, 60) for rank in pending}
        if problems:
            summary = f"{what}: rank(s) {sorted(problems)} failed, rank(s) {sorted(pending)} did not finish after that"
        else:
            summary = f"{what}: rank(s) {sorted(pending)} hung, no answer in {timeout:g} s"
        return WorkerFailure(summary, problems | stacks)

    def _log_path(self, rank: int) -> Path:
        assert self._logs is not None
        return Path(self._logs.name) / f"rank{rank}.log"

    def _log_tail(self, rank: int, lines: int = LOG_LINES) -> str:
        path = self._log_path(rank)
        text = path.read_text(errors="replace") if path.exists() else ""
        return "last output:\n" + "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """Ends the workers politely, then by force."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            wait([process.sentinel], timeout=max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kills the workers and their children, and nothing else; the next run starts new ones."""
        for rank in range(len(self._processes)):
            self._kill_group(rank)
        for process in self._processes:
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._store = [], [], None
        self._killed.clear()
        if self._logs is not None:
            self._logs.cleanup()
            self._logs = None
        atexit.unregister(self.kill)

    def _kill_group(self, rank: int) -> None:
        """Kills a worker with all its descendants: it leads a process group of its own, see worker.py.

        Once only, and before anything reads the exit code: until then its process id cannot belong to anybody else.
        """
        if rank in self._killed:
            return
        self._killed.add(rank)
        process = self._processes[rank]
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # so young that it has no group yet
            process.kill()


class PoolRegistry:
    """Hands out one pool per world size; sizes that are rarely used live only until another one is asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, WorkerPool] = {}

    def __call__(self, world_size: int) -> WorkerPool:
        for size in [size for size in self._pools if size not in KEPT_WORLD_SIZES and size != world_size]:
            self._pools.pop(size).close()
        if world_size not in self._pools:
            self._pools[world_size] = WorkerPool(world_size)
        return self._pools[world_size]

    def close(self) -> None:
        """Ends all pools."""
        while self._pools:
            self._pools.popitem()[1].close()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started inside."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
