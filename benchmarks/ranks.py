"""Ranks of this machine that answer commands: for benchmarks that compare layouts, and for the pools of the tests.

Whatever goes wrong on a rank is an error at once, with that rank's traceback, or its stacks where it hangs. A rank dies
with the process that started it, and its own children die with it.
"""

import atexit
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Self
from unittest import mock

START_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
"""One thread per rank, as torchrun has it; set before a rank imports torch."""
_LOG_LINES, _STACK_LINES = 25, 60
_PR_SET_PDEATHSIG = 1
_starting = threading.Lock()
"""Held while the environment of this process is that of new ranks."""


class RanksFailed(RuntimeError):
    """Ranks raised an error, died or did not answer in time.

    Attributes:
        problems: By rank: a traceback, or how it died or where it hangs, with its last output.
    """

    def __init__(self, summary: str, problems: Mapping[int, str]) -> None:
        self.problems = dict(problems)
        details = "".join(f"\n--- rank {rank} ---\n{text.rstrip()}" for rank, text in sorted(problems.items()))
        super().__init__(summary + details)


@dataclass(frozen=True)
class Failed:
    """An answer that says that a command failed, by a rank that can answer further commands."""

    text: str


@dataclass(frozen=True)
class _Plan:
    """All that a rank needs at its start."""

    rank: int
    world_size: int
    store_port: int
    timeout_s: float
    joins_group: bool
    log: Path
    parent: int
    serve: Callable[..., Iterator[Any]]
    arguments: tuple[Any, ...]


class Ranks:
    """Processes that answer commands until the context ends.

    Args:
        name: Their name in errors.
        world_size: Number of processes.
        serve: A function at module level, called as serve(commands, *arguments) on every rank. It yields a first answer
            by itself, and one for every command of the iterator `commands`. Arguments and answers are picklable.
        timeout_s: Seconds that an answer may take; the first one includes the start of the processes.
        environment: Of the processes, beside START_ENVIRONMENT.
        grace_s: Seconds that the other ranks get to answer once one has failed.
        joins_group: Whether all ranks form a default gloo process group; RANK, MASTER_PORT and so on are always set.

    Attributes:
        first: The first answers, by rank; RanksFailed as from `ask`.
    """

    def __init__(
        self,
        name: str,
        world_size: int,
        serve: Callable[..., Iterator[Any]],
        *arguments: Any,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        grace_s: float = 10.0,
        joins_group: bool = True,
    ) -> None:
        import torch.distributed as dist

        self._name, self._timeout_s, self._grace_s = name, timeout_s, grace_s
        self._logs = tempfile.TemporaryDirectory(prefix="ranks-")
        # The parent owns the store: no port is chosen before it is bound, and no rank's death takes it away.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._killed: set[int] = set()
        context = multiprocessing.get_context("spawn")
        with _starting, mock.patch.dict(os.environ, {**START_ENVIRONMENT, **(environment or {})}):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                log = self._log(rank)
                plan = _Plan(
                    rank, world_size, self._store.port, timeout_s, joins_group, log, os.getpid(), serve, arguments
                )
                process = context.Process(target=_work, args=(plan, theirs), name=f"{name} {rank}")
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        atexit.register(self.kill)
        self.first = self.receive("start", timeout_s)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty when the ranks have been ended."""
        return [process.pid for process in self._processes if process.pid is not None]

    # Both ways by value: multiprocessing's own pickler would hand out file descriptors of tensors.
    def ask(self, command: Any, what: str = "", timeout_s: float | None = None) -> list[Any]:
        """Sends a command to all ranks and returns their answers, by rank; `what` names it in errors.

        Raises:
            RanksFailed: A rank failed. Unless all that failed answered `Failed`, all ranks have been ended.
        """
        for pipe in self._pipes:
            # The rank may have died since the last command: `receive` finds its pipe closed.
            with suppress(OSError):
                pipe.send_bytes(pickle.dumps(command))
        return self.receive(what or str(command), self._timeout_s if timeout_s is None else timeout_s)

    def receive(self, what: str, timeout_s: float) -> list[Any]:
        """Returns one answer of every rank, as `ask`; for ranks that answer more than once to a command."""
        what = f"{self._name}: {what}"
        problems: dict[int, str] = {}
        try:
            answers = self._receive_all(what, timeout_s, problems)
        except BaseException:
            self.kill()
            raise
        if problems:
            raise RanksFailed(f"{what} failed on rank(s) {sorted(problems)} of {len(self._pipes)}", problems)
        return [answers[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """Ends the ranks: by the end of their commands, then by force."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            wait([process.sentinel], timeout=max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kills the ranks and their children, and nothing else."""
        for rank in range(len(self._processes)):
            self._kill_group(rank)
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._logs.cleanup()
        atexit.unregister(self.kill)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive_all(self, what: str, timeout_s: float, problems: dict[int, str]) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        pending = set(range(len(self._pipes)))
        while pending:
            by_object: dict[Any, int] = {self._pipes[rank]: rank for rank in pending}
            by_object |= {self._processes[rank].sentinel: rank for rank in pending}
            ready = wait(list(by_object), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._stuck(what, timeout_s, pending, problems)
            for rank in sorted({by_object[item] for item in ready}):
                message = self._message(rank)
                if message is None:
                    raise self._died(what, rank, problems)
                kind, content = message
                pending.discard(rank)
                if kind == "answer" and not isinstance(content, Failed):
                    answers[rank] = content
                    continue
                problems[rank] = content.text if kind == "answer" else content
                deadline = min(deadline, time.monotonic() + self._grace_s)
                if kind == "raised":
                    raise RanksFailed(f"{what}: rank {rank} raised an error", problems)
        return answers

    def _message(self, rank: int) -> tuple[str, Any] | None:
        """Returns what a rank has sent; None if it has ended. A child of a dead rank may keep its pipe open."""
        try:
            return pickle.loads(self._pipes[rank].recv_bytes()) if self._pipes[rank].poll() else None
        except (EOFError, ConnectionResetError):
            return None

    def _died(self, what: str, rank: int, problems: dict[int, str]) -> RanksFailed:
        # A dying process closes its pipes first and has an exit code a moment later.
        wait([self._processes[rank].sentinel], timeout=1.0)
        self._kill_group(rank)
        self._processes[rank].join(2.0)
        code = self._processes[rank].exitcode
        how = f"killed by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return RanksFailed(f"{what}: rank {rank} died ({how})", problems | {rank: self._output(rank, _LOG_LINES)})

    def _stuck(self, what: str, timeout_s: float, pending: set[int], problems: dict[int, str]) -> RanksFailed:
        for rank in pending:
            os.kill(self.pids[rank], signal.SIGUSR1)  # writes the stacks of all threads into its log
        time.sleep(0.5)
        if problems:
            summary = f"rank(s) {sorted(problems)} failed, rank(s) {sorted(pending)} did not finish after that"
        else:
            summary = f"rank(s) {sorted(pending)} hung, no answer in {timeout_s:g} s"
        return RanksFailed(
            f"{what}: {summary}", problems | {rank: self._output(rank, _STACK_LINES) for rank in pending}
        )

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name) / f"rank{rank}.log"

    def _output(self, rank: int, lines: int) -> str:
        text = self._log(rank).read_text(errors="replace") if self._log(rank).exists() else ""
        return "last output:\n" + "\n".join(text.splitlines()[-lines:])

    def _kill_group(self, rank: int) -> None:
        """Kills a rank with all its descendants: it leads a process group of its own.

        Once only, and before anything reads the exit code: until then its process id cannot belong to anybody else.
        """
        if rank not in self._killed:
            self._killed.add(rank)
            process = self._processes[rank]
            assert process.pid is not None
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # so young that it has no group yet
                process.kill()


