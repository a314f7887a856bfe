"""What ranks send to each other in a step, by kind, from the layout. Imports no torch; every function is pure.

T tokens of a micro-batch, D width, R rank of a factorised o (else D), n weights that a rank holds, t tensor, d data
ranks, m micro-batches, e bytes of a number in compute precision, c in communication of gradients (fp32 unless the
--ds-config file says otherwise). Bytes that one rank sends; of k ranks an all-reduce sends 2 (k - 1) / k of the tensor,
a gather and a reduce-scatter (k - 1) / k.

    tensor     per block and micro-batch, all-reduces: T R and T D forward (o, fc_out), T D backward (fc_in's input);
               q, k, v by their plan (model/low_rank_plan.py), dense ones T D backward. Checkpointing repeats the
               forward ones but for fc_out's. The embedding T D forward, the head's input T D backward. With sequence
               parallelism a reduce-scatter and a gather stand for each sum, what enters a block is gathered once more
               backward, and the position embedding's gradient is summed
    pipeline   per micro-batch and neighbour e T D, forward one way and backward the other; once a step the gradient of
               the tied embedding, all-reduced between the first stage and the last
    data       ZeRO 0: all-reduce of c n once; 1: the same (DeepSpeed 0.19 sums whole buckets and takes its part) and
               gather of e n once; 2: all-reduce of c n per micro-batch, gather of e n once; 3: per micro-batch
               reduce-scatter of c n, gather of e n, and once more of what is not kept (stage3_max_reuse_distance);
               with more than two data ranks the tied gradient of a pipeline's ends once more, by itself
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from mlra_scale.config import BatchPlan, Config, zero_stage
from mlra_scale.model.low_rank_plan import BYTES, collectives, low_rank_plan, numbers_sent, shape_of
from mlra_scale.planning.cluster import Cluster
from mlra_scale.planning.layout import blocks_of_stage, num_weights_of_stage, rank_of
from mlra_scale.planning.memory import keeps_gathered, reuse_distance

HOP = 0.2
"""Latencies of a message that a ring takes to pass a chunk to the next rank, once it runs: assumed."""


@dataclass(frozen=True)
class Traffic:
    """What one rank sends, and in how many messages.

    Attributes:
        sent: Bytes.
        messages: Messages and sums, which pass through a tree of the ranks.
        rings: Gathers and scatters, which pass from rank to rank.
    """

    sent: float = 0.0
    messages: float = 0.0
    rings: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.messages + other.messages, self.rings + other.rings)

    def times(self, number: float) -> Traffic:
        """The same so many times."""
        return Traffic(number * self.sent, number * self.messages, number * self.rings)

    def seconds(self, cluster: Cluster, group: list[int]) -> float:
        """Time of it in a group of ranks: bytes over bandwidth, and latencies.

        A message waits for log2 of the ranks latencies, a ring for as many hops as there are other ranks, of HOP
        latencies each; it is no faster than a message.
        """
        if len(group) == 1:
            return 0.0
        bandwidth, latency = cluster.link(group)
        depth = ceil(log2(len(group)))
        ring = max(depth, HOP * (len(group) - 1))
        return self.sent / bandwidth + latency * (self.messages * depth + self.rings * ring)


def all_reduce(nbytes: float, ranks: int) -> Traffic:
    """One all-reduce of so many bytes."""
    return Traffic() if ranks == 1 else Traffic(2 * nbytes * (ranks - 1) / ranks, 1)


def scatter_or_gather(nbytes: float, ranks: int) -> Traffic:
    """One reduce-scatter or all-gather of so many bytes altogether."""
    return Traffic() if ranks == 1 else Traffic(nbytes * (ranks - 1) / ranks, rings=1)


def tensor_traffic_of_block(config: Config, plan: BatchPlan) -> Traffic:
    """What a block sends for one micro-batch, forward and backward, with what checkpointing repeats."""
    if plan.tensor == 1:
        return Traffic()
    model, shape = config.model, shape_of(config, plan)
    has_split = config.parallel.sequence_parallel
    hidden = float(shape.element_bytes * shape.tokens * model.hidden_size)
    output = hidden * model.rank / model.hidden_size if model.is_factorised("o") else hidden
    # With sequence parallelism a gather and a scatter take the place of a sum. What enters is gathered again in the
    # backward pass; with checkpointing it is kept, and the repeated forward pass gathers it.
    again = scatter_or_gather(hidden, plan.tensor) if gathers_again(config) else Traffic()
    traffic = (
        all_reduce(output, plan.tensor) + all_reduce(hidden, plan.tensor) + all_reduce(hidden, plan.tensor) + again
    )
    if has_split and model.is_factorised("o"):
        # The up factor works on a part of the tokens: its gradient is summed.
        traffic += all_reduce(float(shape.element_bytes * model.rank * model.hidden_size), plan.tensor)
    # What the recomputation repeats, which ends before fc_out: o's sum, or with parts o's scatter and what enters.
    repeated = all_reduce(output, plan.tensor)
    if has_split:
        repeated = scatter_or_gather(output, plan.tensor) + scatter_or_gather(hidden, plan.tensor)
    if shape.factorised == 0:
        traffic += all_reduce(hidden, plan.tensor) + again
        entering = hidden if has_split else 0.0
    else:
        chosen = low_rank_plan(config, plan)
        messages = len(collectives(chosen, shape))
        traffic += Traffic(numbers_sent(chosen, shape) * shape.element_bytes, messages)
        latents = float(shape.element_bytes * shape.factorised * shape.tokens * model.rank)
        entering = latents if chosen == "sharded" or (has_split and chosen == "replicated") else 0.0
        if has_split and (chosen == "merged" or shape.has_dense):
            entering += hidden
    if entering > 0.0:
        repeated += scatter_or_gather(entering, plan.tensor)
    return traffic + repeated if config.parallel.activation_checkpointing == "block" else traffic


def gathers_again(config: Config) -> bool:
    """Whether what entered a block's sharded computation is gathered once more in its backward pass."""
    return config.parallel.sequence_parallel and not keeps_gathered(config)


