"""The parameter table: canonical name, global shape and sharding of every weight.

One table, read by initialization, engines, checkpoints, export, gradient statistics and parity tests. Names and
shapes are those of the global (unsharded) tensors, whatever the layout.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mlra_scale.config import ModelConfig

Kind = Literal["embedding", "positions", "factor", "matrix", "bias", "norm"]


@dataclass(frozen=True)
class ParameterInfo:
    """One weight of the model.

    Attributes:
        name: Canonical name, e.g. `blocks.3.attention.q.down.weight`.
        shape: Global shape; matrices are [out, in].
        shard_dim: Dimension split over tensor-parallel ranks, or None where every rank holds the whole tensor.
        kind: What the weight is; decides weight decay and reporting.
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
    """

    def __init__(self, model: ModelConfig) -> None:
        self.vocab_size = model.vocab_size
        self._entries = {info.name: info for info in _entries(model)}

    def __getitem__(self, name: str) -> ParameterInfo:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _entries(model: ModelConfig) -> Iterator[ParameterInfo]:
    D, F = model.hidden_size, model.ffn_size
    yield ParameterInfo("embedding.weight", (model.padded_vocab_size, D), 0, "embedding")
    yield ParameterInfo("positions.weight", (model.max_positions, D), None, "positions")
    for block in range(model.num_layers):
        prefix = f"blocks.{block}"
        yield from _norm(f"{prefix}.attention_norm", D)
        for projection in ("q", "k", "v"):
            yield from _input_projection(model, f"{prefix}.attention.{projection}", projection)
        yield from _output_projection(model, f"{prefix}.attention.o")
        yield from _norm(f"{prefix}.mlp_norm", D)
        yield ParameterInfo(f"{prefix}.mlp.fc_in.weight", (F, D), 0, "matrix")
        yield ParameterInfo(f"{prefix}.mlp.fc_in.bias", (F,), 0, "bias")
        yield ParameterInfo(f"{prefix}.mlp.fc_out.weight", (D, F), 1, "matrix")
        yield ParameterInfo(f"{prefix}.mlp.fc_out.bias", (D,), None, "bias")
    yield from _norm("final_norm", D)


def _norm(prefix: str, hidden_size: int) -> Iterator[ParameterInfo]:
    yield ParameterInfo(f"{prefix}.weight", (hidden_size,), None, "norm")
    yield ParameterInfo(f"{prefix}.bias", (hidden_size,), None, "norm")


def _input_projection(model: ModelConfig, prefix: str, projection: str) -> Iterator[ParameterInfo]:
    D, R = model.hidden_size, model.rank
    if model.is_factorised(projection):
        yield ParameterInfo(f"{prefix}.down.weight", (R, D), None, "factor")
        yield ParameterInfo(f"{prefix}.up.weight", (D, R), 0, "factor")
        yield ParameterInfo(f"{prefix}.up.bias", (D,), 0, "bias")
    else:
        yield ParameterInfo(f"{prefix}.weight", (D, D), 0, "matrix")
        yield ParameterInfo(f"{prefix}.bias", (D,), 0, "bias")


def _output_projection(model: ModelConfig, prefix: str) -> Iterator[ParameterInfo]:
    D, R = model.hidden_size, model.rank
    if model.is_factorised("o"):
        yield ParameterInfo(f"{prefix}.down.weight", (R, D), 1, "factor")
        yield ParameterInfo(f"{prefix}.up.weight", (D, R), None, "factor")
        yield ParameterInfo(f"{prefix}.up.bias", (D,), None, "bias")
    else:
        yield ParameterInfo(f"{prefix}.weight", (D, D), 1, "matrix")
        yield ParameterInfo(f"{prefix}.bias", (D,), None, "bias")
