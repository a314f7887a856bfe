"""What ranks send to each other in a step, by kind, from the layout. Imports no torch; every function is pure.

Bytes that one rank sends: of k ranks an all-reduce sends 2 (k - 1) / k of the tensor, a gather and a reduce-scatter
(k - 1) / k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2

from mlra_scale.config import BatchPlan
from mlra_scale.model.low_rank_plan import collectives, numbers_sent, shape_of
from mlra_scale.model.matrix_rounds import rounds_of
from mlra_scale.planning.cluster import Cluster
from mlra_scale.planning.layout import Matrix, Stage, rank_of

HOP = 0.2
"""Time in which a running ring passes a chunk to the next rank, in latencies of a message: assumed."""


@dataclass(frozen=True)
class Traffic:
    """What one rank sends."""

    sent: float = 0.0  # bytes
    messages: float = 0.0  # messages and sums, which pass through a tree of the ranks
    rings: float = 0.0  # gathers, scatters and all-to-alls: something from or to every other rank

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.messages + other.messages, self.rings + other.rings)

    def times(self, number: float) -> Traffic:
        """Returns a multiple of it."""
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


def tensor_traffic_of_block(stage: Stage) -> Traffic:
    """What a block sends for one micro-batch, forward and backward, with what checkpointing repeats.

    Sums of the outputs of o (of its latents where it is factorised) and fc_out forward, and of the gradient of fc_in's
    input backward; q, k, v by their plan (low_rank_plan.py), dense ones the gradient of their input.
    """
    plan, model, ranks = stage.plan, stage.model, stage.plan.tensor
    if ranks == 1:
        return Traffic()
    shape = shape_of(stage.config, plan)
    has_split = stage.split > 1
    hidden = float(stage.hidden)
    output = hidden * model.rank / model.hidden_size if model.is_factorised("o") else hidden
    # With sequence parallelism a gather and a scatter take the place of a sum. What enters is gathered again in the
    # backward pass; with checkpointing it is kept, and the repeated forward pass gathers it.
    again = scatter_or_gather(hidden, ranks) if has_split and not stage.keeps_gathered else Traffic()
    traffic = all_reduce(output, ranks) + all_reduce(hidden, ranks) + all_reduce(hidden, ranks) + again
    if has_split and model.is_factorised("o"):
        # The up factor works on a part of the tokens: its gradient is summed.
        traffic += all_reduce(float(stage.element * model.rank * model.hidden_size), ranks)
    # What the recomputation repeats, which ends before fc_out: o's sum, or with parts o's scatter and what enters.
    repeated = all_reduce(output, ranks)
    if has_split:
        repeated = scatter_or_gather(output, ranks) + scatter_or_gather(hidden, ranks)
    if shape.factorised == 0:
        traffic += all_reduce(hidden, ranks) + again
        entering = hidden if has_split else 0.0
    else:
        chosen = stage.low_rank_plan
        traffic += Traffic(numbers_sent(chosen, shape) * stage.element, len(collectives(chosen, shape)))
        latents = float(stage.element * shape.factorised * shape.tokens * model.rank)
        entering = latents if has_split and chosen == "replicated" else 0.0
        if has_split and (chosen == "merged" or shape.has_dense):
            entering += hidden
    if entering > 0.0:
        repeated += scatter_or_gather(entering, ranks)
    return traffic + repeated if stage.checkpointing == "block" else traffic


def tensor_traffic(stage: Stage) -> Traffic:
    """What a rank of a stage sends to its tensor-parallel peers for one micro-batch: blocks, embedding and head."""
    ranks = stage.plan.tensor
    ends = all_reduce(float(stage.hidden), ranks).times(stage.is_first + stage.is_last)
    traffic = tensor_traffic_of_block(stage).times(stage.num_blocks) + ends
    if stage.split > 1 and stage.is_first:
        # Ranks see other positions: the gradient of the position embedding is summed.
        traffic += all_reduce(float(stage.element * stage.model.max_positions * stage.model.hidden_size), ranks)
    return traffic


def pipeline_traffic(stage: Stage) -> Traffic:
    """What a rank of a stage sends to its neighbours for one micro-batch, forward and backward."""
    hidden = stage.hidden
    if stage.split > 1 or stage.config.deepspeed.get("pipeline", {}).get("pipe_partitioned", False):
        hidden //= stage.plan.tensor
    return Traffic(float(hidden), 1).times((not stage.is_first) + (not stage.is_last))


def tied_traffic(stage: Stage) -> Traffic:
    """What the two stages that hold the tied embedding send for its gradient, once a step."""
    return all_reduce(tied_gradient_bytes(stage), 2)


def tied_gradient_bytes(stage: Stage) -> float:
    """Bytes of the tied embedding's gradient, fp32, where two stages hold the weight; else 0."""
    if stage.is_first == stage.is_last:
        return 0.0
    return 4.0 * stage.model.padded_vocab_size * stage.model.hidden_size / stage.plan.tensor


