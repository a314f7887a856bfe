"""Which rank stands where in the mesh, and which blocks and weights a pipeline stage holds. Imports no torch."""

from __future__ import annotations

from functools import lru_cache

from mlra_scale.config import BatchPlan, ModelConfig
from mlra_scale.model.parameters import LowRankPlan, ParameterInfo, ParameterTable


def rank_of(plan: BatchPlan, stage: int, data_rank: int, tensor_rank: int) -> int:
    """Returns the global rank at a place of the mesh: tensor ranks are innermost, stages outermost."""
    return (stage * plan.data + data_rank) * plan.tensor + tensor_rank


def tensor_groups(plan: BatchPlan) -> list[list[int]]:
    """Returns the groups of ranks that split the matrices of a stage among them."""
    return [
        [rank_of(plan, stage, data, tensor) for tensor in range(plan.tensor)]
        for stage in range(plan.pipeline)
        for data in range(plan.data)
    ]


def pipeline_groups(plan: BatchPlan) -> list[list[int]]:
    """Returns the groups of ranks that hand activations to each other, first stage first."""
    return [
        [rank_of(plan, stage, data, tensor) for stage in range(plan.pipeline)]
        for data in range(plan.data)
        for tensor in range(plan.tensor)
    ]


def data_groups(plan: BatchPlan) -> list[list[int]]:
    """Returns the groups of ranks that hold the same weights and see different samples."""
    return [
        [rank_of(plan, stage, data, tensor) for data in range(plan.data)]
        for stage in range(plan.pipeline)
        for tensor in range(plan.tensor)
    ]


def blocks_of_stage(num_layers: int, num_stages: int, stage: int) -> range:
    """Returns the blocks of one pipeline stage: as even as possible, the earlier stages take what is left over."""
    share, rest = divmod(num_layers, num_stages)
    first = stage * share + min(stage, rest)
    return range(first, first + share + (stage < rest))


def weights_of_stage(
    model: ModelConfig, num_stages: int, stage: int, low_rank_plan: LowRankPlan = "replicated"
) -> list[ParameterInfo]:
    """Returns the weights that a stage holds; the last stage has its own copy of the tied embedding as the head."""
    blocks = blocks_of_stage(model.num_layers, num_stages, stage)
    is_first, is_last = stage == 0, stage == num_stages - 1
    held = []
    for name, info in ParameterTable(model, low_rank_plan).items():
        owner, *rest = name.split(".")
        is_here = (
            int(rest[0]) in blocks
            if owner == "blocks"
            else is_last
            if owner == "final_norm"
            else is_first or (is_last and owner == "embedding")
        )
        if is_here:
            held.append(info)
    return held


def num_held(infos: list[ParameterInfo], tensor_parallel: int) -> int:
    """Returns how many numbers of these weights one tensor-parallel rank holds, padded vocabulary rows included."""
    total = 0
    for info in infos:
        split = 1 if info.shard_dim is None else tensor_parallel
        total += info.numel() // split
    return total


def num_weights_of_stage(
    model: ModelConfig, plan: BatchPlan, stage: int, low_rank_plan: LowRankPlan = "replicated"
) -> int:
    """Returns `num_held` of `weights_of_stage` without a table of every block: all blocks have equally many weights."""
    of_ends, of_block = _weights_of_ends_and_block(model, plan.tensor, plan.pipeline, stage, low_rank_plan)
    return of_ends + of_block * len(blocks_of_stage(model.num_layers, plan.pipeline, stage))


@lru_cache(maxsize=4096)
def _weights_of_ends_and_block(
    model: ModelConfig, tensor: int, num_stages: int, stage: int, low_rank_plan: LowRankPlan
) -> tuple[int, int]:
    """Numbers that a rank holds of what is in no block, and of one block."""
    short = model.model_copy(update={"num_layers": 1})
    held = weights_of_stage(short, num_stages, stage, low_rank_plan)
    block = [info for info in ParameterTable(short, low_rank_plan).values() if info.name.startswith("blocks.")]
    ends = [info for info in held if not info.name.startswith("blocks.")]
    return num_held(ends, tensor), num_held(block, tensor)