def alone(name: str, device: str, timeout_s: float, serve: Callable[..., Iterator[Any]], *arguments: Any) -> Any:
    """Returns the first answer of serve(commands, device, *arguments) in a process of its own, which then ends.

    Raises:
        RanksFailed: It failed, or did not answer in time.
    """
    # The process may form a process group of its own, with the store of this one.
    environment = {"DS_ACCELERATOR": device, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    options: dict[str, Any] = {"timeout_s": timeout_s, "environment": environment, "joins_group": False}
    with Ranks(name, 1, serve, device, *arguments, **options) as ranks:
        return ranks.first[0]


def _work(plan: _Plan, pipe: Connection) -> None:
    """One rank: answers until the pipe is closed or `serve` ends."""
    _leave_with_parent(plan.parent)
    _redirect_output(plan.log)
    place = {"RANK": plan.rank, "LOCAL_RANK": plan.rank, "WORLD_SIZE": plan.world_size, "MASTER_PORT": plan.store_port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with suppress(BrokenPipeError):
        try:
            if plan.joins_group:
                timeout = timedelta(seconds=plan.timeout_s)
                store = dist.TCPStore("127.0.0.1", plan.store_port, is_master=False, timeout=timeout)
                dist.init_process_group(
                    "gloo", store=store, rank=plan.rank, world_size=plan.world_size, timeout=timeout
                )
            for answer in plan.serve(_commands(pipe), *plan.arguments):
                pipe.send_bytes(pickle.dumps(("answer", answer)))
        except BaseException:
            pipe.send_bytes(pickle.dumps(("raised", traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the libraries would delay the interpreter's end


def _commands(pipe: Connection) -> Iterator[Any]:
    """Yields the parent's commands until it closes its end of the pipe."""
    with suppress(EOFError):
        while True:
            yield pickle.loads(pipe.recv_bytes())


def _leave_with_parent(parent: int) -> None:
    """Makes this process a group of its own, so that its children can be killed with it, that dies with its parent."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _redirect_output(path: Path) -> None:
    """Sends everything printed, also by native code, to a file, and makes SIGUSR1 write the stacks of all threads."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
