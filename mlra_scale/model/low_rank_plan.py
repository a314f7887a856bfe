"""Three ways to compute factorised q, k and v under tensor parallelism, equal to rounding, and which is the fastest.

T tokens of a micro-batch, width D, rank R, t ranks, f factorised projections of q, k and v, W_D the factor at the
input, W_U that at the output, whose rows (heads) are split over the ranks in all plans:

    plan         what a rank computes and holds
    replicated   the whole latents X W_D^T, W_D held whole; then its rows of W_U. The latents' gradient is summed.
    sharded      its share of the latents, W_D split by rows; they are gathered, and their gradient is reduced and
                 scattered; X's gradient is summed.
    merged       its rows of W_U W_D first, then one product; W_D held whole. X's gradient is summed, and W_D's.

    plan         multiply-adds, forward          numbers that a rank sends, forward and backward, times t / (t - 1)
    dense        f T D^2 / t                     2 T D
    replicated   f T D R + f T R D / t           2 f T R
    sharded      f T D R / t + f T R D / t       2 f T R + 2 T D
    merged       f R D^2 / t + f T D^2 / t       2 T D + 2 f R D

With sequence parallelism (tensor_parallel.py) the stream is split by positions: with the plan `replicated` a rank has
the latents of its T / t tokens, and they are gathered. What is gathered is gathered again in the backward pass.
`sharded` would share the same work at more communication, and is left out.

    plan         multiply-adds, forward          numbers that a rank sends, forward and backward, times t / (t - 1)
    dense        f T D^2 / t                     3 T D
    replicated   f T D R / t + f T R D / t       3 f T R + 2 f R D
    merged       f R D^2 / t + f T D^2 / t       3 T D + 2 f R D

An all-reduce sends twice what an all-gather does. The backward pass takes twice the multiply-adds of the forward pass,
and a collective its latency, its bytes, and where it gathers or scatters two copies of what is whole. Collectives are
taken to overlap with nothing, and activation checkpointing to repeat nothing. docs/performance.md compares the model
with measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mlra_scale.config import BatchPlan, Config
from mlra_scale.model.parameters import LowRankPlan

PLANS: tuple[LowRankPlan, ...] = ("replicated", "sharded", "merged")
Collective = Literal["sum", "gather", "scatter"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of a number in compute precision."""


@dataclass(frozen=True)
class Device:
    """What the choice depends on beside shapes.

    Attributes:
        flops: Sustained rate of matrix products, FLOP/s.
        bandwidth: Bytes per second that a rank sends in an all-reduce of its tensor-parallel group.
        memory_bandwidth: Bytes per second that it reads and writes.
        latency: Seconds that a collective takes at least.
        share: What a gather or a scatter takes of the time of an all-reduce of the same numbers; half by their bytes.
    """

    flops: float
    bandwidth: float
    memory_bandwidth: float = math.inf
    latency: float = 0.0
    share: float = 0.5


H100 = Device(flops=5e14, bandwidth=3.5e11, memory_bandwidth=2.7e12, latency=2e-5)
"""Half of the bf16 peak, and what NCCL's rings reach over NVLink 4: typical values, not measured here."""
CPU_CORE = Device(flops=1e11, bandwidth=1e9, memory_bandwidth=8e9, latency=5e-4, share=0.8)
"""One core in fp32, and gloo between two processes of one machine, as measured on one (docs/performance.md)."""


@dataclass(frozen=True)
class Shape:
    """What is computed.

    Attributes:
        tokens: T of a micro-batch.
        hidden_size: D.
        rank: R.
        ranks: t, the tensor-parallel degree.
        factorised: f, how many of q, k and v are factorised.
        has_dense: Whether another of them is dense.
        element_bytes: Bytes of a number in compute precision.
        has_sequence_parallel: Whether the ranks split the stream along the sequence.
    """

    tokens: int
    hidden_size: int
    rank: int
    ranks: int
    factorised: int = 3
    has_dense: bool = False
    element_bytes: int = 4
    has_sequence_parallel: bool = False


def multiply_adds(plan: LowRankPlan, shape: Shape) -> float:
    """Returns the multiply-adds of one rank in the forward pass."""
    T, D, R, t, f = shape.tokens, shape.hidden_size, shape.rank, shape.ranks, shape.factorised
    if plan == "replicated" and not shape.has_sequence_parallel:
        return f * T * D * R + f * T * R * D / t
    if plan in ("replicated", "sharded"):
        return 2 * f * T * D * R / t
    return f * R * D * D / t + f * T * D * D / t


