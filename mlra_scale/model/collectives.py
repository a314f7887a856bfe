"""Autograd functions that communicate over the tensor-parallel group; tensor_parallel.py says which is used where.

On GPUs a collective that is started beside a matrix product runs before it only if CUDA_DEVICE_MAX_CONNECTIONS is 1, as
the training sets it; whether that pays was not measured. Megatron's own functions are for CUDA only, and expect the
sequence as the first dimension.

Shape suffixes: B batch, S sequence, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

SEQUENCE = 1
"""The dimension of [B, S, D] that sequence parallelism splits."""

# torch 2.13 has renamed them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Finish = Callable[[], list[torch.Tensor]]
"""Waits for a collective that has been started, and returns its results."""


def gathered(group: dist.ProcessGroup, shares: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Joins every rank's shares along the sequence, by one all-gather of all of them."""
    return _start_gathering(group, shares)()


def _summed_shares(group: dist.ProcessGroup, wholes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over ranks, of which this one gets its share along the sequence; one reduce-scatter of all of them."""
    return _start_summing_shares(group, wholes)()


def _start_gathering(group: dist.ProcessGroup, shares: Sequence[torch.Tensor]) -> Finish:
    size = group.size()
    packed = _packed([share.reshape(1, -1) for share in shares])
    received = packed.new_empty(size * packed.numel())
    work = _all_gather(received, packed.view(-1), group=group, async_op=True)

    def finish() -> list[torch.Tensor]:
        work.wait()
        columns = received.view(size, -1).split([share.numel() for share in shares], dim=1)
        parts = [column.unflatten(1, share.shape) for share, column in zip(shares, columns, strict=True)]
        return [part.movedim(0, SEQUENCE).flatten(SEQUENCE, SEQUENCE + 1).contiguous() for part in parts]

    return finish


def _start_summing_shares(group: dist.ProcessGroup, wholes: Sequence[torch.Tensor]) -> Finish:
    size = group.size()
    parts = [whole.unflatten(SEQUENCE, (size, -1)).movedim(SEQUENCE, 0) for whole in wholes]
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


class Copy(torch.autograd.Function):
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


class Gather(torch.autograd.Function):
    """All-gather along the sequence forward, reduce-scatter of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *shares: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(gathered(group, shares))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *_summed_shares(ctx.group, gradients)


class GatheredLinear(torch.autograd.Function):
    """All-gather along the sequence, then linear maps; backward with both collectives beside a matrix product."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, keeps_gathered: bool, sources: tuple[int, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count = len(sources)
        shares, weights, biases = tensors[: -2 * count], tensors[-2 * count : -count], tensors[-count:]
        wholes = gathered(group, shares)
        ctx.group, ctx.keeps_gathered, ctx.sources = group, keeps_gathered, sources
        ctx.save_for_backward(*(wholes if keeps_gathered else shares), *weights)
        of_maps = zip(sources, weights, biases, strict=True)
        return tuple(functional.linear(wholes[source], weight, bias) for source, weight, bias in of_maps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation makes them when they are asked for
        kept, weights = saved[: -len(ctx.sources)], saved[-len(ctx.sources) :]
        gathering = None if ctx.keeps_gathered else _start_gathering(ctx.group, kept)
        of_inputs: list[torch.Tensor | None] = [None] * len(kept)
        for source, dy, weight in zip(ctx.sources, gradients, weights, strict=True):
            before = of_inputs[source]
            of_inputs[source] = dy @ weight if before is None else before.add_(dy @ weight)
        summing = _start_summing_shares(ctx.group, [dx for dx in of_inputs if dx is not None])
        wholes = kept if gathering is None else gathering()
        rows = [dy.flatten(0, -2) for dy in gradients]
        dweights = [dy.T @ wholes[source].flatten(0, -2) for source, dy in zip(ctx.sources, rows, strict=True)]
        dbiases = [dy.sum(dim=0) for dy in rows]
        return None, None, None, *summing(), *dweights, *dbiases


class ScatterSum(torch.autograd.Function):
    """Reduce-scatter along the sequence forward, all-gather of the gradient backward; with a bias [D] or without."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, partial_BSD: torch.Tensor, bias_D: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.group, ctx.has_bias = group, bias_D is not None
        (share,) = _summed_shares(group, [partial_BSD])
        return share if bias_D is None else share + bias_D

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (whole_BSD,) = gathered(ctx.group, gradients)
        return None, whole_BSD, whole_BSD.flatten(0, -2).sum(dim=0) if ctx.has_bias else None


class SummedLinear(torch.autograd.Function):
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


class LinearSum(torch.autograd.Function):
    """A linear map whose output is summed over the ranks. Rank 0 adds the bias; all compute its gradient."""

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


class SliceLinear(SummedLinear):
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
