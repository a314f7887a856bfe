"""The processes of benchmarks/planner.py: pairs of ranks that keep an engine ready and do what they are told."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.tensor_memory import recording, reset_resident_peak, resident_peak
from mlra_scale.config import BatchPlan, Config, batch_plan
from mlra_scale.data import Batch

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= {"KINETO_LOG_LEVEL": "99"}
LEARNING_RATE = 1e-4
RANKS = 2


@dataclass(frozen=True)
class Memory:
    """What a rank held, in bytes.

    Attributes:
        tensors: Peak of all tensors within steps after the first.
        resident: Peak of the resident size in steps, beyond what it was before the engine was built.
    """

    tensors: int
    resident: int


class Pair:
    """Processes that hold one rank of a layout each, for as long as the pair is open.

    Args:
        name: What errors call it.
        serve: A function at module level, called as serve(commands, *arguments) on every rank: yields an answer for
            every command that `commands` hands out.
        arguments: Picklable.
        timeout_s: Seconds that an answer may take.
    """

    def __init__(self, name: str, serve: Callable[..., Iterator[Any]], *arguments: Any, timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        context = multiprocessing.get_context("spawn")
        # The parent owns the store: no port is chosen before it is bound.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        with _environment(ENVIRONMENT):
            for rank in range(RANKS):
                ours, theirs = context.Pipe()
                task = (rank, self._store.port, timeout_s, serve, arguments, theirs)
                process = context.Process(target=_work, args=task, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        try:
            self._collect()
        except BaseException:
            self.close()
            raise

    def ask(self, command: Any) -> list[Any]:
        """Sends a command to both ranks and returns their answers."""
        for pipe in self._pipes:
            pipe.send(command)
        return self._collect()

    def close(self) -> None:
        """Ends both processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def _collect(self) -> list[Any]:
        deadline = time.monotonic() + self.timeout_s
        answers: dict[int, Any] = {}
        while len(answers) < RANKS:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(
                    f"{self.name}: rank(s) {sorted(waiting.values())} did not answer in {self.timeout_s:g} s"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    is_good, content = pipe.recv()
                except EOFError:
                    is_good, content = False, "the process died"
                if not is_good:
                    raise RuntimeError(f"{self.name}: rank {waiting[pipe]}: {content}")
                answers[waiting[pipe]] = content
        return [answers[rank] for rank in range(RANKS)]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(
    rank: int, port: int, timeout_s: float, serve: Callable[..., Any], arguments: tuple[Any, ...], pipe: Connection
) -> None:
    """One process: joins the group, tells that it is ready, and answers until it is ended."""
    import logging

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
        for answer in serve(iter(pipe.recv, None), *arguments):
            pipe.send((True, answer))
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def micro_batches(config: Config, plan: BatchPlan, step: int) -> list[Batch]:
    """One rank's micro-batches of random tokens; which ones, does not matter to time and memory."""
    generator = torch.Generator().manual_seed(step)
    size = (plan.micro_batch_size, plan.sequence_length + 1)
    batches = []
    for _ in range(plan.accumulation_steps):
        tokens = torch.randint(config.model.vocab_size, size, generator=generator)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(plan.sequence_length).expand_as(inputs).contiguous()
        batches.append(Batch(inputs, targets, positions, torch.zeros_like(inputs), torch.arange(plan.micro_batch_size)))
    return batches


def serve_layout(commands: Iterator[Any], config: Config) -> Iterator[Any]:
    """Keeps the engine of a layout: seconds of a step for every number of steps asked for, Memory for "memory".

    A recording slows everything down and takes memory of its own, so it comes last and covers an engine of its own.
    """
    from mlra_scale.parallel import build_engine, build_topology, initialize_distributed

    plan = batch_plan(config, RANKS)
    device = initialize_distributed("cpu", config.parallel.timeout_minutes)
    topology = build_topology(plan, device, config.parallel.timeout_minutes)
    libraries = resident_peak()
    engine = build_engine(config, plan, topology)
    reset_resident_peak()
    yield "ready"
    for command in commands:
        if command == "memory":
            break
        batches = [micro_batches(config, plan, step) for step in range(command)]
        dist.barrier()
        start = time.perf_counter()
        for batch in batches:
            engine.train_batch(batch, LEARNING_RATE)
        dist.barrier()
        yield (time.perf_counter() - start) / command
    resident = resident_peak() - libraries
    del engine
    with recording() as memory:
        recorded = build_engine(config, plan, topology)
        for step in range(3):
            with memory.span("later" if step else "first"):
                recorded.train_batch(micro_batches(config, plan, step), LEARNING_RATE)
    yield Memory(memory.peaks["later"], resident)
