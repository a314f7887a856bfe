"""Time of one optimizer step, from stated formulas. Imports no torch; every function is pure.

Letters: T tokens of a micro-batch, S sequence, D width, F MLP width, R rank, V padded vocabulary, t tensor, p stages, m
micro-batches, e bytes of a number. A micro-batch takes f_s seconds in stage s (StageTime). A step of 1F1B with uneven
stages (one micro-batch passes through all stages, the others follow the slowest) takes

    step = sum of f_s over stages + (m - 1) max f_s + exposed reduction + update + overhead of a step
    bubble share = 1 - m max f_s / (sum f_s + (m - 1) max f_s)        ((p - 1) / (m + p - 1) for equal stages)

MFU is useful FLOPs of the step (ModelConfig.flops_per_token: factored once, no recomputation, nothing repeated) over
step * ranks * peak.

Data-parallel traffic (communication.py) overlaps with nothing on CPUs. On GPUs with `overlap_comm` reductions hide
behind the backward pass of the micro-batch they belong to, two thirds of its compute, and together with ZeRO 3's
gathers behind all of it, but for a tenth. Reductions at ZeRO 0, in bf16 at ZeRO 1 and in a pipeline begin when the last
backward pass has ended, and updated weights are gathered after the update: they hide behind nothing. Nor does what muon
and spectron do with matrices (`matrix_time`), which is a part of the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from mlra_scale.config import BatchPlan, Config, offload_optimizer
from mlra_scale.model.low_rank_plan import multiply_adds, shape_of
from mlra_scale.model.matrix_rounds import rounds_of, work
from mlra_scale.planning.cluster import Cluster
from mlra_scale.planning.communication import (
    data_traffic_per_micro_batch,
    data_traffic_per_step,
    groups_of,
    matrix_traffic,
    pipeline_traffic,
    ranks_of_stage,
    tensor_traffic,
    tied_traffic,
)
from mlra_scale.planning.layout import Stage
from mlra_scale.planning.memory_state import matrix_bytes

UPDATE_BYTES = 44
"""Per weight, beside its copy in compute precision: read weight, gradient, two moments and write three of them;
gradient norm: read; clipping: read and write."""
MATRIX_BYTES = 72
"""The same of muon and spectron, beside 5 times the type that is sent: momentum, direction and update one after the
other (parallel/matrix_optimizer.py), and the gradient norm."""
SPECTRON_BYTES = 16
"""What spectron adds for a factor: its weights read twice, its update divided in fp32."""
ROUND_LAUNCHES, OWNER_LAUNCHES, ITERATION_LAUNCHES, PART_LAUNCHES = 8, 4, 3, 1
"""Operations of muon in a round, most of them on lists of tensors; for the matrix that a rank owns in it, and of that
per iteration; for a part of a matrix that a rank holds."""
SPECTRON_LAUNCHES, SPECTRON_PART_LAUNCHES = 15, 3
"""What spectron adds in a step, and for a part of a factor that a rank holds."""
WAITS = 2
"""Waits of the host for the device in a step: the packed read, and DeepSpeed's norm (tests/device traces them)."""
REPEATED_LAUNCHES = {"none": 0, "selective": 4, "block": 20}
"""Operations of a block that checkpointing starts again."""


@dataclass(frozen=True)
class StageTime:
    """Seconds that a stage spends on one micro-batch."""

    compute: float  # matrix products and attention
    elementwise: float  # everything bound by memory bandwidth
    tensor: float  # collectives of the tensor-parallel group
    pipeline: float  # messages to and from neighbours
    data: float  # data-parallel traffic of every micro-batch (ZeRO 2 and 3), as far as it is not hidden
    overhead: float  # launching and engines, as far as it is not hidden

    @property
    def total(self) -> float:
        return self.compute + self.elementwise + self.tensor + self.pipeline + self.data + self.overhead


@dataclass(frozen=True)
class StepTime:
    """The estimate of a step."""

    seconds: float  # the whole step
    stages: tuple[StageTime, ...]  # per micro-batch, by stage
    bubble: float  # share of the pipeline's time in which its slowest stage waits
    reduction: float  # seconds of gradient reduction and gathering once a step, as far as they are not hidden
    update: float  # seconds of the optimizer
    matrices: MatrixTime | None  # of these, what matrices of muon and spectron take; None: AdamW updates everything
    mfu: float  # useful FLOPs over what the devices could do in that time at their peak
    # Bytes that a rank sends per step, by kind: tensor, pipeline, data; of the rank that sends most.
    sent: dict[str, float]


