"""Batch arithmetic: how a global batch divides over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlra_scale.config.problems import ConfigError, Problem
from mlra_scale.config.schema import Config


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a run: degrees, micro-batches and tokens.

    Attributes:
        world_size: Number of ranks: tensor * pipeline * data.
        tensor: Tensor-parallel degree.
        pipeline: Number of pipeline stages.
        data: Data-parallel degree.
        micro_batch_size: Sequences that a data-parallel rank passes at once.
        accumulation_steps: Micro-batches of a data-parallel rank per optimizer step.
        global_batch_size: Sequences per optimizer step: micro_batch_size * accumulation_steps * data.
        sequence_length: Tokens per sequence.
        tokens_per_step: Tokens per optimizer step.
    """

    world_size: int
    tensor: int
    pipeline: int
    data: int
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    sequence_length: int
    tokens_per_step: int


def batch_plan(config: Config, world_size: int) -> BatchPlan:
    """Derives the batch arithmetic of a configuration on `world_size` ranks.

    Raises:
        ConfigError: The ranks do not divide into the layout, or the batch not over the ranks.
    """
    if problems := list(batch_problems(config, world_size)):
        raise ConfigError(problems)
    parallel, train = config.parallel, config.train
    data = world_size // (parallel.tensor * parallel.pipeline)
    return BatchPlan(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        micro_batch_size=train.micro_batch_size,
        accumulation_steps=train.global_batch_size // (train.micro_batch_size * data),
        global_batch_size=train.global_batch_size,
        sequence_length=train.sequence_length,
        tokens_per_step=train.global_batch_size * train.sequence_length,
    )


def batch_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Yields what keeps the batch from dividing over the ranks."""
    parallel, train = config.parallel, config.train
    if parallel.world_size is not None and parallel.world_size != world_size:
        yield Problem(
            "parallel.world_size",
            parallel.world_size,
            f"{world_size} ranks are running; start {parallel.world_size} or correct the field",
        )
    per_replica = parallel.tensor * parallel.pipeline
    if world_size % per_replica:
        yield Problem(
            "parallel.tensor * parallel.pipeline",
            per_replica,
            f"{world_size} ranks are not divisible by {parallel.tensor} * {parallel.pipeline}; "
            f"start a multiple of {per_replica} ranks or change the degrees",
        )
        return
    data = world_size // per_replica
    unit = train.micro_batch_size * data
    if train.global_batch_size % unit:
        below = train.global_batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else str(unit)
        yield Problem(
            "train.global_batch_size",
            train.global_batch_size,
            f"is not divisible by train.micro_batch_size {train.micro_batch_size} times {data} data-parallel ranks; "
            f"use {near}, or another micro-batch",
        )
