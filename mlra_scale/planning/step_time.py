"""Time of one optimizer step, from stated formulas. Imports no torch; every function is pure.

T tokens of a micro-batch, S sequence, D width, F MLP width, R rank, V padded vocabulary, L_s blocks of stage s, t
tensor, p stages, m micro-batches, e bytes of a number. Per micro-batch, stage s takes

    f_s  = compute + elementwise + tensor-parallel collectives + neighbours + overhead,    seconds
    compute      (matrix products + attention) / sustained rate. Per block and forward pass, FLOPs of one rank:
                   q, k, v   2 T D^2 / t each dense; factorised as their plan computes them (model/low_rank_plan.py:
                             with `replicated` every rank repeats the down projection)
                   o         2 T D^2 / t dense; 2 T R D (1 + 1 / t) factorised, 4 T R D / t with sequence parallelism
                   MLP       4 T D F / t
                   attention 2 T S D / t, the causal half of q k^T and a v
                 The backward pass takes twice as much, attention 2.5 times (it forms q k^T again); checkpointing one
                 forward pass more but for fc_out, whose input is the last that is kept. The last stage adds the head,
                 3 * 2 T D V / t.
    elementwise  bytes / memory bandwidth: norms, residual sums, GELU, biases: e T (10 D + 4 D / t + 2 F / t) forward
                 (10 D / t with sequence parallelism), twice that backward, half of it more with selective
                 checkpointing; logits are read and written 8 times in fp32; and where there are several micro-batches
                 12 bytes per weight for the sum of gradients
    overhead     per block and per micro-batch (cluster.py), and per operation that checkpointing starts again. Where
                 the device runs ahead of the host (GPUs), compute and elementwise or overhead, whichever is longer

and a step (1F1B, uneven stages: one micro-batch passes through all stages, the others follow the slowest)

    step = sum of f_s over stages + (m - 1) max f_s + exposed reduction + update + overhead of a step
    bubble share = 1 - m max f_s / (sum f_s + (m - 1) max f_s)        ((p - 1) / (m + p - 1) for equal stages)

Data-parallel traffic (communication.py) overlaps with nothing on CPUs. On GPUs with `overlap_comm` reductions hide
behind the backward pass of the micro-batch they belong to, two thirds of its compute, and together with ZeRO 3's
gathers behind all of it, but for a tenth. Reductions at ZeRO 0, in bf16 at ZeRO 1 and in a pipeline begin when the last
backward pass has ended, and updated weights are gathered after the update: they hide behind nothing. The update reads
and writes 44 + e bytes per weight that a rank updates, the norm and clipping included.

MFU = useful FLOPs of the step (ModelConfig.flops_per_token: factored once, no recomputation, nothing repeated) over
step * ranks * peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlra_scale.config import BatchPlan, Config, engine_kind, offload_optimizer, zero_stage
from mlra_scale.model.low_rank_plan import BYTES, low_rank_plan, multiply_adds, shape_of
from mlra_scale.planning.cluster import Cluster
from mlra_scale.planning.communication import (
    data_traffic_per_micro_batch,
    data_traffic_per_step,
    groups_of,
    pipeline_traffic,
    tensor_traffic,
    tied_traffic,
)
from mlra_scale.planning.layout import blocks_of_stage, num_weights_of_stage
from mlra_scale.planning.memory import sequence_split

UPDATE_BYTES = 44
"""Read weight, gradient, two moments and write three of them; gradient norm: read; clipping: read and write."""
WAITS = 2
"""Waits of the host for the device in a step: the packed read, and DeepSpeed's norm (tests/device traces them)."""
REPEATED_LAUNCHES = {"none": 0, "selective": 4, "block": 20}
"""Operations of a block that checkpointing starts again."""


@dataclass(frozen=True)
class StageTime:
    """Seconds that a stage spends on one micro-batch.

    Attributes:
        compute: Matrix products and attention.
        elementwise: Everything bound by memory bandwidth.
        tensor: Collectives of the tensor-parallel group.
        pipeline: Messages to and from neighbours.
        data: Data-parallel traffic of every micro-batch (ZeRO 2 and 3), as far as it is not hidden.
        overhead: Launching and engines, as far as it is not hidden.
    """

    compute: float
    elementwise: float
    tensor: float
    pipeline: float
    data: float
    overhead: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.compute + self.elementwise + self.tensor + self.pipeline + self.data + self.overhead


@dataclass(frozen=True)
class StepTime:
    """The estimate of a step.

    Attributes:
        seconds: The whole step.
        stages: Per micro-batch, by stage.
        bubble: Share of the pipeline's time in which its slowest stage waits.
        reduction: Seconds of gradient reduction and gathering once a step, as far as they are not hidden.
        update: Seconds of the optimizer.
        mfu: Useful FLOPs over what the devices could do in that time at their peak.
        sent: Bytes that a rank sends per step, by kind: tensor, pipeline, data; of the rank that sends most.
    """

    seconds: float
    stages: tuple[StageTime, ...]
    bubble: float
    reduction: float
    update: float
    mfu: float
    sent: dict[str, float]


