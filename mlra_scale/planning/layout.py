"""Which rank is where in the mesh, and what a pipeline stage holds. Imports no torch."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from mlra_scale.config import BatchPlan, Config, ModelConfig, OptimConfig, engine_kind, zero_stage
from mlra_scale.model.low_rank_plan import BYTES, low_rank_plan
from mlra_scale.model.parameters import ParameterInfo, ParameterTable
from mlra_scale.model.update_rules import update_rules

Axis = Literal["tensor", "pipeline", "data"]
AXES: tuple[Axis, ...] = ("tensor", "pipeline", "data")


def rank_of(plan: BatchPlan, stage: int, data_rank: int, tensor_rank: int) -> int:
    """Returns the global rank at a coordinate of the mesh: tensor ranks are innermost, stages outermost."""
    return (stage * plan.data + data_rank) * plan.tensor + tensor_rank


def groups_along(plan: BatchPlan, axis: Axis) -> list[list[int]]:
    """Returns the groups of ranks that differ in their coordinate on one axis only, in its order."""
    mesh = np.arange(plan.world_size).reshape(plan.pipeline, plan.data, plan.tensor)
    dim = ("pipeline", "data", "tensor").index(axis)
    groups: list[list[int]] = np.moveaxis(mesh, dim, -1).reshape(-1, mesh.shape[dim]).tolist()
    return groups


def blocks_of_stage(num_layers: int, num_stages: int, stage: int) -> range:
    """Returns the blocks of one pipeline stage: as even as possible, the earlier stages take what is left over."""
    share, rest = divmod(num_layers, num_stages)
    first = stage * share + min(stage, rest)
    return range(first, first + share + (stage < rest))


def weights_of_stage(model: ModelConfig, num_stages: int, stage: int) -> list[ParameterInfo]:
    """Returns the weights that a stage holds; the last stage has its own copy of the tied embedding as the head."""
    blocks = blocks_of_stage(model.num_layers, num_stages, stage)
    is_first, is_last = stage == 0, stage == num_stages - 1

    def is_here(name: str) -> bool:
        owner, *rest = name.split(".")
        if owner == "blocks":
            return int(rest[0]) in blocks
        return {"embedding": is_first or is_last, "positions": is_first, "final_norm": is_last}[owner]

    return [info for name, info in ParameterTable(model).items() if is_here(name)]


def num_held(infos: list[ParameterInfo], tensor_parallel: int) -> int:
    """Returns how many numbers of these weights one tensor-parallel rank holds, padded vocabulary rows included."""
    return sum(info.numel() // (1 if info.shard_dim is None else tensor_parallel) for info in infos)


def num_weights_of_stage(model: ModelConfig, plan: BatchPlan, stage: int) -> int:
    """Returns `num_held` of `weights_of_stage` without a table of every block: all blocks have equally many weights."""
    of_ends, of_block = _weights_of_ends_and_block(model, plan.tensor, plan.pipeline, stage)
    return of_ends + of_block * len(blocks_of_stage(model.num_layers, plan.pipeline, stage))


@lru_cache(maxsize=4096)
def _weights_of_ends_and_block(model: ModelConfig, tensor: int, num_stages: int, stage: int) -> tuple[int, int]:
    """Numbers that a rank holds of what is in no block, and of one block."""
    short = model.model_copy(update={"num_layers": 1})
    block = [info for info in ParameterTable(short).values() if info.name.startswith("blocks.")]
    ends = [info for info in weights_of_stage(short, num_stages, stage) if not info.name.startswith("blocks.")]
    return num_held(ends, tensor), num_held(block, tensor)


class Matrix(NamedTuple):
    """A matrix that muon or spectron updates. Without its name, so that stages with equal matrices are equal."""

    rows: int  # of the global tensor
    columns: int
    shard_dim: int | None  # as ParameterInfo.shard_dim
    group: tuple[str, float, float]  # optimizer, weight decay, learning-rate factor: ZeRO 1 and 2 cut each group

    @property
    def is_spectron(self) -> bool:
        """Whether it is a factor that spectron updates."""
        return self.group[0] == "spectron"

    def numel(self) -> int:
        """Returns the number of elements of the global tensor."""
        return self.rows * self.columns

    def num_held(self, tensor_parallel: int) -> int:
        """Returns how many of them one tensor-parallel rank holds."""
        return self.numel() // (1 if self.shard_dim is None else tensor_parallel)


@lru_cache(maxsize=4096)
def matrices_of_stage(model: ModelConfig, optim: OptimConfig, num_stages: int, stage: int) -> tuple[Matrix, ...]:
    """Returns the matrices of a stage that muon and spectron update, in the order of the table."""
    rules = update_rules(model, optim)
    if all(rule.is_adamw for rule in rules.values()):
        return ()
    matrices = []
    for info in weights_of_stage(model, num_stages, stage):
        rule = rules[info.name]
        if not rule.is_adamw:
            group = (rule.optimizer, rule.weight_decay, rule.lr_factor)
            matrices.append(Matrix(info.shape[0], info.shape[1], info.shard_dim, group))
    return tuple(matrices)


class Stage:
    """One pipeline stage of a run, with the quantities that the planner's formulas share."""

    def __init__(self, config: Config, plan: BatchPlan, index: int) -> None:
        self.config, self.plan, self.index = config, plan, index
        self.model = model = config.model
        self.zero = zero_stage(config)
        self.is_pipeline = engine_kind(config) == "pipeline"  # whether the pipeline engine runs it
        self.is_first, self.is_last = index == 0, index == plan.pipeline - 1
        self.num_blocks = len(blocks_of_stage(model.num_layers, plan.pipeline, index))
        self.num_weights = num_weights_of_stage(model, plan, index)  # that one rank of it holds
        # Of these, those of the token embedding, where the stage has it.
        self.num_embedding = model.padded_vocab_size * model.hidden_size // plan.tensor
        # Micro-batches whose activations it holds at once (1F1B: one forward, one backward in turns).
        self.num_in_flight = min(plan.accumulation_steps, plan.pipeline - index) if self.is_pipeline else 1
        self.device = "cpu" if config.train.device == "cpu" else "cuda"  # `auto` is planned as a GPU
        settings = config.deepspeed.get("zero_optimization", {})
        self.overlaps = bool(settings.get("overlap_comm", False))
        self.has_buckets = bool(settings.get("contiguous_gradients", True))
        self.bucket_size: int = settings.get("reduce_bucket_size", 500_000_000)  # elements
        # Weights within which ZeRO 3 keeps whole what it will use again.
        self.reuse_distance: int = settings.get("stage3_max_reuse_distance", 1_000_000_000)
        # Bytes of a number in the reduction of gradients.
        self.reduced_element = BYTES[config.deepspeed.get("communication_data_type", "fp32")]
        self.element = BYTES[config.train.precision]  # bytes of a number in compute precision
        self.tokens = plan.micro_batch_size * plan.sequence_length  # of a micro-batch
        self.hidden = self.element * self.tokens * model.hidden_size  # bytes of its whole hidden state
        # Over how many tensor-parallel ranks the stream between blocks is split.
        self.split = plan.tensor if config.parallel.sequence_parallel else 1
        self.low_rank_plan = low_rank_plan(config, plan)
        self.checkpointing = config.parallel.activation_checkpointing
        # With sequence parallelism, whether blocks keep what they gathered instead of gathering it again.
        self.keeps_gathered = self.checkpointing == "block" or model.sigma_reparam
        # Whether micro-batches add up in flat fp32 buffers, and bf16 gradients are freed once added.
        self.adds_up_flat = config.train.precision == "bf16" and self.zero == 1

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices of the stage that muon and spectron update."""
        return matrices_of_stage(self.model, self.config.optim, self.plan.pipeline, self.index)

    @property
    def transported_element(self) -> int:
        """Bytes of a number in Newton-Schulz iterations, and of what is sent for them."""
        return BYTES[self.config.newton_schulz_precision]

    @cached_property
    def num_in_matrices(self) -> int:
        """Weights of these matrices that one rank of the stage holds."""
        return sum(matrix.num_held(self.plan.tensor) for matrix in self.matrices)
