"""The parameter table: canonical name, global shape and sharding of every weight. Imports no torch.

Initialization, engines, checkpoints, export, gradient statistics and parity tests read this one table. Names and shapes
are those of the global (unsharded) tensors, whatever the layout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mlra_scale.config import ModelConfig

Kind = Literal["embedding", "positions", "factor", "matrix", "bias", "norm"]


@dataclass(frozen=True)
class ParameterInfo:
    """One weight of the model."""

    name: str  # canonical name, e.g. `blocks.3.attention.q.down.weight`
    shape: tuple[int, ...]  # of the global tensor; matrices are [out, in]
    shard_dim: int | None  # dimension split over tensor-parallel ranks, or None where every rank holds the whole tensor
    kind: Kind  # what the weight is; decides weight decay and reporting. Gains are of kind `norm`

    def local_shape(self, tensor_parallel: int) -> tuple[int, ...]:
        """Shape of one tensor-parallel rank's part."""
        if self.shard_dim is None:
            return self.shape
        assert self.shape[self.shard_dim] % tensor_parallel == 0, (self.name, self.shape, tensor_parallel)
        return tuple(size // tensor_parallel if dim == self.shard_dim else size for dim, size in enumerate(self.shape))

    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LinearMap:
    """A map that sigmaReparam normalises; power iterations on it begin with a vector that carries over."""

    name: str  # canonical prefix, such as "blocks.3.attention.q"
    gain: str  # canonical name
    weights: tuple[ParameterInfo, ...]  # the dense matrix, or down and up factor
    vector: str  # name under which a checkpoint keeps the vector
    vector_size: int  # the rank, or of a dense matrix the dimension that tensor parallelism does not split


class ParameterTable(dict[str, ParameterInfo]):
    """Every parameter of a model in order, by canonical name.

    The token embedding is listed once: the output head shares it. Its rows from `vocab_size` on are padding, always
    zero, masked in the head and never counted by any statistic.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__((info.name, info) for info in _entries(model))
        self.vocab_size = model.vocab_size
        self.normalised = {entry.weights[-1].name: entry for entry in _normalised(self)}


def _entries(model: ModelConfig) -> Iterator[ParameterInfo]:
    D = model.hidden_size
    yield ParameterInfo("embedding.weight", (model.padded_vocab_size, D), 0, "embedding")
    yield ParameterInfo("positions.weight", (model.max_positions, D), None, "positions")
    for block in range(model.num_layers):
        yield from _block(model, f"blocks.{block}")
    yield from _norm("final_norm", D)


def _block(model: ModelConfig, prefix: str) -> Iterator[ParameterInfo]:
    D, F = model.hidden_size, model.ffn_size
    yield from _norm(f"{prefix}.attention_norm", D)
    for projection in ("q", "k", "v", "o"):
        yield from _projection(model, f"{prefix}.attention.{projection}", projection)
    if model.qk_norm:
        for norm in ("q_norm", "k_norm"):
            yield ParameterInfo(f"{prefix}.attention.{norm}.weight", (model.head_dim,), None, "norm")
    yield from _norm(f"{prefix}.mlp_norm", D)
    yield from _linear(model, f"{prefix}.mlp.fc_in", (F, D), 0, "matrix")
    yield from _linear(model, f"{prefix}.mlp.fc_out", (D, F), 1, "matrix")


def _norm(prefix: str, hidden_size: int) -> Iterator[ParameterInfo]:
    yield ParameterInfo(f"{prefix}.weight", (hidden_size,), None, "norm")
    yield ParameterInfo(f"{prefix}.bias", (hidden_size,), None, "norm")


def _projection(model: ModelConfig, prefix: str, projection: str) -> Iterator[ParameterInfo]:
    """q, k, v are split by their outputs (heads), o by its inputs; of a factorised one the factor at the heads is."""
    D, R = model.hidden_size, model.rank
    is_output = projection == "o"
    if model.is_factorised(projection):
        yield ParameterInfo(f"{prefix}.down.weight", (R, D), 1 if is_output else None, "factor")
        yield from _linear(model, f"{prefix}.up", (D, R), None if is_output else 0, "factor")
    else:
        yield from _linear(model, prefix, (D, D), 1 if is_output else 0, "matrix")


def _linear(
    model: ModelConfig, prefix: str, shape: tuple[int, int], shard_dim: int | None, kind: Kind
) -> Iterator[ParameterInfo]:
    """Weight [out, in] and bias [out] of a map, and the gain of sigmaReparam."""
    yield ParameterInfo(f"{prefix}.weight", shape, shard_dim, kind)
    yield ParameterInfo(f"{prefix}.bias", shape[:1], 0 if shard_dim == 0 else None, "bias")
    if model.sigma_reparam:
        yield ParameterInfo(f"{prefix}.gain", (1,), None, "norm")


def _normalised(table: ParameterTable) -> Iterator[LinearMap]:
    for gain in (name for name in table if name.endswith(".gain")):
        owner = gain.removesuffix(".gain")
        name, last = owner.removesuffix(".up"), table[f"{owner}.weight"]
        weights = (last,) if name == owner else (table[f"{name}.down.weight"], last)
        yield LinearMap(name, gain, weights, f"power_iteration/{name}", last.shape[0 if last.shard_dim == 1 else 1])
