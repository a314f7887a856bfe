"""The model: the list of layers, from which both engines are built, and all of them as one module.

A token becomes a loss in this order: TokenEmbedding, PositionEmbedding, the blocks, FinalNorm, and the head with its
loss, which is the token embedding again (loss.py). Between layers travels a stream: the hidden state, and beside it the
document ids and sample ids where they are used (ModelContext.pack); with sequence parallelism the hidden state is that
of this rank's positions. The first layer takes (tokens_BS, positions_BS, documents_BS, sample_ids_B).

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from mlra_scale.model.block import Block
from mlra_scale.model.context import ModelContext
from mlra_scale.model.embedding import PositionEmbedding, TokenEmbedding
from mlra_scale.model.norm import FinalNorm


class Layer(NamedTuple):
    """One entry of the layer list: the canonical prefix of its parameters, and its module's class and arguments."""

    name: str
    module_class: type[nn.Module]
    arguments: tuple[Any, ...]

    def build(self) -> nn.Module:
        return self.module_class(*self.arguments)


def model_layers(context: ModelContext) -> list[Layer]:
    """The layers in order, without the head: the token embedding also computes loss and logits."""
    return [
        Layer("embedding", TokenEmbedding, (context,)),
        Layer("positions", PositionEmbedding, (context,)),
        *(Layer(f"blocks.{index}", Block, (context, index)) for index in range(context.model.num_layers)),
        Layer("final_norm", FinalNorm, (context,)),
    ]


class OutputHead(nn.Module):
    """Loss, or logits, through the tied token embedding, which it refers to without owning it.

    It is a module of its own so that ZeRO 3 gathers the embedding around the head's forward and backward pass only.
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
    """GPT-2 with dense or low-rank attention; parameter names are the canonical ones.

    The ZeRO engine trains this module; the pipeline engine takes the layer list itself.
    """

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