@dataclass(frozen=True)
class MatrixTime:
    """What updating the matrices of muon and spectron takes of a step, of the stage where it takes most."""

    seconds: float  # of the step
    orthogonalisation: float  # of these, in matrix products of Newton-Schulz iterations
    sent: float  # bytes that the mean rank sends
    messages: float  # that it has a part in
    memory: float  # bytes that a rank needs while it orthogonalises


def step_time(config: Config, plan: BatchPlan, cluster: Cluster) -> StepTime:
    """Estimates the time of one step; ranks are numbered node by node, tensor ranks next to each other."""
    m = plan.accumulation_steps
    stages = [Stage(config, plan, index) for index in range(plan.pipeline)]
    kinds = [_kind(stage, cluster) for stage in stages]
    first = dict(reversed(list(zip(kinds, stages, strict=True))))
    time_of = {kind: stage_time(stage, cluster) for kind, stage in first.items()}
    times = tuple(time_of[kind] for kind in kinds)
    slowest, passage = max(time.total for time in times), sum(time.total for time in times)
    pipeline = passage + (m - 1) * slowest
    reduction = max(reduction_seconds(stage, cluster, time_of[kind]) for kind, stage in first.items())
    update = max(update_seconds(stage, cluster) for stage in first.values())
    of_matrices = [time for stage in first.values() if (time := matrix_time(stage, cluster)) is not None]
    seconds = pipeline + reduction + update + cluster.step_overhead + WAITS * cluster.wait
    useful = config.model.flops_per_token(plan.sequence_length) * plan.tokens_per_step
    return StepTime(
        seconds=seconds,
        stages=times,
        bubble=1.0 - m * slowest / pipeline,
        reduction=reduction,
        update=update,
        matrices=max(of_matrices, key=lambda time: time.seconds, default=None),
        mfu=useful / (seconds * plan.world_size * cluster.peak_flops),
        sent=sent_per_step(stages),
    )


def _kind(stage: Stage, cluster: Cluster) -> tuple[Any, ...]:
    """Returns what the time of a stage depends on: stages with the same value take equally long."""
    links = [cluster.link(group) for group in groups_of(stage.plan, stage.index).values()]
    return stage.is_first, stage.is_last, stage.num_blocks, stage.matrices, *links


def sent_per_step(stages: Sequence[Stage]) -> dict[str, float]:
    """Bytes that a rank sends per step, by kind; of the stage that sends most of it.

    Kind "optimizer" is there where muon or spectron update matrices.
    """
    m = stages[0].plan.accumulation_steps
    largest = {stages[index] for index in (0, min(1, len(stages) - 1), -1)}  # later ones hold no more than the second
    sent: dict[str, list[float]] = {"tensor": [], "pipeline": [], "data": []}
    for stage in largest:
        sent["tensor"].append(m * tensor_traffic(stage).sent)
        sent["pipeline"].append(m * pipeline_traffic(stage).sent + tied_traffic(stage).sent)
        per_micro_batch = sum(traffic.sent for traffic in data_traffic_per_micro_batch(stage))
        sent["data"].append(m * per_micro_batch + sum(traffic.sent for traffic in data_traffic_per_step(stage)))
    if optimizer := max(matrix_traffic(stage).sent for stage in largest):
        sent["optimizer"] = [optimizer]
    return {kind: max(values) for kind, values in sent.items()}


def block_flops(stage: Stage) -> tuple[float, float]:
    """FLOPs of one rank in the forward pass of one block: matrix products, and attention.

    q, k, v: 2 T D^2 / t each dense, factorised ones by their plan (low_rank_plan.py); o: 2 T D^2 / t dense, factorised
    2 T R D (1 + 1 / t), 4 T R D / t with sequence parallelism; MLP: 4 T D F / t; attention: 2 T S D / t, the causal
    half of q k^T and a v.
    """
    model, t, T = stage.model, stage.plan.tensor, stage.tokens
    D, R = model.hidden_size, model.rank
    shape = shape_of(stage.config, stage.plan)
    inputs = 2.0 * (3 - shape.factorised) * T * D * D / t
    if shape.factorised:
        inputs += 2.0 * multiply_adds(stage.low_rank_plan, shape)
    # The up factor of o is not split, but with sequence parallelism its tokens are.
    output = 2.0 * T * R * D * (1 / stage.split + 1 / t) if model.is_factorised("o") else 2.0 * T * D * D / t
    return inputs + output + 4.0 * T * D * model.ffn_size / t, 2.0 * T * stage.plan.sequence_length * D / t