def data_traffic_per_micro_batch(stage: Stage) -> tuple[Traffic, Traffic]:
    """Gradients that a rank sends to its data-parallel peers with every micro-batch, and weights likewise.

    ZeRO 2: gradients are all-reduced (DeepSpeed 0.19 sums whole buckets and takes its part). ZeRO 3: gradients are
    reduced and scattered; weights are gathered, and once more what is not kept (stage3_max_reuse_distance).
    """
    num_weights, ranks = stage.num_weights, stage.plan.data
    gradient = float(stage.reduced_element) * num_weights
    if stage.zero == 2:
        return all_reduce(gradient, ranks), Traffic()
    if stage.zero < 3:
        return Traffic(), Traffic()
    gathered = scatter_or_gather(float(stage.element * num_weights), ranks)
    times = 2 - min(stage.reuse_distance, num_weights) / num_weights
    weights = Traffic(times * gathered.sent, rings=times * stage.num_blocks if ranks > 1 else 0)
    return scatter_or_gather(gradient, ranks), weights


def data_traffic_per_step(stage: Stage) -> tuple[Traffic, Traffic]:
    """Gradients that a rank sends to its data-parallel peers once a step (ZeRO 0, 1), and updated weights (1, 2)."""
    ranks = stage.plan.data
    gradients = weights = Traffic()
    # The tied embedding's gradient is summed by itself first (PipelineEngine._reduce_tied_gradients).
    tied = tied_gradient_bytes(stage)
    if tied and ranks > 2:
        gradients += all_reduce(tied, ranks)
    if stage.zero in (0, 1):
        gradients += all_reduce(float(stage.reduced_element) * stage.num_weights, ranks)
    if stage.zero in (1, 2):
        weights = scatter_or_gather(float(stage.element * stage.num_weights), ranks)
    return gradients, weights


def matrix_traffic(stage: Stage) -> Traffic:
    """What the mean rank of a stage sends for updates of muon and spectron, once a step: see `_matrix_traffic`."""
    plan = stage.plan
    return _matrix_traffic(stage.matrices, plan.tensor, plan.data, stage.zero, stage.transported_element)


@lru_cache(maxsize=4096)
def _matrix_traffic(matrices: tuple[Matrix, ...], tensor: int, data: int, zero: int, element: int) -> Traffic:
    """Traffic of the matrices of a stage.

    A round has two all-to-alls (parallel/matrix_exchange.py): every matrix goes to its owner, mostly a rank that has a
    part of it, and what becomes of it goes to all ranks that hold parts; one in which nobody sends is left out.
    Spectron sums two vectors of all its factors in fp32, of their rows and of their columns.
    """
    ranks = tensor * data
    if ranks == 1 or not matrices:
        return Traffic()
    pieces = _pieces(matrices, tensor, data) if zero in (1, 2) else []
    holders = [{d * tensor + t: numbers for d, numbers in piece.items() for t in range(tensor)} for piece in pieces]
    moved, rings = 0.0, 0
    for indices in rounds_of([matrix[:2] for matrix in matrices], ranks, holders):
        is_sent = is_returned = False
        for owner, index in indices.items():
            matrix = matrices[index]
            size = matrix.num_held(tensor)
            kept = holders[index].get(owner, 0.0) if holders else size / (data if zero else 1)
            moved += matrix.numel() + tensor * (data if zero == 0 else 1) * size - 2 * kept
            is_cut = [*pieces[index]] != [owner // tensor] if pieces else zero == 3 and data > 1
            is_sent |= is_cut or (tensor > 1 and matrix.shard_dim is not None)
            is_returned |= is_cut or tensor > 1 or zero == 0
        rings += is_sent + is_returned
    traffic = Traffic(element * moved / ranks, rings=rings)
    factors = [matrix for matrix in matrices if matrix.is_spectron]
    for length in (sum(matrix.rows for matrix in factors), sum(matrix.columns for matrix in factors)):
        traffic += all_reduce(4.0 * length, ranks) if factors else Traffic()
    return traffic


def _pieces(matrices: tuple[Matrix, ...], tensor: int, data: int) -> list[dict[int, float]]:
    """Returns how many numbers of each matrix each data rank holds: of its tensor shard, at ZeRO 1 and 2.

    They cut a parameter group, one weight after the other, into equal pieces for the data ranks.
    """
    totals = dict.fromkeys((matrix.group for matrix in matrices), 0)
    for matrix in matrices:
        totals[matrix.group] += matrix.num_held(tensor)
    ends, found = dict.fromkeys(totals, 0), []
    for matrix in matrices:
        total, start = totals[matrix.group], ends[matrix.group]
        ends[matrix.group] = end = start + matrix.num_held(tensor)
        # In units of 1 / data, in which pieces are whole numbers.
        ranks = range(start * data // total, -(-end * data // total))
        shared = {rank: min((rank + 1) * total, end * data) - max(rank * total, start * data) for rank in ranks}
        found.append({rank: numbers / data for rank, numbers in shared.items()})
    return found


def ranks_of_stage(plan: BatchPlan, stage: int) -> list[int]:
    """Returns all ranks of a stage, which exchange its matrices."""
    return [rank_of(plan, stage, data_rank, rank) for data_rank in range(plan.data) for rank in range(plan.tensor)]


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
