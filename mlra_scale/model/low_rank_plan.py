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

An all-reduce sends twice what an all-gather does. The backward pass takes twice the multiply-adds of the forward pass.
Collectives are taken to overlap with nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlra_scale.config import BatchPlan, Config
from mlra_scale.model.parameters import LowRankPlan

PLANS: tuple[LowRankPlan, ...] = ("replicated", "sharded", "merged")
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Device:
    """What the choice depends on beside shapes.

    Attributes:
        flops: Sustained rate of matrix products, FLOP/s.
        bandwidth: Bytes per second that a rank sends in its tensor-parallel group.
    """

    flops: float
    bandwidth: float


H100 = Device(flops=5e14, bandwidth=3.5e11)
"""Half of the bf16 peak, and what NCCL's rings reach over NVLink 4: typical values, not measured here."""
CPU_CORE = Device(flops=5e10, bandwidth=1e9)
"""One core in fp32, and gloo between processes of one machine: the order of magnitude."""


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


def numbers_sent(plan: LowRankPlan, shape: Shape) -> float:
    """Returns how many numbers a rank sends in the forward and the backward pass together."""
    T, D, R, t, f = shape.tokens, shape.hidden_size, shape.rank, shape.ranks, shape.factorised
    # Of one number that enters sharded computation: its gradient is summed; or it is gathered twice, its gradient once.
    entering = 3 if shape.has_sequence_parallel else 2
    # The hidden state enters anyway where one of q, k, v is dense; with latents in one packed collective.
    of_hidden = entering * T * D if plan != "replicated" or shape.has_dense else 0
    of_latents = 0 if plan == "merged" else entering * f * T * R
    # A factor's gradient is of this rank's heads only, or of its positions.
    of_factors = 2 * f * R * D if plan == "merged" or shape.has_sequence_parallel else 0
    return (of_hidden + of_latents + of_factors) * (t - 1) / t


def seconds(plan: LowRankPlan, shape: Shape, device: Device) -> float:
    """Returns the estimated time of one block's factorised q, k and v, forward and backward, for one micro-batch."""
    arithmetic = 3 * 2 * multiply_adds(plan, shape) / device.flops
    return arithmetic + numbers_sent(plan, shape) * shape.element_bytes / device.bandwidth


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
        element_bytes=_BYTES[config.train.precision],
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
    shape, device = shape_of(config, plan), CPU_CORE if (device_type or config.train.device) == "cpu" else H100
    return min(possible_plans(config, plan), key=lambda name: seconds(name, shape, device))
