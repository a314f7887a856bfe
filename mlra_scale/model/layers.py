"""The model as one list of layers, from which both engines are built.

Between layers travels a stream: the hidden state, and beside it the document ids and sample ids where they are used
(see ModelContext.pack); with sequence parallelism the hidden state is that of this rank's positions. The first layer
takes (tokens_BS, positions_BS, documents_BS, sample_ids_B).

Shape suffixes: B batch, S sequence, D hidden, F feed-forward, V vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mlra_scale.megatron import VocabParallelEmbedding
from mlra_scale.model.attention import SelfAttention
from mlra_scale.model.context import ModelContext, Stream
from mlra_scale.model.document_mask import AttentionMask
from mlra_scale.model.linear import column_linear, row_linear
from mlra_scale.model.loss import head_loss
from mlra_scale.model.randomness import dropout_hidden, key_of
from mlra_scale.model.recomputation import recomputed
from mlra_scale.model.tensor_parallel import (
    enter_tensor_parallel,
    gathered_linear,
    leave_tensor_parallel,
    on_slice,
    own_positions,
)


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
        num_rows_local = model.padded_vocab_size // context.tensor_parallel
        rows_V = torch.arange(num_rows_local) + num_rows_local * context.tensor_rank
        # A bias of -inf removes padded columns from the softmax at no cost (the matrix product adds it anyway).
        bias_V = torch.zeros(num_rows_local).masked_fill_(rows_V >= model.vocab_size, float("-inf"))
        has_padding = model.padded_vocab_size > model.vocab_size
        self.register_buffer("padding_bias_V", bias_V if has_padding else None, persistent=False)

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Replaces the first of (tokens_BS, positions_BS, documents_BS, sample_ids_B) by hidden_BSD."""
        tokens_BS, *rest = inputs
        hidden_BSD = (
            self._sum_of_slices(tokens_BS) if self.context.has_sequence_parallel else super().forward(tokens_BS)
        )
        factor = self.context.model.embedding_factor
        return (hidden_BSD if factor == 1.0 else hidden_BSD * factor, *rest)

    def _sum_of_slices(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """What the base class computes, of this rank's positions: [B, S / TP, D]."""
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
        self.weight = nn.Parameter(torch.empty(context.initialize.table["positions.weight"].shape))
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


def recomputes(context: ModelContext) -> bool:
    """Whether checkpointing is selective, and there will be a backward pass."""
    return context.activation_checkpointing == "selective" and torch.is_grad_enabled()


def recomputing(
    context: ModelContext, output: torch.Tensor, function: Callable[..., torch.Tensor], *inputs: Any, **options: Any
) -> AbstractContextManager[None]:
    """With selective checkpointing, what follows does not keep `output` = function(*inputs) but computes it again."""
    if not recomputes(context):
        return nullcontext()
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
    return recomputed(output, partial(function, *detached, **options))


class FeedForward(nn.Module):
    """GPT-2's two-layer perceptron with the tanh form of GELU.

    fc_in.weight: [F, D], sharded over TP: dim 0; fc_in.bias: [F], sharded over TP: dim 0
    fc_out.weight: [D, F], sharded over TP: dim 1; fc_out.bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.context = context
        self.enters_alone = not context.has_sequence_parallel and not context.model.sigma_reparam
        self.fc_in = column_linear(context, f"{name}.fc_in", sums_input_gradient=self.enters_alone)
        self.fc_out = row_linear(context, f"{name}.fc_out")

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        expanded_BSF = self._expanded(hidden_BSD)
        activated_BSF = functional.gelu(expanded_BSF, approximate="tanh")
        with recomputing(self.context, activated_BSF, functional.gelu, expanded_BSF, approximate="tanh"):
            output_BSD, _ = self.fc_out(activated_BSF)
        return output_BSD

    def _expanded(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """The inner state of this rank, [B, S, F / TP]."""
        if self.context.has_gathered_linear:
            weights = (0, self.fc_in.weight, self.fc_in.bias)
            (expanded_BSF,) = gathered_linear(self.context, [hidden_BSD], [weights])
            return expanded_BSF
        if not self.enters_alone:
            (hidden_BSD,) = enter_tensor_parallel(self.context, hidden_BSD)
        expanded_BSF, _ = self.fc_in(hidden_BSD)
        return expanded_BSF


class BlockNorm(nn.LayerNorm):
    """Layer norm of a block, with `model.layer_norm_scaling` times 1/sqrt(l) (Sun et al. 2025, arXiv 2502.05795).

    weight, bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext, block: int) -> None:
        super().__init__(context.model.hidden_size, eps=context.model.layer_norm_eps)
        self.context = context
        self.factor: torch.Tensor | None = None
        if context.model.layer_norm_scaling:
            # A tensor: torch.compile would make every block's number part of a graph of its own. Neither a buffer nor a
            # new floating-point tensor, which DeepSpeed would round to 16 bits. On the CPU, as every scalar may be.
            zero = torch.zeros((), dtype=torch.int64, device="cpu")
            self.factor = zero.double().fill_(context.model.norm_factor(block))

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        weight_D, bias_D = self._scaled(*on_slice(self.context, self.weight, self.bias))
        return functional.layer_norm(hidden_BSD, self.normalized_shape, weight_D, bias_D, self.eps)

    def recomputing(self, hidden_BSD: torch.Tensor, normed_BSD: torch.Tensor) -> AbstractContextManager[None]:
        """See `recomputing`. With copies of weight and bias: ZeRO-3 takes those away when the layer is done."""
        if not recomputes(self.context):
            return nullcontext()
        copies = self._scaled(self.weight.detach().clone(), self.bias.detach().clone())
        return recomputing(
            self.context, normed_BSD, functional.layer_norm, hidden_BSD, self.normalized_shape, *copies, self.eps
        )

    def _scaled(self, weight_D: torch.Tensor, bias_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # On weight and bias, which are small and where an export has it, not on the output.
        return (weight_D, bias_D) if self.factor is None else (weight_D * self.factor, bias_D * self.factor)


class Block(nn.Module):
    """Pre-LN transformer block: h + attention(LN(h)), then h + feed-forward(LN(h)).

    attention_norm, mlp_norm: weight [D], bias [D], replicated over TP
    """

    def __init__(self, context: ModelContext, index: int) -> None:
        super().__init__()
        name = f"blocks.{index}"
        self.context = context
        self.attention_norm = BlockNorm(context, index)
        self.attention = SelfAttention(context, f"{name}.attention", index)
        self.mlp_norm = BlockNorm(context, index)
        self.mlp = FeedForward(context, f"{name}.mlp")
        self.dropout_keys = tuple(key_of(context.seed, f"{name}/{site}") for site in ("attention", "mlp"))
        if context.has_compiled_blocks:
            self._compiled = torch.compile(self._residual, dynamic=False)

    def forward(self, stream: Stream) -> Stream:
        hidden_BSD, documents_BS, sample_ids_B = self.context.unpack(stream)
        # What observes attention from within is not to be compiled.
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
        hidden_BSD = hidden_BSD + self._dropout(attended_BSD, 0, sample_ids_B)
        normed_BSD = self.mlp_norm(hidden_BSD)
        with self.mlp_norm.recomputing(hidden_BSD, normed_BSD):
            expanded_BSD = self.mlp(normed_BSD)
        return hidden_BSD + self._dropout(expanded_BSD, 1, sample_ids_B)

    def _dropout(self, branch_BSD: torch.Tensor, site: int, sample_ids_B: torch.Tensor | None) -> torch.Tensor:
        probability = self.context.model.residual_dropout if self.training else 0.0
        if probability == 0.0:
            return branch_BSD
        assert sample_ids_B is not None
        first = self.context.first_position(branch_BSD)
        return dropout_hidden(branch_BSD, probability, self.dropout_keys[site], sample_ids_B, first)


class FinalNorm(nn.LayerNorm):
    """The last LayerNorm: from the stream, the hidden state alone.

    weight, bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context.model.hidden_size, eps=context.model.layer_norm_eps)
        self.context = context

    def forward(self, stream: Stream) -> torch.Tensor:
        hidden_BSD, _, _ = self.context.unpack(stream)
        weight_D, bias_D = on_slice(self.context, self.weight, self.bias)
        return functional.layer_norm(hidden_BSD, self.normalized_shape, weight_D, bias_D, self.eps)


@dataclass(frozen=True)
class Layer:
    """One entry of the layer list.

    Attributes:
        name: Canonical prefix of the layer's parameters.
        build: Makes the module.
        module_class: Class of the module that `build` makes.
    """

    name: str
    module_class: type[nn.Module]
    build: Callable[[], nn.Module]


def model_layers(context: ModelContext) -> list[Layer]:
    """The layers in order, without the head, which is `TokenEmbedding.logits` of the first one."""
    layers = [
        Layer("embedding", TokenEmbedding, lambda: TokenEmbedding(context)),
        Layer("positions", PositionEmbedding, lambda: PositionEmbedding(context)),
    ]
    for index in range(context.model.num_layers):
        layers.append(Layer(f"blocks.{index}", Block, lambda index=index: Block(context, index)))  # type: ignore[misc]
    layers.append(Layer("final_norm", FinalNorm, lambda: FinalNorm(context)))
    return layers
