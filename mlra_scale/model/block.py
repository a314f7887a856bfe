"""A transformer block: attention and feed-forward, each a branch of the residual stream.

Shape suffixes: B batch, S sequence, D hidden, F feed-forward on this rank.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mlra_scale.model.attention import SelfAttention
from mlra_scale.model.context import ModelContext, Stream
from mlra_scale.model.document_mask import AttentionMask
from mlra_scale.model.linear import ColumnLinear, RowLinear
from mlra_scale.model.norm import BlockNorm
from mlra_scale.model.randomness import dropout_hidden, key_of
from mlra_scale.model.recomputation import recomputing


class FeedForward(nn.Module):
    """GPT-2's two-layer perceptron with the tanh form of GELU.

    fc_in.weight: [F, D], sharded over TP: dim 0; fc_in.bias: [F], sharded over TP: dim 0
    fc_out.weight: [D, F], sharded over TP: dim 1; fc_out.bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.context = context
        self.fc_in = ColumnLinear(context, f"{name}.fc_in", enters_alone=True)
        self.fc_out = RowLinear(context, f"{name}.fc_out")

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        expanded_BSF = self.fc_in(hidden_BSD)
        activated_BSF = functional.gelu(expanded_BSF, approximate="tanh")
        with recomputing(self.context, activated_BSF, functional.gelu, expanded_BSF, approximate="tanh"):
            return self.fc_out(activated_BSF)


class Block(nn.Module):
    """Pre-LN transformer block: h + f attention(LN(h)), then h + f feed-forward(LN(h)).

    f is 1, and with `model.depth_rule` completep L0 / L (CompleteP with alpha = 1; Dey et al. 2025, arXiv 2505.01618).

    attention_norm, mlp_norm: weight [D], bias [D], replicated over TP
    """

    def __init__(self, context: ModelContext, index: int) -> None:
        super().__init__()
        name = f"blocks.{index}"
        self.context = context
        self.branch_factor = context.model.branch_factor
        self.attention_norm = BlockNorm(context, index)
        self.attention = SelfAttention(context, f"{name}.attention", index)
        self.mlp_norm = BlockNorm(context, index)
        self.mlp = FeedForward(context, f"{name}.mlp")
        self.dropout_keys = tuple(key_of(context.seed, f"{name}/{site}") for site in ("attention", "mlp"))
        if context.has_compiled_blocks:
            self._compiled = torch.compile(self._residual, dynamic=False)

    def forward(self, stream: Stream) -> Stream:
        hidden_BSD, documents_BS, sample_ids_B = self.context.unpack(stream)
        # The probe's recorder in attention is not to be compiled.
        is_compiled = self.context.has_compiled_blocks and self.attention.recorder is None
        residual = self._compiled if is_compiled else self._residual
        mask = None if documents_BS is None else self.context.document_masks.of(documents_BS, hidden_BSD.dtype)
        if self.context.activation_checkpointing == "block" and torch.is_grad_enabled():
            # No generator state to preserve: dropout is keyed, so the recomputation draws the same masks.
            hidden_BSD = checkpoint(
                residual, hidden_BSD, mask, sample_ids_B, use_reentrant=False, preserve_rng_state=False
            )
        else:
            hidden_BSD = residual(hidden_BSD, mask, sample_ids_B)
        return self.context.pack(hidden_BSD, documents_BS, sample_ids_B)

    def _residual(
        self, hidden_BSD: torch.Tensor, mask: AttentionMask | None, sample_ids_B: torch.Tensor | None
    ) -> torch.Tensor:
        normed_BSD = self.attention_norm(hidden_BSD)
        with self.attention_norm.recomputing(hidden_BSD, normed_BSD):
            attended_BSD = self.attention(normed_BSD, mask, sample_ids_B)
        hidden_BSD = self._add(hidden_BSD, self._dropout(attended_BSD, 0, sample_ids_B))
        normed_BSD = self.mlp_norm(hidden_BSD)
        with self.mlp_norm.recomputing(hidden_BSD, normed_BSD):
            expanded_BSD = self.mlp(normed_BSD)
        return self._add(hidden_BSD, self._dropout(expanded_BSD, 1, sample_ids_B))

    def _add(self, hidden_BSD: torch.Tensor, branch_BSD: torch.Tensor) -> torch.Tensor:
        """Returns h + f branch by one operation, which keeps nothing for the backward pass and rounds once."""
        return torch.add(hidden_BSD, branch_BSD, alpha=self.branch_factor)

    def _dropout(self, branch_BSD: torch.Tensor, site: int, sample_ids_B: torch.Tensor | None) -> torch.Tensor:
        probability = self.context.model.residual_dropout if self.training else 0.0
        if probability == 0.0:
            return branch_BSD
        assert sample_ids_B is not None
        first = self.context.first_position(branch_BSD)
        return dropout_hidden(branch_BSD, probability, self.dropout_keys[site], sample_ids_B, first)