def step_time(config: Config, plan: BatchPlan, cluster: Cluster) -> StepTime:
    """Estimates the time of one step.

    Args:
        config: A validated configuration.
        plan: Its batch plan.
        cluster: What it would run on; its ranks are placed in order, tensor ranks next to each other.
    """
    m, stages = plan.accumulation_steps, range(plan.pipeline)
    alike = [_alike(config, plan, cluster, stage) for stage in stages]
    first = {kind: stage for stage, kind in reversed(list(enumerate(alike)))}
    time_of = {kind: stage_time(config, plan, cluster, stage) for kind, stage in first.items()}
    times = tuple(time_of[kind] for kind in alike)
    slowest, passage = max(time.total for time in times), sum(time.total for time in times)
    pipeline = passage + (m - 1) * slowest
    reduction = max(reduction_seconds(config, plan, cluster, stage, times[stage]) for stage in first.values())
    update = max(update_seconds(config, plan, cluster, stage) for stage in first.values())
    seconds = pipeline + reduction + update + cluster.step_overhead + WAITS * cluster.wait
    useful = config.model.flops_per_token(plan.sequence_length) * plan.tokens_per_step
    return StepTime(
        seconds=seconds,
        stages=times,
        bubble=1.0 - m * slowest / pipeline,
        reduction=reduction,
        update=update,
        mfu=useful / (seconds * plan.world_size * cluster.peak_flops),
        sent=sent_per_step(config, plan),
    )


def _alike(config: Config, plan: BatchPlan, cluster: Cluster, stage: int) -> tuple[Any, ...]:
    """Returns what the time of a stage depends on: stages with the same value take equally long."""
    links = [cluster.link(group) for group in groups_of(plan, stage).values()]
    num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
    return stage == 0, stage == plan.pipeline - 1, num_blocks, *links


def sent_per_step(config: Config, plan: BatchPlan) -> dict[str, float]:
    """Bytes that a rank sends per step, by kind; of the stage that sends most of it."""
    m = plan.accumulation_steps
    stages = sorted({0, 1, plan.pipeline - 1} & set(range(plan.pipeline)))  # later ones hold no more than the second
    per_micro_batch = [data_traffic_per_micro_batch(config, plan, stage) for stage in stages]
    per_step = [data_traffic_per_step(config, plan, stage) for stage in stages]
    data = [
        m * sum(traffic.sent for traffic in often) + sum(traffic.sent for traffic in once)
        for often, once in zip(per_micro_batch, per_step, strict=True)
    ]
    return {
        "tensor": max(m * tensor_traffic(config, plan, stage).sent for stage in stages),
        "pipeline": max(
            m * pipeline_traffic(config, plan, stage).sent + tied_traffic(config, plan, stage).sent for stage in stages
        ),
        "data": max(data),
    }


def block_flops(config: Config, plan: BatchPlan) -> tuple[float, float]:
    """FLOPs of one rank in the forward pass of one block: matrix products, and attention."""
    model, t = config.model, plan.tensor
    T, D, R = plan.micro_batch_size * plan.sequence_length, model.hidden_size, model.rank
    shape = shape_of(config, plan)
    inputs = 2.0 * (3 - shape.factorised) * T * D * D / t
    if shape.factorised:
        inputs += 2.0 * multiply_adds(low_rank_plan(config, plan), shape)
    whole = 1 / t if config.parallel.sequence_parallel else 1.0  # the up factor is not split, but its tokens may be
    output = 2.0 * T * R * D * (whole + 1 / t) if model.is_factorised("o") else 2.0 * T * D * D / t
    return inputs + output + 4.0 * T * D * model.ffn_size / t, 2.0 * T * plan.sequence_length * D / t


def computed_flops(config: Config, plan: BatchPlan, stage: int) -> float:
    """FLOPs that one rank of a stage computes for one micro-batch, forward and backward, repeated ones included."""
    products, attention = block_flops(config, plan)
    tokens = plan.micro_batch_size * plan.sequence_length
    block = 3.0 * products + 3.5 * attention
    if config.parallel.activation_checkpointing == "block":
        fc_out = 2.0 * tokens * config.model.hidden_size * config.model.ffn_size / plan.tensor
        block += products + attention - fc_out
    num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
    head = 6.0 * tokens * config.model.hidden_size * config.model.padded_vocab_size / plan.tensor
    return num_blocks * block + (head if stage == plan.pipeline - 1 else 0.0)


