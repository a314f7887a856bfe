"""Processes that benchmarks start: a command with a time-out, and ranks of a gloo group that answer commands.

Nothing that was started is left when these return.
"""

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Self
from unittest import mock

import psutil

GRACE_SECONDS = 5.0
"""Between SIGTERM, at which srun ends the tasks of a step on all nodes, and SIGKILL."""
START_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
"""One thread per rank, as torchrun has it; set before a rank imports torch."""


class CommandFailed(RuntimeError):
    """A command failed; the text ends with its output.

    Args:
        summary: Which command, and how it ended.
        output: What it wrote.
    """

    def __init__(self, summary: str, output: str = "") -> None:
        super().__init__(f"{summary}\n{output[-3000:]}".strip())
        lines = [re.sub(r"^\[rank\d+\]: ", "", line.strip()) for line in output.splitlines() if line.strip()]
        # Compilers print advice after their error, and launchers an error of their own without a reason.
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|Exit|Interrupt)\b", line)]
        with_reason = [line for line in errors if not line.endswith(":")]
        self.last_line = (with_reason or errors or lines or [summary])[-1]


def end_on_sigterm() -> None:
    """Lets SIGTERM end this process as Ctrl-C does, so that `run_command` ends what it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_command(
    name: str, command: Sequence[str], environment: Mapping[str, str], timeout_s: float, log: Path | None = None
) -> None:
    """Runs a command to its end.

    Args:
        name: Its name in errors.
        command: Its words.
        environment: Of the process.
        timeout_s: Seconds after which it, and all that it has started, is ended.
        log: Where its output goes; None: into the error only.

    Raises:
        CommandFailed: It ended with another exit code than 0, or was not done in time.
    """
    # A file instead of a pipe, and a session of its own: compilers start processes that would keep the pipe open, and
    # that must not outlive a command that is ended.
    with contextlib.ExitStack() as stack:
        file: IO[bytes]
        file = stack.enter_context(tempfile.TemporaryFile()) if log is None else stack.enter_context(log.open("w+b"))
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{name}: not done after {timeout_s:g} s") from None
        finally:
            _end(process)
        if code != 0:
            file.seek(0)
            raise CommandFailed(f"{name}: exit code {code}", file.read().decode(errors="replace"))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process that still runs, its descendants in any session, and the rest of its own session."""
    descendants: list[psutil.Process] = []
    if process.poll() is None:
        descendants = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    # The number of a group stays taken while one of its processes lives.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Ranks:
    """Processes that answer commands until the context ends, each a rank of a gloo process group.

    Args:
        name: Their name in errors.
        world_size: Number of processes.
        serve: A function at module level, called as serve(commands, *arguments) on every rank. It yields a first answer
            by itself, and one for every command of the iterator `commands`.
        arguments: Picklable.
        timeout_s: Seconds that an answer may take; the first one includes the start of the processes.

    Attributes:
        first: The first answers, by rank.

    Raises:
        RuntimeError: As from `ask`.
    """

    def __init__(
        self, name: str, world_size: int, serve: Callable[..., Iterator[Any]], *arguments: Any, timeout_s: float
    ) -> None:
        import torch.distributed as dist

        self._name, self._timeout_s = name, timeout_s
        context = multiprocessing.get_context("spawn")
        # The parent owns the store: no port is chosen before it is bound.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        with mock.patch.dict(os.environ, START_ENVIRONMENT):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                task = (rank, world_size, self._store.port, timeout_s, serve, arguments, theirs)
                process = context.Process(target=_work, args=task, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        try:
            self.first = self._collect()
        except BaseException:
            self.close()
            raise

    def ask(self, command: Any) -> list[Any]:
        """Sends a command to all ranks and returns their answers, by rank.

        Raises:
            RuntimeError: A rank raised, died, or did not answer in time.
        """
        for pipe in self._pipes:
            pipe.send(command)
        return self._collect()

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self) -> list[Any]:
        deadline, number = time.monotonic() + self._timeout_s, len(self._pipes)
        answers: dict[int, Any] = {}
        while len(answers) < number:
            waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready: list[Any] = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                raise RuntimeError(
                    f"{self._name}: rank(s) {late} of {number} were not done after {self._timeout_s:g} s"
                )
            for pipe in ready:
                try:
                    succeeded, content = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, content = False, "the process died"
                if not succeeded:
                    raise RuntimeError(f"{self._name}: rank {waiting[pipe]} of {number}: {content}")
                answers[waiting[pipe]] = content
        return [answers[rank] for rank in range(number)]


def _commands(pipe: Connection) -> Iterator[Any]:
    """Yields the parent's commands until it closes its end of the pipe."""
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


def _work(
    rank: int,
    world_size: int,
    port: int,
    timeout_s: float,
    serve: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
    pipe: Connection,
) -> None:
    """One process: joins the group, and answers until the pipe is closed or `serve` ends."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    with contextlib.suppress(BrokenPipeError):
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            for answer in serve(_commands(pipe), *arguments):
                pipe.send_bytes(pickle.dumps((True, answer)))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the libraries would delay the interpreter's end