def computed_flops(stage: Stage) -> float:
    """FLOPs that one rank of a stage computes for one micro-batch, forward and backward, repeated ones included.

    The backward pass takes twice the products of the forward pass, and 2.5 times attention (it computes q k^T again);
    checkpointing repeats the forward pass but for fc_out, whose input is kept. The last stage adds the head.
    """
    products, attention = block_flops(stage)
    model, t = stage.model, stage.plan.tensor
    block = 3.0 * products + 3.5 * attention
    if stage.checkpointing == "block":
        fc_out = 2.0 * stage.tokens * model.hidden_size * model.ffn_size / t
        block += products + attention - fc_out
    head = 6.0 * stage.tokens * model.hidden_size * model.padded_vocab_size / t
    return stage.num_blocks * block + (head if stage.is_last else 0.0)


def elementwise_bytes(stage: Stage) -> float:
    """Bytes that one rank of a stage moves in its own memory for one micro-batch, matrix products aside.

    Norms, residual sums, GELU and biases: e T (10 D + 4 D / t + 2 F / t) forward (10 D / t with sequence parallelism),
    twice that backward, and what checkpointing repeats. Logits are read and written 8 times in fp32.
    """
    model, t = stage.model, stage.plan.tensor
    stream = 10 * model.hidden_size / stage.split
    forward = stage.element * stage.tokens * (stream + 4 * model.hidden_size / t + 2 * model.ffn_size / t)
    passes = {"none": 3.0, "selective": 3.5, "block": 4.0}[stage.checkpointing]
    logits = 8 * 4 * stage.tokens * model.padded_vocab_size / t if stage.is_last else 0.0
    return passes * forward * stage.num_blocks + logits


def stage_time(stage: Stage, cluster: Cluster) -> StageTime:
    """Estimates what a stage spends on one micro-batch, forward and backward."""
    groups = groups_of(stage.plan, stage.index)
    compute = computed_flops(stage) / cluster.flops
    elementwise = elementwise_bytes(stage) / cluster.memory_bandwidth
    # Of several micro-batches, gradients are added up: 12 bytes per weight.
    elementwise += 12.0 * stage.num_weights / cluster.update_bandwidth if stage.plan.accumulation_steps > 1 else 0.0
    again = REPEATED_LAUNCHES[stage.checkpointing] * cluster.launch
    overhead = stage.num_blocks * (cluster.block_overhead + cluster.zero_overhead[stage.zero] + again)
    overhead += cluster.micro_batch_overhead + cluster.pipeline_overhead * stage.is_pipeline
    if cluster.runs_ahead:
        overhead = max(0.0, overhead - compute - elementwise)
    gradients, weights = (traffic.seconds(cluster, groups["data"]) for traffic in data_traffic_per_micro_batch(stage))
    data = gradients + weights
    if cluster.runs_ahead and stage.overlaps:
        # Both share the links: together they hide behind the computation, gradients behind its backward pass; also
        # while the device waits for the host.
        busy = compute + elementwise + overhead
        data = max(_exposed(data, busy), gradients - 2 / 3 * busy)
    # What a stage receives takes as long as what it sends, and it waits for both.
    neighbours = pipeline_traffic(stage).times(2)
    return StageTime(
        compute=compute,
        elementwise=elementwise,
        tensor=tensor_traffic(stage).seconds(cluster, groups["tensor"]),
        pipeline=neighbours.seconds(cluster, groups["pipeline"]),
        data=data,
        overhead=overhead,
    )