def collectives(plan: LowRankPlan, shape: Shape) -> list[tuple[Collective, float]]:
    """Returns what is summed, gathered or scattered in the forward and the backward pass, and how many numbers each.

    Those of a gathered tensor are all that a rank has then, of a scattered one all that it had.
    """
    T, D, R, f = shape.tokens, shape.hidden_size, shape.rank, shape.factorised
    # The hidden state enters anyway where one of q, k, v is dense; with latents in one packed collective.
    entering = f * T * R if plan == "replicated" else 0
    entering += T * D if plan != "replicated" or shape.has_dense else 0
    found: list[tuple[Collective, float]] = []
    if shape.has_sequence_parallel:
        found += [("gather", entering), ("scatter", entering), ("gather", entering)]
    else:
        found += [("sum", entering)]
    if plan == "sharded":
        found += [("gather", f * T * R), ("scatter", f * T * R)]
    # A factor's gradient is of this rank's heads only, or of its positions.
    if plan == "merged" or shape.has_sequence_parallel:
        found += [("sum", f * R * D)]
    return found


def numbers_sent(plan: LowRankPlan, shape: Shape) -> float:
    """Returns how many numbers a rank sends in the forward and the backward pass together."""
    sent = sum((2 if kind == "sum" else 1) * numbers for kind, numbers in collectives(plan, shape))
    return sent * (shape.ranks - 1) / shape.ranks


def seconds(plan: LowRankPlan, shape: Shape, device: Device) -> float:
    """Returns the estimated time of one block's factorised q, k and v, forward and backward, for one micro-batch."""
    total = 3 * 2 * multiply_adds(plan, shape) / device.flops
    if shape.ranks == 1:
        return total
    for kind, numbers in collectives(plan, shape):
        whole = numbers * shape.element_bytes
        summing = 2 * whole * (shape.ranks - 1) / shape.ranks / device.bandwidth
        total += device.latency + summing * (1.0 if kind == "sum" else device.share)
        if kind != "sum":
            total += 4 * whole / device.memory_bandwidth  # two copies, each read and written
    return total


def possible_plans(config: Config, plan: BatchPlan) -> Iterator[LowRankPlan]:
    """Yields the plans that a configuration can be computed by; the first one always can."""
    yield "replicated"
    if config.model.sigma_reparam:
        return  # its scale is defined on whole factors, one after the other
    if plan.tensor > 1 and config.model.rank % plan.tensor == 0 and not config.parallel.sequence_parallel:
        yield "sharded"
    yield "merged"


def shape_of(config: Config, plan: BatchPlan) -> Shape:
    """Returns what one block of a configuration computes for a micro-batch."""
    is_factorised = [config.model.is_factorised(name) for name in "qkv"]
    return Shape(
        tokens=plan.micro_batch_size * plan.sequence_length,
        hidden_size=config.model.hidden_size,
        rank=config.model.rank,
        ranks=plan.tensor,
        factorised=sum(is_factorised),
        has_dense=not all(is_factorised),
        element_bytes=BYTES[config.train.precision],
        has_sequence_parallel=config.parallel.sequence_parallel,
    )


def low_rank_plan(config: Config, plan: BatchPlan, device_type: str | None = None) -> LowRankPlan:
    """Returns the plan of a run: the configuration's, or the fastest by the cost model.

    Args:
        config: A validated configuration.
        plan: Its batch plan.
        device_type: "cpu" or "cuda"; None: what the configuration says, of which "auto" is taken for a GPU.
    """
    asked = config.parallel.low_rank_plan
    if asked != "auto":
        return asked
    if not any(config.model.is_factorised(name) for name in "qkv"):
        return "replicated"
    device = CPU_CORE if (device_type or config.train.device) == "cpu" else H100
    return _fastest(tuple(possible_plans(config, plan)), shape_of(config, plan), device)


@lru_cache(maxsize=4096)
def _fastest(possible: tuple[LowRankPlan, ...], shape: Shape, device: Device) -> LowRankPlan:
    return min(possible, key=lambda name: seconds(name, shape, device))