def elementwise_bytes(config: Config, plan: BatchPlan, stage: int) -> float:
    """Bytes that one rank of a stage moves in its own memory for one micro-batch, matrix products aside."""
    model, t, element = config.model, plan.tensor, BYTES[config.train.precision]
    tokens = plan.micro_batch_size * plan.sequence_length
    stream = 10 * model.hidden_size / sequence_split(config, plan)
    forward = element * tokens * (stream + 4 * model.hidden_size / t + 2 * model.ffn_size / t)
    passes = {"none": 3.0, "selective": 3.5, "block": 4.0}[config.parallel.activation_checkpointing]
    blocks = passes * forward * len(blocks_of_stage(model.num_layers, plan.pipeline, stage))
    logits = 8 * 4 * tokens * model.padded_vocab_size / t if stage == plan.pipeline - 1 else 0.0
    return blocks + logits


def summing_seconds(config: Config, plan: BatchPlan, cluster: Cluster, stage: int) -> float:
    """Seconds of adding a micro-batch's gradients, 12 bytes per weight, to those of the others."""
    num_weights = num_weights_of_stage(config.model, plan, stage, low_rank_plan(config, plan))
    return 12.0 * num_weights / cluster.update_bandwidth if plan.accumulation_steps > 1 else 0.0


def stage_time(config: Config, plan: BatchPlan, cluster: Cluster, stage: int) -> StageTime:
    """Estimates what a stage spends on one micro-batch, forward and backward."""
    groups = groups_of(plan, stage)
    compute = computed_flops(config, plan, stage) / cluster.flops
    elementwise = elementwise_bytes(config, plan, stage) / cluster.memory_bandwidth
    elementwise += summing_seconds(config, plan, cluster, stage)
    num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
    again = REPEATED_LAUNCHES[config.parallel.activation_checkpointing] * cluster.launch
    overhead = num_blocks * (cluster.block_overhead + cluster.zero_overhead[zero_stage(config)] + again)
    overhead += cluster.micro_batch_overhead + cluster.pipeline_overhead * (engine_kind(config) == "pipeline")
    if cluster.runs_ahead:
        overhead = max(0.0, overhead - compute - elementwise)
    gradients, weights = data_traffic_per_micro_batch(config, plan, stage)
    gradient_seconds = gradients.seconds(cluster, groups["data"])
    data = gradient_seconds + weights.seconds(cluster, groups["data"])
    if _hides(config, cluster):
        # Both share the links: together they hide behind the computation, gradients behind its backward pass; also
        # while the device waits for the host.
        busy = compute + elementwise + overhead
        data = max(_exposed(data, busy), gradient_seconds - 2 / 3 * busy)
    # What a stage receives takes as long as what it sends, and it waits for both.
    neighbours = pipeline_traffic(config, plan, stage).times(2)
    return StageTime(
        compute=compute,
        elementwise=elementwise,
        tensor=tensor_traffic(config, plan, stage).seconds(cluster, groups["tensor"]),
        pipeline=neighbours.seconds(cluster, groups["pipeline"]),
        data=data,
        overhead=overhead,
    )


def reduction_seconds(config: Config, plan: BatchPlan, cluster: Cluster, stage: int, time: StageTime) -> float:
    """Seconds of what data ranks, and the ends of a pipeline, send once a step, as far as it is not hidden."""
    groups = groups_of(plan, stage)
    gradients, weights = (
        traffic.seconds(cluster, groups["data"]) for traffic in data_traffic_per_step(config, plan, stage)
    )
    # DeepSpeed's bf16 optimizer of ZeRO 1 has no hooks: it reduces when the last backward pass has ended.
    is_late = zero_stage(config) == 0 or config.train.precision == "bf16"
    if _hides(config, cluster) and plan.pipeline == 1 and not is_late:
        gradients = _exposed(gradients, 2 / 3 * (time.compute + time.elementwise + time.overhead))
    return gradients + weights + tied_traffic(config, plan, stage).seconds(cluster, groups["ends"])


def _exposed(seconds: float, hidden_behind: float) -> float:
    """What remains of a transfer that runs beside a computation; a tenth always does, its beginning and its end."""
    return max(0.1 * seconds, seconds - hidden_behind)


def _hides(config: Config, cluster: Cluster) -> bool:
    """Whether data-parallel traffic runs beside the computation."""
    return cluster.runs_ahead and bool(config.deepspeed.get("zero_optimization", {}).get("overlap_comm", False))


def update_seconds(config: Config, plan: BatchPlan, cluster: Cluster, stage: int) -> float:
    """Seconds of the update. Offloaded optimizers are estimated at a tenth of the rate."""
    num_weights = num_weights_of_stage(config.model, plan, stage, low_rank_plan(config, plan))
    num_updated = num_weights / (plan.data if zero_stage(config) else 1)
    seconds = num_updated * (UPDATE_BYTES + BYTES[config.train.precision]) / cluster.update_bandwidth
    return 10.0 * seconds if offload_optimizer(config) else seconds
