"""Runs a function on several gloo processes of this machine and collects what it returns."""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

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
    import torch.distributed as dist

    context = multiprocessing.get_context("spawn")
    # The parent owns the store: no port is chosen before it is bound.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    before = {name: os.environ.get(name) for name in START_ENVIRONMENT}
    os.environ.update(START_ENVIRONMENT)
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            task = (rank, world_size, store.port, timeout_s, function, arguments, theirs)
            process = context.Process(target=_work, args=task, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(function.__name__, pipes, timeout_s)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for process in processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(name: str, pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(waiting.values())
            raise RuntimeError(f"{name}: rank(s) {late} of {len(pipes)} were not done after {timeout_s:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                is_good, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                is_good, content = False, "the process died"
            if not is_good:
                raise RuntimeError(f"{name}: rank {waiting[pipe]} of {len(pipes)}: {content}")
            results[waiting[pipe]] = content
    return [results[rank] for rank in range(len(pipes))]


def _work(
    rank: int,
    world_size: int,
    port: int,
    timeout_s: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    pipe: Connection,
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        answer = pickle.dumps((True, function(*arguments)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    with suppress(BrokenPipeError):
        pipe.send_bytes(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the libraries would hold up the interpreter's end
