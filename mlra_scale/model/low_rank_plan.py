"""Two ways to compute factorised q, k and v under tensor parallelism, equal to rounding, and which is the faster one.

T tokens of a micro-batch, width D, rank R, t ranks, f factorised projections of q, k and v, W_D the factor at the
input, held whole, W_U that at the output, whose rows (heads) are split over the ranks:

    replicated   every rank computes the whole latents X W_D^T, then its rows of W_U. The latents' gradient is summed.
    merged       its rows of W_U W_D first, then one product. X's gradient is summed, and W_D's.

    plan         multiply-adds, forward          numbers that a rank sends, forward and backward, times t / (t - 1)
    dense        f T D^2 / t                     2 T D
    replicated   f T D R + f T R D / t           2 f T R
    merged       f R D^2 / t + f T D^2 / t       2 T D + 2 f R D

With sequence parallelism (tensor_parallel.py) the stream is split by positions: with the plan `replicated` a rank has
the latents of its T / t tokens, and they are gathered. Gathered latents are not stored for the backward pass but
gathered again: hence the factor 3.

    plan         multiply-adds, forward          numbers that a rank sends, forward and backward, times t / (t - 1)
    dense        f T D^2 / t                     3 T D
    replicated   f T D R / t + f T R D / t       3 f T R + 2 f R D
    merged       f R D^2 / t + f T D^2 / t       3 T D + 2 f R D

An all-reduce sends twice as much as an all-gather. The backward pass takes twice the multiply-adds of the forward pass,
and a collective its latency, its bytes, and where it gathers or scatters two copies of the whole tensor. Collectives
are assumed to overlap with nothing, and activation checkpointing to repeat nothing. docs/performance.md compares this
model with measurements. Imports no torch: the planner uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mlra_scale.config import BatchPlan, Config

LowRankPlan = Literal["replicated", "merged"]
PLANS: tuple[LowRankPlan, ...] = ("replicated", "merged")
Collective = Literal["sum", "gather", "scatter"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of a number in compute precision."""


@dataclass(frozen=True)
class DeviceRates:
    """What the choice depends on beside shapes."""

    flops: float  # sustained rate of matrix products, FLOP/s
    bandwidth: float  # bytes per second that a rank sends in an all-reduce of its tensor-parallel group
    memory_bandwidth: float = math.inf  # bytes per second that it reads and writes
    latency: float = 0.0  # smallest time of a collective in seconds
    # Time of a gather or a scatter, as a share of that of an all-reduce of the same numbers; half by bytes.
    share: float = 0.5


H100 = DeviceRates(flops=5e14, bandwidth=3.5e11, memory_bandwidth=2.7e12, latency=2e-5)
"""Half of the bf16 peak, and the rate of NCCL's rings over NVLink 4: typical values, not measured here."""
CPU_CORE = DeviceRates(flops=1e11, bandwidth=1e9, memory_bandwidth=8e9, latency=5e-4, share=0.8)
"""One core in fp32, and gloo between two processes of one machine, as measured on one (docs/performance.md)."""


@dataclass(frozen=True)
class Shape:
    """What is computed."""

    tokens: int  # T of a micro-batch
    hidden_size: int  # D
    rank: int  # R
    ranks: int  # t, the tensor-parallel degree
    factorised: int = 3  # f, how many of q, k and v are factorised
    has_dense: bool = False  # whether another of them is dense
    element_bytes: int = 4  # bytes of a number in compute precision
    has_sequence_parallel: bool = False


def multiply_adds(plan: LowRankPlan, shape: Shape) -> float:
    """Returns the multiply-adds of one rank in the forward pass."""
    T, D, R, t, f = shape.tokens, shape.hidden_size, shape.rank, shape.ranks, shape.factorised
    if plan == "merged":
        return f * R * D * D / t + f * T * D * D / t
    if shape.has_sequence_parallel:
        return 2 * f * T * D * R / t
    return f * T * D * R + f * T * R * D / t


def collectives(plan: LowRankPlan, shape: Shape) -> list[tuple[Collective, float]]:
    """Returns the collectives of the forward and the backward pass, and the size of each in numbers.

    The size of a gather is that of its result, the size of a scatter that of its input.
    """
    T, D, R, f = shape.tokens, shape.hidden_size, shape.rank, shape.factorised
    # The hidden state enters anyway where one of q, k, v is dense; with latents in one packed collective.
    entering = f * T * R if plan == "replicated" else 0
    entering += T * D if plan == "merged" or shape.has_dense else 0
    found: list[tuple[Collective, float]] = [("sum", entering)]
    if shape.has_sequence_parallel:
        found = [("gather", entering), ("scatter", entering), ("gather", entering)]
    # A factor's gradient is of this rank's heads only, or of its positions.
    if plan == "merged" or shape.has_sequence_parallel:
        found += [("sum", f * R * D)]
    return found


def numbers_sent(plan: LowRankPlan, shape: Shape) -> float:
    """Returns how many numbers a rank sends in the forward and the backward pass together."""
    sent = sum((2 if kind == "sum" else 1) * numbers for kind, numbers in collectives(plan, shape))
    return sent * (shape.ranks - 1) / shape.ranks


def seconds(plan: LowRankPlan, shape: Shape, device: DeviceRates) -> float:
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
    """Returns the plan of a run: the configuration's, or the faster one by the cost model.

    `device_type`: "cpu" or "cuda"; None: that of the configuration, where "auto" counts as a GPU.
    """
    requested = config.parallel.low_rank_plan
    if requested != "auto":
        return requested
    # sigmaReparam defines its scale on whole factors, one after the other.
    if config.model.sigma_reparam or not any(config.model.is_factorised(name) for name in "qkv"):
        return "replicated"
    device = CPU_CORE if (device_type or config.train.device) == "cpu" else H100
    return _faster(shape_of(config, plan), device)


@lru_cache(maxsize=4096)
def _faster(shape: Shape, device: DeviceRates) -> LowRankPlan:
    return min(PLANS, key=lambda name: seconds(name, shape, device))
