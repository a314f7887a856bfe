"""Gloo processes of this machine: a function on each of them, or ranks that stay and answer commands."""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

START_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
"""One thread per process, as torchrun has it; set before a child imports torch."""


def on_processes(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> list[Any]:
    """Calls `function(*arguments)` in fresh processes, each a rank of a default gloo process group.

    Args:
        world_size: Number of processes.
        function: A function at module level of an importable module; finds its place with `torch.distributed`.
        *arguments: Picklable, the same on every rank.
        timeout_s: Seconds for everything, start-up of the processes included.

    Returns:
        What it returned (picklable), by rank.

    Raises:
        RuntimeError: A rank raised, died, or was not done in time; all are ended then.
    """
    with Ranks(function.__name__, world_size, _call, function, arguments, timeout_s=timeout_s) as ranks:
        return ranks.first


def _call(commands: Iterator[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Any]:
    yield function(*arguments)


class Ranks:
    """Processes that serve until the context ends, each a rank of a default gloo process group.

    Args:
        name: What errors call them.
        world_size: Number of processes.
        serve: A function at module level, called as serve(commands, *arguments) on every rank. It yields a first answer
            by itself, and one for every command that `commands` hands out.
        arguments: Picklable.
        timeout_s: Seconds that an answer may take; for the first one start-up included.
        environment: Of the processes, beside START_ENVIRONMENT.

    Attributes:
        first: The first answers, by rank.

    Raises:
        RuntimeError: As from `ask`.
    """

    def __init__(
        self,
        name: str,
        world_size: int,
        serve: Callable[..., Iterator[Any]],
        *arguments: Any,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        import torch.distributed as dist

        self._name, self._timeout_s = name, timeout_s
        context = multiprocessing.get_context("spawn")
        # The parent owns the store: no port is chosen before it is bound.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        with _environment({**START_ENVIRONMENT, **(environment or {})}):
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collect(self) -> list[Any]:
        deadline, number = time.monotonic() + self._timeout_s, len(self._pipes)
        answers: dict[int, Any] = {}
        while len(answers) < number:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                raise RuntimeError(
                    f"{self._name}: rank(s) {late} of {number} were not done after {self._timeout_s:g} s"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    is_good, content = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    is_good, content = False, "the process died"
                if not is_good:
                    raise RuntimeError(f"{self._name}: rank {waiting[pipe]} of {number}: {content}")
                answers[waiting[pipe]] = content
        return [answers[rank] for rank in range(number)]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _commands(pipe: Connection) -> Iterator[Any]:
    """Yields what the parent asks for, until it closes its end."""
    with suppress(EOFError):
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
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    with suppress(BrokenPipeError):
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            for answer in serve(_commands(pipe), *arguments):
                pipe.send_bytes(pickle.dumps((True, answer)))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the libraries would hold up the interpreter's end
