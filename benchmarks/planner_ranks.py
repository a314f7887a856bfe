"""The ranks of benchmarks/planner.py: pairs of processes that keep an engine ready and answer commands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.processes import Ranks
from benchmarks.tensor_memory import recording, reset_resident_peak, resident_peak
from mlra_scale.config import BatchPlan, Config, batch_plan
from mlra_scale.data import Batch

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "99"}
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


def pair(name: str, serve: Callable[..., Iterator[Any]], config: Config, timeout_s: float) -> Ranks:
    """Returns two processes that hold one rank of a layout each, for as long as they are open; see Ranks."""
    return Ranks(name, RANKS, serve, config, timeout_s=timeout_s, environment=ENVIRONMENT)


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

    logging.disable(logging.WARNING)
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
