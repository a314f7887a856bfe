"""The whole model as one module: what the ZeRO engine trains (the pipeline engine takes the layer list itself)."""

import torch
from torch import nn

from mlra_scale.model.context import ModelContext
from mlra_scale.model.layers import TokenEmbedding, model_layers


class OutputHead(nn.Module):
    """Loss, or logits, through the tied token embedding, which it refers to without owning it.

    A module of its own, so that ZeRO-3 gathers the embedding around the head's forward and backward only.
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple hides it from the module tree: the weight is the embedding's

    def read_parameters(self) -> list[nn.Parameter]:
        """The token embedding, which `forward` reads without calling the module that owns it."""
        return [self._embedding[0].weight]

    def forward(self, hidden_BSD: torch.Tensor, targets_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the mean loss, or without targets the logits."""
        embedding = self._embedding[0]
        if targets_BS is None:
            return embedding.logits(hidden_BSD)
        return embedding.loss(hidden_BSD, embedding.weight, targets_BS, self.training)


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
        return self.head(self._hidden(tokens_BS, positions_BS, documents_BS, sample_ids_B))

    def _hidden(self, *inputs: torch.Tensor) -> torch.Tensor:
        stream = self.positions(self.embedding(inputs))
        for block in self.blocks:
            stream = block(stream)
        return self.final_norm(stream)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        documents_BS: torch.Tensor,
        sample_ids_B: torch.Tensor,
        targets_BS: torch.Tensor,
    ) -> torch.Tensor:
        """Mean loss of a micro-batch (see `head_loss`)."""
        return self.head(self._hidden(tokens_BS, positions_BS, documents_BS, sample_ids_B), targets_BS)
