"""How tensors enter and leave the computation that tensor-parallel ranks split, and what is summed on the way back.

    where                           plain: forward, backward        sequence parallel: forward, backward
    enters (attention, MLP, head)   identity, all-reduce            all-gather, reduce-scatter
    leaves (o, fc_out, embedding)   all-reduce, identity            reduce-scatter, all-gather

With sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, sec. 4.2.2) each of t ranks holds S / t positions
of the stream between these places: [B, S / t, D]. Norms, residual sums, dropout and the replicated factors of low-rank
projections then work on T / t tokens instead of repeating T tokens on every rank, and an all-gather and a
reduce-scatter send as much together as one all-reduce.

A replicated parameter that works on a slice sees a part of its gradient. It is summed here, inside autograd, by
`on_slice`, `slice_linear` or the bias of `leave_tensor_parallel`: whatever comes after the backward pass (ZeRO, norms,
checkpoints) sees whole gradients, equal on all ranks, as it does without.

What was gathered is not kept for the backward pass but gathered again (sec. 4.2.2 there), while the gradient of the
input is computed: the block then keeps nothing that is as long as the whole sequence and as wide as the model. With
activation checkpointing only one block's activations are there at a time, and they are kept.

On GPUs a collective that is started beside a matrix product runs before it only if CUDA_DEVICE_MAX_CONNECTIONS is 1, as
training/device_environment.py has it; whether that pays was not measured.

Megatron's own functions are for CUDA only, and want the sequence as the first dimension. Its sum of what the ranks have
computed is lost without an error where the summand is not contiguous: it sums a copy.

Operations with collectives go through `ModelContext.apply`, which keeps them out of compiled graphs.

Shape suffixes: B batch, S sequence, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from mlra_scale.megatron import reduce_from_tensor_model_parallel_region
from mlra_scale.model.context import ModelContext

_SEQUENCE = 1
"""The dimension of [B, S, D] that sequence parallelism splits."""

# torch 2.13 has renamed them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to_tensor_parallel(context: ModelContext, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Marks replicated tensors as entering sharded computation: identity forward, one all-reduce of gradients backward.

    Args:
        context: The model's context.
        *tensors: Replicated tensors of one type; they share the all-reduce.

    Returns:
        The same values.
    """
    if context.tensor_parallel == 1:
        return list(tensors)
    return list(context.apply(_Copy, context.tensor_group, *tensors))


