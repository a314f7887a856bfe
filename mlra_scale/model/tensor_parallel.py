"""How tensors enter and leave the computation that tensor-parallel ranks split, and what is summed on the way back.

    where                           plain: forward, backward        sequence parallel: forward, backward
    enters (attention, MLP, head)   identity, all-reduce            all-gather, reduce-scatter
    leaves (o, fc_out, embedding)   all-reduce, identity            reduce-scatter, all-gather

With sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, sec. 4.2.2) each of t ranks holds S / t positions
of the stream between these places: [B, S / t, D]. Norms, residual sums, dropout and the replicated factors of low-rank
projections then work on T / t tokens instead of repeating T tokens on every rank, and an all-gather and a
reduce-scatter send as much together as one all-reduce.

A replicated parameter that works on a slice sees a part of its gradient. The parts are summed inside autograd, by
`on_slice`, `slice_linear` or the bias of `leave_tensor_parallel`: after the backward pass (in ZeRO, norms, checkpoints)
gradients are whole and equal on all ranks, as they are without sequence parallelism.

A gathered input is not kept for the backward pass but gathered again (sec. 4.2.2 there), while its gradient is
computed: a block then keeps nothing that is as long as the whole sequence and as wide as the model. With activation
checkpointing of whole blocks there is only one block's gathered input at a time, and it is kept.

Megatron's all-reduce works in place. Given a tensor that is not contiguous it sums a copy and returns the input
unsummed, without an error: what is summed here is made contiguous first. Operations with collectives go through
`ModelContext.apply`, which keeps them out of compiled graphs.

A tensor of the stream is [B, S, ...], or with sequence parallelism [B, S / TP, ...] of this rank's positions.
Shape suffixes: B batch, S sequence, D hidden.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from mlra_scale.megatron import reduce_from_tensor_model_parallel_region
from mlra_scale.model.collectives import (
    SEQUENCE,
    Copy,
    Gather,
    GatheredLinear,
    LinearSum,
    ScatterSum,
    SliceLinear,
    SummedLinear,
    gathered,
)
from mlra_scale.model.context import ModelContext


def copy_to_tensor_parallel(context: ModelContext, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Marks replicated tensors of one type as entering sharded computation: identity, and backward one all-reduce."""
    if context.tensor_parallel == 1:
        return list(tensors)
    return list(context.apply(Copy, context.tensor_group, *tensors))


def on_slice(context: ModelContext, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Marks replicated parameters of one module as working on this rank's positions, if the sequence is split.

    Their gradients share one all-reduce.
    """
    return copy_to_tensor_parallel(context, *parameters) if context.has_sequence_parallel else list(parameters)


def own_positions(context: ModelContext, whole_BS: torch.Tensor) -> torch.Tensor:
    """Returns the part of this rank's positions; without sequence parallelism, everything."""
    if not context.has_sequence_parallel:
        return whole_BS
    return whole_BS.chunk(context.tensor_parallel, dim=SEQUENCE)[context.tensor_rank]


@torch.no_grad()
def whole_hidden(context: ModelContext, hidden_BSD: torch.Tensor) -> torch.Tensor:
    """Returns a hidden state at all positions, for inspection; collective over the tensor-parallel ranks."""
    if not context.has_sequence_parallel:
        return hidden_BSD
    return gathered(context.tensor_group, [hidden_BSD])[0]


def enter_tensor_parallel(context: ModelContext, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Takes tensors of the stream into sharded computation, [B, S, ...] each; they share one collective each way."""
    if context.has_sequence_parallel:
        return list(context.apply(Gather, context.tensor_group, *tensors))
    return copy_to_tensor_parallel(context, *tensors)


def leave_tensor_parallel(
    context: ModelContext, partial_BSD: torch.Tensor, bias_D: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the sum of the ranks' summands of the stream, plus a replicated bias.

    The bias's gradient is whole and needs no collective of its own: the gradient of all positions passes here on its
    way to the summand.
    """
    if context.has_sequence_parallel:
        output: torch.Tensor = context.apply(ScatterSum, context.tensor_group, partial_BSD, bias_D)
        return output
    whole = partial_BSD.contiguous()  # or Megatron would return the summand
    total: torch.Tensor = reduce_from_tensor_model_parallel_region(whole, group=context.tensor_group)
    return total if bias_D is None else total + bias_D


def gathered_linear(
    context: ModelContext,
    inputs: Sequence[torch.Tensor],
    maps: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
) -> list[torch.Tensor]:
    """Column-parallel maps of tensors of the stream under sequence parallelism, by one collective each way.

    A map is the index of its input, this rank's rows of its weight [out / TP, in], and its bias [out / TP]. Returns
    [B, S, out / TP] for each.
    """
    sources, weights, biases = zip(*maps, strict=True)
    keeps_gathered = context.activation_checkpointing == "block"
    outputs = context.apply(GatheredLinear, context.tensor_group, keeps_gathered, sources, *inputs, *weights, *biases)
    return list(outputs)


def enter_linear(context: ModelContext, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A column-parallel map that takes its input in: collectives run beside its matrix products.

    x of the stream; weight [out / TP, in] and bias [out / TP] of this rank's rows; returns [B, S, out / TP].
    """
    if context.has_sequence_parallel:
        return gathered_linear(context, [x], [(0, weight, bias)])[0]
    if context.tensor_parallel == 1:
        return functional.linear(x, weight, bias)
    y: torch.Tensor = context.apply(SummedLinear, context.tensor_group, x, weight, bias)
    return y


def leave_linear(
    context: ModelContext, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A row-parallel map: the sum over ranks of x W^T, + b.

    x [B, S, in / TP], weight [out, in / TP] of this rank's columns, bias [out] replicated, with a whole gradient on
    every rank; returns the output in the form of the stream.
    """
    if context.tensor_parallel == 1:
        return functional.linear(x, weight, bias)
    if context.has_sequence_parallel:
        return leave_tensor_parallel(context, functional.linear(x, weight), bias)
    y: torch.Tensor = context.apply(LinearSum, context.tensor_group, x, weight, bias)
    return y


def slice_linear(
    context: ModelContext, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A replicated map x W^T (+ b) of the stream.

    With sequence parallelism the whole gradient of the weight is summed on the way back. Unlike a weight that went
    through `on_slice`, this one may be freed between the passes (ZeRO 3).
    """
    if not context.has_sequence_parallel:
        return functional.linear(x, weight, bias)
    y: torch.Tensor = context.apply(SliceLinear, context.tensor_group, x, weight, bias)
    return y
