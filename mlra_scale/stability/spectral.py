"""Largest singular values of the attention products, from any sharding, without gathering a matrix.

Per head h, the logits of a block see its hidden state through W_q,h^T W_k,h and its output sees it through W_o,h W_v,h,
both D x D of rank H at most. Their largest singular values bound how strongly a head can react to its input.

Only products of a weight with vectors are needed. Each rank computes the part of its fragments, cut anywhere; vectors
are summed over the ranks, and weights never move. The vectors of all heads of all blocks are summed in one all-reduce
per factor: 4 per iteration and product for dense attention, up to 8 with MLRA.

The products go into Lanczos bidiagonalization (Golub and Kahan 1965, 'Calculating the singular values and
pseudo-inverse of a matrix') rather than plain power iteration: with the same two products per iteration it uses all
vectors so far. For 64 x 768 random heads, whose largest singular values lie close together, power iteration is 2 %
short after 16 iterations, Lanczos 4e-6. Both approach from below.

Legend of shape suffixes: L blocks, N heads, D hidden, I and O in and out features of a factor, K iterations; a head
space holds all heads' features side by side, N H = D.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from mlra_scale.config import ModelConfig
    from mlra_scale.model.parameters import ParameterInfo, ParameterTable
    from mlra_scale.parallel.fragments import Fragment
    from mlra_scale.parallel.topology import Topology

_SEED = 0
"""Of the start vector, always the same one, so that a measurement depends on the weights only."""


@dataclass(frozen=True)
class _Part:
    """Whole rows of a tensor-parallel shard of a weight, from a row and column of the global weight on.

    Elements that another rank owns are zero.
    """

    block: int
    row: int
    column: int
    values_OI: Tensor


@dataclass(frozen=True)
class _Map:
    """One factor or dense weight (such as q.down) of every block, as a linear map of all heads' vectors.

    If it `enters_heads`, it ends in the head space, where each head keeps its own features only.
    """

    name: str
    is_transposed: bool
    enters_heads: bool


class AttentionProducts:
    """The products W_q,h^T W_k,h and W_o,h W_v,h of every head of every block."""

    def __init__(self, model: ModelConfig, table: ParameterTable, topology: Topology):
        self.model = model
        self.table = table
        self.topology = topology
        heads_D = torch.arange(model.hidden_size, device=topology.device) // model.head_dim
        self.own_features_ND = heads_D == torch.arange(model.num_heads, device=topology.device)[:, None]

    def spectral_norms(self, fragments: Iterable[Fragment], iterations: int) -> dict[str, list[float]]:
        """Estimates the largest singular values; collective.

        Args:
            fragments: The fp32 master weights that this rank owns; each element has exactly one owner.
            iterations: Lanczos iterations, at least 1. From the rank H of the products on, the result is exact.

        Returns:
            "qk" and "ov" -> for each block, the largest over its heads.
        """
        parts = self._parts(fragments)
        into_q, into_k, into_v = (self._maps(projection, enters_heads=True) for projection in "qkv")
        out_of_q, out_of_k, out_of_v = (self._maps(projection, is_transposed=True) for projection in "qkv")
        through_o = self._maps("o")
        back_through_o = self._maps("o", is_transposed=True, enters_heads=True)
        products = {
            "qk": (into_k + out_of_q, into_q + out_of_k),
            "ov": (into_v + through_o, back_through_o + out_of_v),
        }
        return {
            name: self._largest_singular_values(parts, forward, adjoint, iterations)
            for name, (forward, adjoint) in products.items()
        }

    def _maps(self, projection: str, is_transposed: bool = False, enters_heads: bool = False) -> list[_Map]:
        """Returns the factors of a projection in the order in which they are applied to a vector."""
        is_factorised = self.model.is_factorised(projection)
        names = [f"{projection}.down", f"{projection}.up"] if is_factorised else [projection]
        if is_transposed:
            names.reverse()
        return [_Map(name, is_transposed, enters_heads and name == names[-1]) for name in names]

    def _parts(self, fragments: Iterable[Fragment]) -> dict[str, list[_Part]]:
        """Returns this rank's parts of the attention's weights, by the name of a map."""
        found: dict[str, list[_Part]] = {}
        for fragment in fragments:
            prefix, _, rest = fragment.name.partition(".attention.")
            name, _, leaf = rest.rpartition(".")
            info = self.table[fragment.name]
            if leaf == "weight" and len(info.shape) == 2:
                block = int(prefix.removeprefix("blocks."))
                found.setdefault(name, []).append(self._part(block, fragment, info))
        return found

    def _part(self, block: int, fragment: Fragment, info: ParameterInfo) -> _Part:
        """Pads a fragment to whole rows; only one that cuts rows is copied."""
        num_rows, width = info.local_shape(self.topology.tensor)
        values = fragment.values.detach()
        row, before = divmod(fragment.start, width)
        after = -(before + values.numel()) % width
        if before or after:
            values = torch.nn.functional.pad(values, (before, after))
        rank = self.topology.tensor_rank
        first_row = rank * num_rows if info.shard_dim == 0 else 0
        first_column = rank * width if info.shard_dim == 1 else 0
        return _Part(block, first_row + row, first_column, values.view(-1, width))

    def _apply(self, parts: dict[str, list[_Part]], chain: list[_Map], vectors_LNI: Tensor) -> Tensor:
        """Applies a chain of maps to every head's vector, with one all-reduce per map."""
        for each in chain:
            num_out, num_in = self.table[f"blocks.0.attention.{each.name}.weight"].shape
            vectors_LNO = vectors_LNI.new_zeros(*vectors_LNI.shape[:2], num_in if each.is_transposed else num_out)
            for part in parts.get(each.name, []):
                height, width = part.values_OI.shape
                rows, columns = slice(part.row, part.row + height), slice(part.column, part.column + width)
                matrix, source, target = part.values_OI.T, columns, rows
                if each.is_transposed:
                    matrix, source, target = part.values_OI, rows, columns
                # Computed where the weights are: on the CPU when the optimizer is offloaded.
                product = vectors_LNI[part.block, :, source].to(matrix.device) @ matrix
                vectors_LNO[part.block, :, target] += product.to(vectors_LNO.device)
            if dist.is_initialized():
                dist.all_reduce(vectors_LNO)
            vectors_LNI = vectors_LNO * self.own_features_ND if each.enters_heads else vectors_LNO
        return vectors_LNI

    def _largest_singular_values(
        self, parts: dict[str, list[_Part]], forward: list[_Map], adjoint: list[_Map], iterations: int
    ) -> list[float]:
        """Bidiagonalizes every head's product at once."""
        start_D = torch.randn(self.model.hidden_size, generator=torch.Generator().manual_seed(_SEED))
        shape = (self.model.num_layers, self.model.num_heads, self.model.hidden_size)
        right_LND, _ = _normalize(start_D.to(self.topology.device).expand(shape))
        left_LND = torch.zeros_like(right_LND)
        beta_LN1 = torch.zeros_like(right_LND[..., :1])
        alphas, betas = [], []
        for _ in range(iterations):
            left_LND, alpha_LN1 = _normalize(self._apply(parts, forward, right_LND) - beta_LN1 * left_LND)
            right_LND, beta_LN1 = _normalize(self._apply(parts, adjoint, left_LND) - alpha_LN1 * right_LND)
            alphas.append(alpha_LN1)
            betas.append(beta_LN1)
        alpha_LNK, beta_LNK = (torch.cat(each, dim=-1).double().cpu() for each in (alphas, betas))
        # In the two bases the product is [K, K + 1], alpha on its diagonal and beta to the right of it.
        bidiagonal = alpha_LNK.new_zeros(*alpha_LNK.shape, iterations + 1)
        bidiagonal.diagonal(0, -2, -1).copy_(alpha_LNK)
        bidiagonal.diagonal(1, -2, -1).copy_(beta_LNK)
        return torch.linalg.svdvals(bidiagonal)[..., 0].amax(dim=-1).tolist()


def _normalize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns vectors of length 1 (zero, where they are zero) and their lengths."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny), lengths