def reduction_seconds(stage: Stage, cluster: Cluster, time: StageTime) -> float:
    """Seconds of what data ranks, and the ends of a pipeline, send once a step, as far as it is not hidden."""
    groups = groups_of(stage.plan, stage.index)
    gradients, weights = (traffic.seconds(cluster, groups["data"]) for traffic in data_traffic_per_step(stage))
    # DeepSpeed's bf16 optimizer of ZeRO 1 has no hooks: it reduces when the last backward pass has ended.
    is_late = stage.zero == 0 or stage.config.train.precision == "bf16"
    if cluster.runs_ahead and stage.overlaps and stage.plan.pipeline == 1 and not is_late:
        gradients = _exposed(gradients, 2 / 3 * (time.compute + time.elementwise + time.overhead))
    return gradients + weights + tied_traffic(stage).seconds(cluster, groups["ends"])


def _exposed(seconds: float, hidden_behind: float) -> float:
    """What remains of a transfer that runs beside a computation; a tenth always does, its beginning and its end."""
    return max(0.1 * seconds, seconds - hidden_behind)


def update_seconds(stage: Stage, cluster: Cluster) -> float:
    """Seconds of the update. Offloaded optimizers are estimated at a tenth of the rate."""
    of_adam = (stage.num_weights - stage.num_in_matrices) * (UPDATE_BYTES + stage.element)
    matrices = matrix_time(stage, cluster)
    return _moving_seconds(stage, cluster, of_adam) + (0.0 if matrices is None else matrices.seconds)


def _moving_seconds(stage: Stage, cluster: Cluster, num_bytes: float) -> float:
    """Seconds in which the optimizer moves so many bytes of a tensor shard, which ZeRO cuts over data ranks."""
    seconds = num_bytes / (stage.plan.data if stage.zero else 1) / cluster.update_bandwidth
    return 10.0 * seconds if offload_optimizer(stage.config) else seconds


def matrix_launches(stage: Stage) -> float:
    """Operations that a rank of a stage starts for the update of its matrices, of the mean rank that owns one a round.

    ZeRO 1 and 2 cut the whole stage, so that a rank holds few matrices, nearly whole; ZeRO 3 cuts each of them.
    """
    plan = stage.plan
    num_factors = sum(matrix.is_spectron for matrix in stage.matrices)
    num_rounds = ceil(len(stage.matrices) / (plan.tensor * plan.data))
    share = 1 / plan.data if stage.zero in (1, 2) else 1.0
    num_cut = 1 - share  # a data rank's piece ends within a matrix
    rounds = ROUND_LAUNCHES + OWNER_LAUNCHES + ITERATION_LAUNCHES * stage.config.optim.newton_schulz_steps
    parts = PART_LAUNCHES * (share * len(stage.matrices) + num_cut) + SPECTRON_PART_LAUNCHES * share * num_factors
    return num_rounds * rounds + parts + (SPECTRON_LAUNCHES if num_factors else 0)


def matrix_time(stage: Stage, cluster: Cluster) -> MatrixTime | None:
    """Estimates the update of a stage's matrices by muon and spectron; None: there are none.

    In every round all wait for the rank with most to compute, and for its messages; nothing of it is hidden. With
    `runs_ahead` starting operations counts where it takes longer than what they do.
    """
    if not stage.matrices:
        return None
    optim, plan = stage.config.optim, stage.plan
    rounds = rounds_of([matrix[:2] for matrix in stage.matrices], plan.tensor * plan.data)
    # 2 (2 m^2 n + m^3) FLOPs an iteration: X X^T, its square, and their product with X.
    num_products = sum(max(work(stage.matrices[index][:2]) for index in indices.values()) for indices in rounds)
    orthogonalisation = 2.0 * optim.newton_schulz_steps * num_products / cluster.flops
    factors = [matrix for matrix in stage.matrices if matrix.is_spectron]
    num_in_factors = sum(matrix.num_held(plan.tensor) for matrix in factors)
    moved = stage.num_in_matrices * (MATRIX_BYTES + 5 * stage.transported_element) + num_in_factors * SPECTRON_BYTES
    busy = orthogonalisation + _moving_seconds(stage, cluster, moved)
    starting = matrix_launches(stage) * cluster.launch
    computing = max(busy, starting) if cluster.runs_ahead else busy + starting
    traffic = matrix_traffic(stage)
    return MatrixTime(
        seconds=computing + traffic.seconds(cluster, ranks_of_stage(plan, stage.index)),
        orthogonalisation=orthogonalisation,
        sent=traffic.sent,
        messages=traffic.messages + traffic.rings,
        memory=matrix_bytes(stage),
    )