def on_slice(context: ModelContext, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Marks replicated parameters as working on this rank's part of the sequence; without such parts, does nothing.

    Args:
        context: The model's context.
        *parameters: Parameters of one module; their gradients share one all-reduce.

    Returns:
        The same values.
    """
    return copy_to_tensor_parallel(context, *parameters) if context.has_sequence_parallel else list(parameters)


def enter_tensor_parallel(context: ModelContext, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Takes tensors of the stream into sharded computation, where every rank needs all positions.

    Args:
        context: The model's context.
        *tensors: [B, S, ...], or of this rank's positions; they share one collective each way.

    Returns:
        [B, S, ...] each.
    """
    if context.has_sequence_parallel:
        return list(context.apply(_Gather, context.tensor_group, _SEQUENCE, *tensors))
    return copy_to_tensor_parallel(context, *tensors)


def gathered_linear(
    context: ModelContext,
    inputs: Sequence[torch.Tensor],
    maps: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
) -> list[torch.Tensor]:
    """Column-parallel maps of tensors of the stream under sequence parallelism: enters, and computes.

    Args:
        context: The model's context.
        inputs: [B, S / TP, in] each; they share one collective each way.
        maps: Of each, which of the inputs it takes, this rank's rows of its weight [out / TP, in], and bias [out / TP].

    Returns:
        [B, S, out / TP] for each map.
    """
    sources, weights, biases = zip(*maps, strict=True)
    keeps_gathered = context.activation_checkpointing == "block"
    outputs = context.apply(_GatheredLinear, context.tensor_group, keeps_gathered, sources, *inputs, *weights, *biases)
    return list(outputs)


def summed_linear(
    context: ModelContext, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A column-parallel map that takes its input in: its gradient is summed while those of the weight are computed.

    Args:
        context: The model's context, without sequence parallelism.
        x: Replicated, [B, S, in].
        weight: This rank's rows, [out / TP, in].
        bias: [out / TP].

    Returns:
        [B, S, out / TP].
    """
    y: torch.Tensor = context.apply(_SummedLinear, context.tensor_group, x, weight, bias)
    return y


def linear_sum(context: ModelContext, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A row-parallel map: the sum over ranks of x W^T, + b, which the first rank adds within its matrix product.

    Args:
        context: The model's context, without sequence parallelism.
        x: [B, S, in / TP].
        weight: This rank's columns, [out, in / TP].
        bias: Replicated, [out]; its gradient is whole on every rank.

    Returns:
        [B, S, out], the same on every rank.
    """
    y: torch.Tensor = context.apply(_LinearSum, context.tensor_group, x, weight, bias)
    return y


def leave_tensor_parallel(
    context: ModelContext, partial_BSD: torch.Tensor, bias_D: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums what the ranks have computed of the stream.

    Args:
        context: The model's context.
        partial_BSD: This rank's summand.
        bias_D: Replicated; added once. Its gradient is whole, and needs no collective of its own: the gradient of all
            positions comes by on its way to `partial_BSD`.

    Returns:
        [B, S, D], or of this rank's positions.
    """
    if context.has_sequence_parallel:
        output: torch.Tensor = context.apply(_ScatterSum, context.tensor_group, partial_BSD, bias_D)
        return output
    whole = partial_BSD.contiguous()  # or Megatron would return the summand
    total: torch.Tensor = reduce_from_tensor_model_parallel_region(whole, group=context.tensor_group)
    return total if bias_D is None else total + bias_D


def slice_linear(
    context: ModelContext, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns x W^T (+ b) of this rank's positions with a replicated W, whose whole gradient is summed on the way back.

    Unlike a weight that went through `on_slice`, this one may be freed between the passes (ZeRO-3).
    """
    y: torch.Tensor = context.apply(_SliceLinear, context.tensor_group, x, weight, bias)
    return y


def gather_latents(context: ModelContext, *latents: torch.Tensor) -> list[torch.Tensor]:
    """Puts latents of which each rank has a share together: all-gather forward, sums and shares of gradients backward.

    Several latents share one all-gather.

    Args:
        context: The model's context.
        *latents: [B, S, R / TP] each.

    Returns:
        [B, S, R] each, the same on every rank.
    """
    if context.tensor_parallel == 1:
        return list(latents)
    return list(context.apply(_Gather, context.tensor_group, -1, *latents))


def own_positions(context: ModelContext, whole_BS: torch.Tensor) -> torch.Tensor:
    """Returns what belongs to this rank's positions: everything, without sequence parallelism."""
    if not context.has_sequence_parallel:
        return whole_BS
    return whole_BS.chunk(context.tensor_parallel, dim=_SEQUENCE)[context.tensor_rank]


@torch.no_grad()
def whole_hidden(context: ModelContext, hidden_BSD: torch.Tensor) -> torch.Tensor:
    """Returns a hidden state at all positions, to look at; collective over the tensor-parallel ranks."""
    if not context.has_sequence_parallel:
        return hidden_BSD
    return _gathered(context.tensor_group, _SEQUENCE, [hidden_BSD])[0]


Finish = Callable[[], list[torch.Tensor]]
"""Waits for a collective that has been started, and returns what came of it."""


def _gathered(group: dist.ProcessGroup, dim: int, shares: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return _start_gathering(group, dim, shares)()


def _summed_shares(group: dist.ProcessGroup, dim: int, wholes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return _start_summing_shares(group, dim, wholes)()


def _start_gathering(group: dist.ProcessGroup, dim: int, shares: Sequence[torch.Tensor]) -> Finish:
    """Joins every rank's shares along a dimension, by one all-gather of all of them."""
    size = group.size()
    packed = _packed([share.reshape(1, -1) for share in shares])
    received = packed.new_empty(size * packed.numel())
    work = _all_gather(received, packed.view(-1), group=group, async_op=True)

    def finish() -> list[torch.Tensor]:
        work.wait()
        columns = received.view(size, -1).split([share.numel() for share in shares], dim=1)
        joined = []
        for share, column in zip(shares, columns, strict=True):
            place = dim % share.dim()
            parts = column.unflatten(1, share.shape).movedim(0, place)
            joined.append(parts.flatten(place, place + 1).contiguous())
        return joined

    return finish


def _start_summing_shares(group: dist.ProcessGroup, dim: int, wholes: Sequence[torch.Tensor]) -> Finish:
    """Sums over ranks, of which this one gets its share along a dimension; one reduce-scatter of all of them."""
    size = group.size()
    parts = [whole.unflatten(dim, (size, -1)).movedim(dim % whole.dim(), 0) for whole in wholes]
    packed = _packed([part.reshape(size, -1) for part in parts])
    received = packed.new_empty(packed.numel() // size)
    work = _reduce_scatter(received, packed.view(-1), group=group, async_op=True)

    def finish() -> list[torch.Tensor]:
        work.wait()
        shares = received.split([part[0].numel() for part in parts])
        return [share.view(part.shape[1:]) for share, part in zip(shares, parts, strict=True)]

    return finish


def _packed(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return rows[0].contiguous() if len(rows) == 1 else torch.cat(list(rows), dim=1)


class _Copy(torch.autograd.Function):
    """Identity forward, sum of the gradients over the ranks backward."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed = _packed([gradient.reshape(1, -1) for gradient in gradients])
        dist.all_reduce(packed, group=ctx.group)
        parts = packed.view(-1).split([gradient.numel() for gradient in gradients])
        return None, *(part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True))


class _Gather(torch.autograd.Function):
    """All-gather along a dimension forward, reduce-scatter of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, dim: int, *shares: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.dim = group, dim
        return tuple(_gathered(group, dim, shares))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *_summed_shares(ctx.group, ctx.dim, gradients)


class _GatheredLinear(torch.autograd.Function):
    """All-gather along the sequence, then linear maps; backward with both collectives beside a matrix product."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, keeps_gathered: bool, sources: tuple[int, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count = len(sources)
        shares, weights, biases = tensors[: -2 * count], tensors[-2 * count : -count], tensors[-count:]
        wholes = _gathered(group, _SEQUENCE, shares)
        ctx.group, ctx.keeps_gathered, ctx.sources = group, keeps_gathered, sources
        ctx.save_for_backward(*(wholes if keeps_gathered else shares), *weights)
        of_maps = zip(sources, weights, biases, strict=True)
        return tuple(functional.linear(wholes[source], weight, bias) for source, weight, bias in of_maps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation makes them when they are asked for
        kept, weights = saved[: -len(ctx.sources)], saved[-len(ctx.sources) :]
        gathering = None if ctx.keeps_gathered else _start_gathering(ctx.group, _SEQUENCE, kept)
        of_inputs: list[torch.Tensor | None] = [None] * len(kept)
        for source, dy, weight in zip(ctx.sources, gradients, weights, strict=True):
            before = of_inputs[source]
            of_inputs[source] = dy @ weight if before is None else before.add_(dy @ weight)
        summing = _start_summing_shares(ctx.group, _SEQUENCE, [dx for dx in of_inputs if dx is not None])
        wholes = kept if gathering is None else gathering()
        rows = [dy.flatten(0, -2) for dy in gradients]
        dweights = [dy.T @ wholes[source].flatten(0, -2) for source, dy in zip(ctx.sources, rows, strict=True)]
        dbiases = [dy.sum(dim=0) for dy in rows]
        return None, None, None, *summing(), *dweights, *dbiases


class _ScatterSum(torch.autograd.Function):
    """Reduce-scatter along the sequence forward, all-gather of the gradient backward; with a bias [D] or without."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, partial_BSD: torch.Tensor, bias_D: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.group, ctx.has_bias = group, bias_D is not None
        (share,) = _summed_shares(group, _SEQUENCE, [partial_BSD])
        return share if bias_D is None else share + bias_D

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (whole_BSD,) = _gathered(ctx.group, _SEQUENCE, gradients)
        return None, whole_BSD, whole_BSD.flatten(0, -2).sum(dim=0) if ctx.has_bias else None


class _SummedLinear(torch.autograd.Function):
    """A linear map of a replicated input: its gradient is summed over the ranks beside a matrix product."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = (gradients[0] @ weight).contiguous()
        work = dist.all_reduce(dx, group=ctx.group, async_op=True)
        dweight, dbias = _weight_gradients(ctx, x, gradients[0])
        work.wait()
        return None, dx, dweight, dbias


class _LinearSum(torch.autograd.Function):
    """A linear map whose output is summed over the ranks; the bias, of rank 0, has the gradient of all."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        y = functional.linear(x, weight, bias if group.rank() == 0 else None).contiguous()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return None, gradients[0] @ weight, *_weight_gradients(ctx, x, gradients[0])


def _weight_gradients(ctx: Any, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a linear map's weight and bias."""
    dy = dy.flatten(0, -2)
    return dy.T @ x.flatten(0, -2), dy.sum(dim=0) if ctx.has_bias else None


class _SliceLinear(_SummedLinear):
    """A linear map of this rank's positions: gradients of weight and bias are summed while that of x is computed."""

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)
        dweight = dy.T @ x.flatten(0, -2)
        rows = [dweight.view(1, -1)] + ([dy.sum(dim=0).view(1, -1)] if ctx.has_bias else [])
        packed = _packed(rows)
        work = dist.all_reduce(packed, group=ctx.group, async_op=True)
        dx = gradients[0] @ weight
        work.wait()
        dweight = packed.view(-1)[: weight.numel()].view(weight.shape)
        return None, dx, dweight, packed.view(-1)[weight.numel() :] if ctx.has_bias else None
