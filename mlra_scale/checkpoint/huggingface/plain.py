"""The weights of a stored model with those options folded in that a plain model of the same function does not know.

sigmaReparam:       the matrix, or the up factor, times gamma / sigma; the gains are gone
LayerNorm Scaling:  weights and biases of the norms of block l times 1/sqrt(l)

Folded weights are float64, so that only the rounding to the written type remains; all others are as they are stored.
QK-norm and the scale of embeddings are part of the shipped model (modeling_mlra.py); in stock GPT-2 the first cannot be
expressed, and the second unties the head from the embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlra_scale.model.parameters import LinearMap, linear_maps, vector_name
from mlra_scale.model.power_iteration import iterated

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store


class PlainWeights:
    """Weights by canonical name; each is made when it is asked for.

    Args:
        store: An open checkpoint.

    Attributes:
        names: Those that a plain model has, in the order of the model.

    Raises:
        CheckpointError: The store lacks vectors of power iterations.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._vectors = store.power_vectors()
        maps = linear_maps(store.model).values()
        self._scaled = {entry.up or entry.down: entry for entry in maps}
        gains = {entry.gain for entry in maps}
        self.names = [name for name in store.table if name not in gains]

    def __contains__(self, name: str) -> bool:
        return name in self._store.table

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor, factor = self._store.tensor(name), self._norm_factor(name)
        if name in self._scaled:
            return tensor.double() * self._scale(self._scaled[name])
        return tensor if factor == 1.0 else tensor.double() * factor

    def _norm_factor(self, name: str) -> float:
        parts = name.split(".")
        is_scaled = parts[0] == "blocks" and parts[2] in ("attention_norm", "mlp_norm")
        return self._store.model.norm_factor(int(parts[1])) if is_scaled else 1.0

    def _scale(self, entry: LinearMap) -> torch.Tensor:
        """gamma / sigma, with the sigma that the next step or validation of the run would compute with."""
        up, down = (None if part is None else self._store.tensor(part).double() for part in (entry.up, entry.down))
        sigma = iterated(self._vectors[vector_name(entry.name)].double(), up, down).sigma
        return self._store.tensor(entry.gain).double() / sigma
