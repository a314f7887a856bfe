"""Where the model begins: token and position embedding. The token embedding is the output head as well.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary on this rank.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.megatron import VocabParallelEmbedding
from mlra_scale.model.context import ModelContext, Stream
from mlra_scale.model.loss import head_loss, head_scores
from mlra_scale.model.randomness import dropout_hidden, key_of
from mlra_scale.model.tensor_parallel import enter_tensor_parallel, leave_tensor_parallel, on_slice, own_positions

ScoreRecorder = Callable[[torch.Tensor, torch.Tensor], None]
"""Receives what `head_scores` returns."""


class TokenEmbedding(VocabParallelEmbedding):
    """Token embedding, shared with the output head; `model.embedding_scale` scales what enters, and not the head.

    weight: [V_padded, D], sharded over TP: dim 0; rows from vocab_size on are padding and stay zero
    """

    def __init__(self, context: ModelContext) -> None:
        model = context.model
        super().__init__(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=context.initialize("embedding.weight"),
            config=context.megatron,
            tp_group=context.tensor_group,
        )
        self.context = context
        self.recorder: ScoreRecorder | None = None  # of the probe path
        num_rows_local = model.padded_vocab_size // context.tensor_parallel
        rows_V = torch.arange(num_rows_local) + num_rows_local * context.tensor_rank
        # A bias of -inf removes padded columns from the softmax at no cost (the matrix product adds it anyway).
        bias_V = torch.zeros(num_rows_local).masked_fill_(rows_V >= model.vocab_size, float("-inf"))
        has_padding = model.padded_vocab_size > model.vocab_size
        self.register_buffer("padding_bias_V", bias_V if has_padding else None, persistent=False)

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Replaces the first of (tokens_BS, positions_BS, documents_BS, sample_ids_B) by hidden_BSD."""
        tokens_BS, *rest = inputs
        look_up = self._own_positions if self.context.has_sequence_parallel else super().forward
        hidden_BSD = look_up(tokens_BS)
        factor = self.context.model.embedding_factor
        return (hidden_BSD if factor == 1.0 else hidden_BSD * factor, *rest)

    def _own_positions(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """The look-up of the base class, of this rank's positions: [B, S / TP, D]."""
        rows_BS = tokens_BS - self.vocab_start_index
        is_elsewhere_BS = (rows_BS < 0) | (rows_BS >= self.num_embeddings_per_partition)
        found_BSD = functional.embedding(rows_BS.masked_fill(is_elsewhere_BS, 0), self.weight)
        return leave_tensor_parallel(self.context, found_BSD.masked_fill(is_elsewhere_BS.unsqueeze(-1), 0.0))

    def logits(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the output logits, [B, S, V]; padded columns are -inf. Training has `loss` instead."""
        (entered_BSD,) = enter_tensor_parallel(self.context, hidden_BSD)
        return functional.linear(entered_BSD, self.weight, self._bias())

    def loss(
        self, hidden_BSD: torch.Tensor, weight_VD: torch.Tensor, targets_BS: torch.Tensor, is_training: bool
    ) -> torch.Tensor:
        """Mean loss of a micro-batch by the output head (see `head_loss`); `weight_VD`: the weight, or a view of it."""
        (entered_BSD,) = enter_tensor_parallel(self.context, hidden_BSD)
        if self.recorder is not None:
            losses_BS, is_first_BS = head_scores(self.context, entered_BSD, weight_VD, self._bias(), targets_BS)
            self.recorder(losses_BS, is_first_BS)
            return losses_BS.mean()
        return head_loss(self.context, entered_BSD, weight_VD, self._bias(), targets_BS, is_training)

    def _bias(self) -> torch.Tensor | None:
        return None if self.padding_bias_V is None else self.padding_bias_V.to(self.weight.dtype)


class PositionEmbedding(nn.Module):
    """Learned positions, and the embedding dropout. A layer of its own: only the token embedding is tied.

    weight: [max_positions, D], replicated over TP
    """

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self.context = context
        self.weight = nn.Parameter(torch.empty(context.table["positions.weight"].shape))
        context.initialize("positions.weight")(self.weight)
        self.dropout_key = key_of(context.seed, "embedding/dropout")

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> Stream:
        """Maps (hidden_BSD, positions_BS, documents_BS, sample_ids_B) to the stream of the blocks."""
        hidden_BSD, positions_BS, documents_BS, sample_ids_B = inputs
        (weight,) = on_slice(self.context, self.weight)
        hidden_BSD = hidden_BSD + functional.embedding(own_positions(self.context, positions_BS), weight)
        probability = self.context.model.embedding_dropout if self.training else 0.0
        if probability > 0.0:
            first = self.context.first_position(hidden_BSD)
            hidden_BSD = dropout_hidden(hidden_BSD, probability, self.dropout_key, sample_ids_B, first)
        return self.context.pack(hidden_BSD, documents_BS, sample_ids_B)