def tensor_traffic(config: Config, plan: BatchPlan, stage: int) -> Traffic:
    """What a rank of a stage sends to its tensor-parallel peers for one micro-batch."""
    hidden = float(BYTES[config.train.precision] * plan.micro_batch_size * plan.sequence_length)
    hidden *= config.model.hidden_size
    num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
    num_ends = (stage == 0) + (stage == plan.pipeline - 1)
    traffic = tensor_traffic_of_block(config, plan).times(num_blocks) + all_reduce(hidden, plan.tensor).times(num_ends)
    if config.parallel.sequence_parallel and stage == 0:
        # Ranks see other positions: the gradient of the position embedding is summed.
        positions = float(BYTES[config.train.precision] * config.model.max_positions * config.model.hidden_size)
        traffic += all_reduce(positions, plan.tensor)
    return traffic


def pipeline_traffic(config: Config, plan: BatchPlan, stage: int) -> Traffic:
    """What a rank of a stage sends to its neighbours for one micro-batch, forward and backward."""
    neighbours = (stage > 0) + (stage < plan.pipeline - 1)
    hidden = BYTES[config.train.precision] * plan.micro_batch_size * plan.sequence_length * config.model.hidden_size
    if config.parallel.sequence_parallel or config.deepspeed.get("pipeline", {}).get("pipe_partitioned", False):
        hidden //= plan.tensor
    return Traffic(float(hidden), 1).times(neighbours)


def tied_traffic(config: Config, plan: BatchPlan, stage: int) -> Traffic:
    """What the two stages that hold the tied embedding send for its gradient, once a step."""
    return all_reduce(tied_gradient_bytes(config, plan, stage), 2)


def tied_gradient_bytes(config: Config, plan: BatchPlan, stage: int) -> float:
    """Bytes of the tied embedding's gradient, fp32, where two stages hold the weight; else 0."""
    if plan.pipeline == 1 or stage not in (0, plan.pipeline - 1):
        return 0.0
    return 4.0 * config.model.padded_vocab_size * config.model.hidden_size / plan.tensor


def data_traffic_per_micro_batch(config: Config, plan: BatchPlan, stage: int) -> tuple[Traffic, Traffic]:
    """Gradients that a rank sends to its data-parallel peers with every micro-batch, and weights likewise."""
    zero = zero_stage(config)
    num_weights = num_weights_of_stage(config.model, plan, stage, low_rank_plan(config, plan))
    gradients = weights = Traffic()
    if zero == 2:
        gradients = all_reduce(communication_bytes(config) * num_weights, plan.data)
    if zero == 3:
        gradients = scatter_or_gather(communication_bytes(config) * num_weights, plan.data)
        gathered = scatter_or_gather(float(BYTES[config.train.precision] * num_weights), plan.data)
        num_blocks = len(blocks_of_stage(config.model.num_layers, plan.pipeline, stage))
        times = 2 - min(reuse_distance(config), num_weights) / num_weights
        weights = Traffic(times * gathered.sent, rings=times * num_blocks if plan.data > 1 else 0)
    return gradients, weights


def data_traffic_per_step(config: Config, plan: BatchPlan, stage: int) -> tuple[Traffic, Traffic]:
    """Gradients that a rank sends to its data-parallel peers once a step, and updated weights likewise."""
    zero = zero_stage(config)
    num_weights = num_weights_of_stage(config.model, plan, stage, low_rank_plan(config, plan))
    gradients = weights = Traffic()
    # The tied embedding's gradient is summed by itself first (PipelineEngine._reduce_tied_gradients).
    tied = tied_gradient_bytes(config, plan, stage)
    if tied and plan.data > 2:
        gradients += all_reduce(tied, plan.data)
    if zero in (0, 1):
        gradients += all_reduce(communication_bytes(config) * num_weights, plan.data)
    if zero in (1, 2):
        weights = scatter_or_gather(float(BYTES[config.train.precision] * num_weights), plan.data)
    return gradients, weights


def communication_bytes(config: Config) -> float:
    """Bytes of a number in the reduction of gradients."""
    return float(BYTES[config.deepspeed.get("communication_data_type", "fp32")])


def groups_of(plan: BatchPlan, stage: int) -> dict[str, list[int]]:
    """Returns the tensor and data group of a stage's first rank, its neighbours' group, and both ends of its pipeline.

    Of neighbours the pair is taken that is farther apart: with the next stage if there is one.
    """
    other = stage + 1 if stage < plan.pipeline - 1 else max(0, stage - 1)
    return {
        "tensor": [rank_of(plan, stage, 0, rank) for rank in range(plan.tensor)],
        "data": [rank_of(plan, stage, rank, 0) for rank in range(plan.data)],
        "pipeline": sorted({rank_of(plan, stage, 0, 0), rank_of(plan, other, 0, 0)}),
        "ends": sorted({rank_of(plan, 0, 0, 0), rank_of(plan, plan.pipeline - 1, 0, 0)}),
    }
