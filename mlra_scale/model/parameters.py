"""The parameter table: canonical name, global shape and sharding of every weight.

One table, read by initialization, engines, checkpoints, export, gradient statistics and parity tests. Names and
shapes are those of the global (unsharded) tensors, whatever the layout.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mlra_scale.config import ModelConfig

LowRankPlan = Literal["replicated", "sharded", "merged"]
Kind = Literal["embedding", "positions", "factor", "matrix", "bias", "norm"]


@dataclass(frozen=True)
class ParameterInfo:
    """One weight of the model.

    Attributes:
        name: Canonical name, e.g. `blocks.3.attention.q.down.weight`.
        shape: Global shape; matrices are [out, in].
        shard_dim: Dimension split over tensor-parallel ranks, or None where every rank holds the whole tensor.
        kind: What the weight is; decides weight decay and reporting. Gains are of kind `norm`.
    """

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    kind: Kind

    def local_shape(self, tensor_parallel: int) -> tuple[int, ...]:
        """Shape of one tensor-parallel rank's part."""
        if self.shard_dim is None:
            return self.shape
        assert self.shape[self.shard_dim] % tensor_parallel == 0, (self.name, self.shape, tensor_parallel)
        return tuple(size // tensor_parallel if dim == self.shard_dim else size for dim, size in enumerate(self.shape))

    def numel(self) -> int:
        """Number of elements of the global tensor."""
        total = 1
        for size in self.shape:
            total *= size
        return total


class ParameterTable(Mapping[str, ParameterInfo]):
    """Every parameter of the model in order, by canonical name.

    The token embedding is listed once: the output head shares it. Its rows from `vocab_size` on are padding, always
    zero, masked in the head and never counted by any statistic.

    Args:
        model: The model.
        low_rank_plan: With `sharded` the down factors of q, k and v are split over tensor-parallel ranks.
    """

    def __init__(self, model: ModelConfig, low_rank_plan: LowRankPlan = "replicated") -> None:
        self.vocab_size = model.vocab_size
        self._entries = {info.name: info for info in _entries(model, low_rank_plan)}

    def __getitem__(self, name: str) -> ParameterInfo:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _entries(model: ModelConfig, low_rank_plan: LowRankPlan) -> Iterator[ParameterInfo]:
    D, F = model.hidden_size, model.ffn_size
    yield ParameterInfo("embedding.weight", (model.padded_vocab_size, D), 0, "embedding")
    yield ParameterInfo("positions.weight", (model.max_positions, D), None, "positions")
    for block in range(model.num_layers):
        prefix = f"blocks.{block}"
        yield from _norm(f"{prefix}.attention_norm", D)
        for projection in ("q", "k", "v"):
            yield from _input_projection(model, f"{prefix}.attention.{projection}", projection, low_rank_plan)
        yield from _output_projection(model, f"{prefix}.attention.o")
        if model.qk_norm:
            for norm in ("q_norm", "k_norm"):
                yield ParameterInfo(f"{prefix}.attention.{norm}.weight", (model.head_dim,), None, "norm")
        yield from _norm(f"{prefix}.mlp_norm", D)
        yield ParameterInfo(f"{prefix}.mlp.fc_in.weight", (F, D), 0, "matrix")
        yield ParameterInfo(f"{prefix}.mlp.fc_in.bias", (F,), 0, "bias")
        yield from _gain(model, f"{prefix}.mlp.fc_in")
        yield ParameterInfo(f"{prefix}.mlp.fc_out.weight", (D, F), 1, "matrix")
        yield ParameterInfo(f"{prefix}.mlp.fc_out.bias", (D,), None, "bias")
        yield from _gain(model, f"{prefix}.mlp.fc_out")
    yield from _norm("final_norm", D)


def _norm(prefix: str, hidden_size: int) -> Iterator[ParameterInfo]:
    yield ParameterInfo(f"{prefix}.weight", (hidden_size,), None, "norm")
    yield ParameterInfo(f"{prefix}.bias", (hidden_size,), None, "norm")


def _gain(model: ModelConfig, prefix: str) -> Iterator[ParameterInfo]:
    if model.sigma_reparam:
        yield ParameterInfo(f"{prefix}.gain", (1,), None, "norm")


def _input_projection(
    model: ModelConfig, prefix: str, projection: str, low_rank_plan: LowRankPlan
) -> Iterator[ParameterInfo]:
    D, R = model.hidden_size, model.rank
    if model.is_factorised(projection):
        yield ParameterInfo(f"{prefix}.down.weight", (R, D), 0 if low_rank_plan == "sharded" else None, "factor")
        yield ParameterInfo(f"{prefix}.up.weight", (D, R), 0, "factor")
        yield ParameterInfo(f"{prefix}.up.bias", (D,), 0, "bias")
        yield from _gain(model, f"{prefix}.up")
    else:
        yield ParameterInfo(f"{prefix}.weight", (D, D), 0, "matrix")
        yield ParameterInfo(f"{prefix}.bias", (D,), 0, "bias")
        yield from _gain(model, prefix)


def _output_projection(model: ModelConfig, prefix: str) -> Iterator[ParameterInfo]:
    D, R = model.hidden_size, model.rank
    if model.is_factorised("o"):
        yield ParameterInfo(f"{prefix}.down.weight", (R, D), 1, "factor")
        yield ParameterInfo(f"{prefix}.up.weight", (D, R), None, "factor")
        yield ParameterInfo(f"{prefix}.up.bias", (D,), None, "bias")
        yield from _gain(model, f"{prefix}.up")
    else:
        yield ParameterInfo(f"{prefix}.weight", (D, D), 1, "matrix")
        yield ParameterInfo(f"{prefix}.bias", (D,), None, "bias")
        yield from _gain(model, prefix)


@dataclass(frozen=True)
class LinearMap:
    """One map that sigmaReparam normalises, W = up down; of a dense one, one of the two is the identity.

    Attributes:
        name: Canonical prefix of the map.
        up: Canonical name of the factor at the output, or of the dense matrix of q, k, v, fc_in.
        down: Canonical name of the factor at the input, or of the dense matrix of o, fc_out.
        gain: Canonical name of the gain.
        size: Length of the vector between the two, which tensor parallelism never splits.
    """

    name: str
    up: str | None
    down: str | None
    gain: str
    size: int


def linear_maps(model: ModelConfig) -> dict[str, LinearMap]:
    """Returns the normalised maps of a model by name; there are none without `model.sigma_reparam`."""
    if not model.sigma_reparam:
        return {}
    prefixes = [f"blocks.{block}" for block in range(model.num_layers)]
    return {found.name: found for prefix in prefixes for found in maps_of_block(model, prefix)}


def maps_of_block(model: ModelConfig, prefix: str) -> Iterator[LinearMap]:
    """Yields the maps of the block with a canonical prefix."""
    D = model.hidden_size
    for name in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.fc_in", "mlp.fc_out"):
        room, part = name.split(".")
        name, weight, gain = f"{prefix}.{name}", f"{prefix}.{name}.weight", f"{prefix}.{name}.gain"
        if room == "attention" and model.is_factorised(part):
            yield LinearMap(name, f"{name}.up.weight", f"{name}.down.weight", f"{name}.up.gain", model.rank)
        elif part in ("o", "fc_out"):
            yield LinearMap(name, None, weight, gain, D)
        else:
            yield LinearMap(name, weight, None, gain, D)


def vector_name(map_name: str) -> str:
    """Returns the name under which a checkpoint keeps the vector of a map's power iteration."""
    return f"power_iteration/{map_name}"
