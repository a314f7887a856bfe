"""The whole model as one module: what the ZeRO engine trains (the pipeline engine takes the layer list itself)."""

import torch
from torch import nn

from mlra_scale.model.context import ModelContext
from mlra_scale.model.layers import TokenEmbedding, model_layers
from mlra_scale.model.loss import language_model_loss


class OutputHead(nn.Module):
    """Logits through the tied token embedding, which it refers to without owning it.

    A module of its own, so that ZeRO-3 gathers the embedding around the head's forward and backward only.
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple hides it from the module tree: the weight is the embedding's

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        return self._embedding[0].logits(hidden_BSD)


class GPT(nn.Module):
    """GPT-2 with dense or low-rank attention; parameter names are the canonical ones."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.context = context
        embedding, positions, *blocks, final_norm = [layer.build() for layer in model_layers(context)]
        assert isinstance(embedding, TokenEmbedding)
        self.embedding: nn.Module = embedding
        self.positions: nn.Module = positions
        self.blocks = nn.ModuleList(blocks)
        self.final_norm: nn.Module = final_norm
        self.head = OutputHead(embedding)

    def logits(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        documents_BS: torch.Tensor,
        sample_ids_B: torch.Tensor,
    ) -> torch.Tensor:
        """This rank's columns of the logits, [B, S, V_padded / TP]; padded columns are -inf."""
        stream = self.positions(self.embedding((tokens_BS, positions_BS, documents_BS, sample_ids_B)))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.final_norm(stream))

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        documents_BS: torch.Tensor,
        sample_ids_B: torch.Tensor,
        targets_BS: torch.Tensor,
    ) -> torch.Tensor:
        """Mean loss of a micro-batch (see `language_model_loss`)."""
        logits_BSV = self.logits(tokens_BS, positions_BS, documents_BS, sample_ids_B)
        return language_model_loss(self.context, logits_BSV, targets_BS, self.training)
