"""Linear maps under tensor parallelism: dense or low-rank, column- or row-parallel, with every collective in sight.

A factorised projection (MLRA; Chung et al. 2024, arXiv 2409.07787) computes P(x) = (x W_D^T) W_U^T + b with W_D [R, in]
and W_U [out, R]; nothing stands between the factors, so W_U W_D merges exactly into one dense weight. b is GPT-2's.

Under tensor parallelism the factor on the side of the heads is sharded and the other one replicated. A replicated
factor sees its whole gradient only if its latent's gradient, or its own, is summed over the ranks (tensor_parallel.py).
Without that sum the model trains for a while and then diverges.

Shape suffixes: B batch, S sequence, D hidden, R rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.megatron import ColumnParallelLinear, RowParallelLinear
from mlra_scale.model.context import ModelContext
from mlra_scale.model.spectral import SpectralNorm
from mlra_scale.model.tensor_parallel import (
    enter_linear,
    enter_tensor_parallel,
    gathered_linear,
    leave_linear,
    leave_tensor_parallel,
    on_slice,
    slice_linear,
)


class ReplicatedLinear(nn.Module):
    """y = x W^T (+ b), held whole by every tensor-parallel rank, of the whole stream or this rank's positions.

    weight: [out, in], replicated over TP
    bias: [out], replicated over TP; not of a down factor
    gain: [1], replicated over TP; of an up factor with sigmaReparam, see spectral.py
    """

    def __init__(self, context: ModelContext, name: str, *factors: nn.Parameter) -> None:
        super().__init__()
        self.context = context
        info = context.table[f"{name}.weight"]
        self.weight = nn.Parameter(torch.empty(info.shape))
        context.initialize(info.name)(self.weight)
        self.bias = nn.Parameter(torch.zeros(info.shape[0])) if f"{name}.bias" in context.table else None
        self.spectral_norm = SpectralNorm.of(context, name, self, *factors, self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spectral_norm is None:
            return slice_linear(self.context, x, self.weight, self.bias)
        assert self.bias is not None
        weight, bias = on_slice(self.context, self.weight, self.bias)
        return self.spectral_norm.linear(x, weight) + bias


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b, a rank computing its part of y.

    The caller takes the input in (`column_maps`), so that several maps share one collective; a map that is alone does
    so itself (`enters_alone`).

    weight: [out, in], sharded over TP: dim 0
    bias: [out], sharded over TP: dim 0
    gain: [1], replicated over TP; with sigmaReparam, see spectral.py
    """

    def __init__(self, context: ModelContext, name: str, *factors: nn.Parameter, enters_alone: bool = False) -> None:
        out_features, in_features = context.table[f"{name}.weight"].shape
        super().__init__(
            in_features,
            out_features,
            config=context.megatron,
            init_method=context.initialize(f"{name}.weight"),
            tp_group=context.tensor_group,
        )
        self.context = context
        self.enters_alone = enters_alone
        self.spectral_norm = SpectralNorm.of(context, name, self, *factors, self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spectral_norm is not None:
            if self.enters_alone:
                (x,) = enter_tensor_parallel(self.context, x)
            return self.spectral_norm.linear(x, self.weight) + self.bias
        if self.enters_alone:
            return enter_linear(self.context, x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)


class RowLinear(RowParallelLinear):
    """y = sum over ranks of x_local W_local^T, + b: of the whole stream, or this rank's positions.

    weight: [out, in], sharded over TP: dim 1
    bias: [out], replicated over TP; not of a down factor
    gain: [1], replicated over TP; of a dense map with sigmaReparam, see spectral.py
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        out_features, in_features = context.table[f"{name}.weight"].shape
        super().__init__(
            in_features,
            out_features,
            config=context.megatron,
            init_method=context.initialize(f"{name}.weight"),
            bias=f"{name}.bias" in context.table,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=context.tensor_group,
        )
        self.context = context
        self.spectral_norm = SpectralNorm.of(context, name, self, self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spectral_norm is None:
            return leave_linear(self.context, x, self.weight, self.bias)
        return leave_tensor_parallel(self.context, self.spectral_norm.linear(x, self.weight), self.bias)


class LowRankInputProjection(nn.Module):
    """The factors of q, k or v; SelfAttention computes with them, because the three share their collectives.

    down.weight: [R, D], replicated over TP
    up.weight: [D, R], sharded over TP: dim 0
    up.bias: [D], sharded over TP: dim 0
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.down = ReplicatedLinear(context, f"{name}.down")
        self.up = ColumnLinear(context, f"{name}.up", self.down.weight)


class LowRankOutputProjection(nn.Module):
    """Factorised output projection: the latent, not the output, is summed over TP (R instead of D numbers per token).

    With sequence parallelism the up factor works on this rank's positions.

    down.weight: [R, D], sharded over TP: dim 1
    up.weight: [D, R], replicated over TP
    up.bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        down = RowLinear(context, f"{name}.down")
        self.up = ReplicatedLinear(context, f"{name}.up", down.weight)
        self.down = down

    def forward(self, heads_BSD: torch.Tensor) -> torch.Tensor:
        """Maps this rank's heads [B, S, D / TP] to the hidden state [B, S, D]."""
        return self.up(self.down(heads_BSD))


class MergedMap(NamedTuple):
    """The product of the factors of q, k or v, as a column-parallel map: weight [D / TP, D], bias [D / TP]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


def column_maps(
    context: ModelContext, inputs: Sequence[torch.Tensor], maps: Sequence[tuple[int, ColumnLinear | MergedMap]]
) -> list[torch.Tensor]:
    """Takes tensors of the stream, by one collective each way, into column-parallel maps.

    Each map comes with the index of its input. Returns [B, S, out / TP] for each.
    """
    if context.has_sequence_parallel and not context.model.sigma_reparam:
        return gathered_linear(context, inputs, [(source, each.weight, each.bias) for source, each in maps])
    entered = enter_tensor_parallel(context, *inputs)
    return [each(entered[source]) for source, each in maps]


def down_project(
    context: ModelContext, hidden_BSD: torch.Tensor, projections: Sequence[LowRankInputProjection]
) -> list[torch.Tensor]:
    """Returns the latents [B, S, R] of one hidden state, of this rank's positions with sequence parallelism."""
    if context.tensor_parallel == 1 or context.has_sequence_parallel or not projections:
        return [projection.down(hidden_BSD) for projection in projections]
    return list(_Latents.apply(hidden_BSD, *[projection.down.weight for projection in projections]))


class _Latents(torch.autograd.Function):
    """Several linear maps of one input: the products add the input's gradients up, instead of passes of their own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(functional.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, *weights = ctx.saved_tensors
        first, *others = [gradient.flatten(0, -2) for gradient in gradients]
        dx = first @ weights[0]
        for dy, weight in zip(others, weights[1:], strict=True):
            dx = dx.addmm_(dy, weight)
        rows = x.flatten(0, -2)
        return dx.view(x.shape), *[dy.T @ rows for dy in (first, *others)]
