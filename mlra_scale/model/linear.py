"""Linear maps under tensor parallelism: dense or low-rank, column- or row-parallel, with every collective in sight.

A factorised projection (MLRA; Chung et al. 2024, arXiv 2409.07787, sec. 3) computes P(x) = (x W_D^T) W_U^T + b with
W_D [R, in] and W_U [out, R]; nothing stands between the factors, so W_U W_D merges exactly into one dense weight.

Under tensor parallelism q, k and v are computed by one of three plans (low_rank_plan.py); the factor on the split side
is sharded in all of them. A factor that is replicated sees its whole gradient only if its latent's gradient, or its
own, is summed over the ranks: those sums are in tensor_parallel.py, and leaving one out is the classic way to train a
model that slowly explodes.

With sigmaReparam every map is multiplied by one number, which the Spectral... classes below get from
mlra_scale.model.spectral: on the matrix of a dense map, on the up factor of a factorised one, whose down factor hands
up what that number needs of it.

Shape suffixes: B batch, S sequence, D hidden, R rank.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.megatron import ColumnParallelLinear, RowParallelLinear
from mlra_scale.model.context import ModelContext
from mlra_scale.model.spectral import SpectralNorm, scaled_linear
from mlra_scale.model.tensor_parallel import (
    leave_tensor_parallel,
    linear_sum,
    on_slice,
    slice_linear,
    summed_linear,
)


class ReplicatedLinear(nn.Module):
    """y = x W^T (+ b), held whole by every tensor-parallel rank, of the whole stream or this rank's part of it.

    weight: [out, in], replicated over TP
    bias: [out], replicated over TP
    """

    def __init__(self, context: ModelContext, name: str, has_bias: bool) -> None:
        super().__init__()
        self.context = context
        info = context.initialize.table[f"{name}.weight"]
        self.weight = nn.Parameter(torch.empty(info.shape))
        context.initialize(info.name)(self.weight)
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(info.shape[0]))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.context.has_sequence_parallel:
            return slice_linear(self.context, x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)


class ColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel map, with the bias in the matrix product instead of a pass of its own.

    weight and bias as in `column_linear`
    """

    def __init__(self, context: ModelContext, *shape: int, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.context = context
        self.sums_input_gradient = not options["disable_grad_reduce"]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        if self.sums_input_gradient and self.context.tensor_parallel > 1:
            return summed_linear(self.context, x, self.weight, self.bias), None
        return functional.linear(x, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """A row-parallel map whose output is the stream's: whole, or this rank's part of the sequence.

    weight and bias as in `row_linear`
    """

    def __init__(self, context: ModelContext, *shape: int, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.context = context

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        if self.context.tensor_parallel == 1:
            return functional.linear(x, self.weight, self.bias), None
        if not self.context.has_sequence_parallel:
            return linear_sum(self.context, x, self.weight, self.bias), None
        return leave_tensor_parallel(self.context, functional.linear(x, self.weight), self.bias), None


class SpectralColumnLinear(ColumnParallelLinear):
    """A column-parallel map with sigmaReparam: a dense one, or the up factor of q, k or v.

    gain: [1], replicated over TP; weight and bias as in `column_linear`
    """

    def __init__(self, spectral_norm: SpectralNorm, *shape: int, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.spectral_norm = spectral_norm
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, image_R: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        scale = self.spectral_norm.scale(self.gain, self.weight, image_R)
        return scaled_linear(x, self.weight, scale) + self.bias, None


class SpectralRowLinear(RowLinear):
    """A dense row-parallel map with sigmaReparam.

    gain: [1], replicated over TP; weight and bias as in `row_linear`
    """

    def __init__(self, spectral_norm: SpectralNorm, context: ModelContext, *shape: int, **options: Any) -> None:
        super().__init__(context, *shape, **options)
        self.spectral_norm = spectral_norm
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        scale = self.spectral_norm.scale(self.gain, self.weight)
        return leave_tensor_parallel(self.context, scaled_linear(x, self.weight, scale), self.bias), None


class SpectralReplicatedLinear(ReplicatedLinear):
    """The up factor of o with sigmaReparam.

    gain: [1], replicated over TP; weight and bias as in ReplicatedLinear
    """

    def __init__(self, spectral_norm: SpectralNorm, context: ModelContext, name: str) -> None:
        super().__init__(context, name, has_bias=True)
        self.spectral_norm = spectral_norm
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, image_R: torch.Tensor | None = None) -> torch.Tensor:
        scale = self.spectral_norm.scale(self.gain, self.weight, image_R)
        weight, bias_D = on_slice(self.context, self.weight, self.bias)
        return scaled_linear(x, weight, scale) + bias_D


class SpectralReplicatedDown(ReplicatedLinear):
    """The down factor of q, k or v with sigmaReparam: returns the latent and the image (SpectralNorm.image)."""

    def __init__(self, spectral_norm: SpectralNorm, context: ModelContext, name: str) -> None:
        super().__init__(context, name, has_bias=False)
        self.spectral_norm = spectral_norm

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), self.spectral_norm.image(self.weight)


class SpectralRowDown(RowLinear):
    """The down factor of o with sigmaReparam: returns the latent and the image (SpectralNorm.image)."""

    def __init__(self, spectral_norm: SpectralNorm, context: ModelContext, *shape: int, **options: Any) -> None:
        super().__init__(context, *shape, **options)
        self.spectral_norm = spectral_norm

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        latent_BSR, _ = super().forward(x)
        return latent_BSR, self.spectral_norm.image(self.weight)


def column_linear(
    context: ModelContext,
    name: str,
    spectral_norm: SpectralNorm | None = None,
    has_bias: bool = True,
    sums_input_gradient: bool = False,
) -> ColumnParallelLinear:
    """y = x W^T (+ b) with W [out, in] and b [out] sharded over TP on dim 0.

    The caller takes the input in (`enter_tensor_parallel`), so that several projections share one collective; or, of a
    map that stands alone, the input's gradient is summed while the weight's is computed (`sums_input_gradient`).
    """
    build: Any = partial(ColumnLinear, context)
    if context.model.sigma_reparam:
        build = partial(SpectralColumnLinear, spectral_norm or SpectralNorm(context, name))
    out_features, in_features = context.initialize.table[f"{name}.weight"].shape
    linear: ColumnParallelLinear = build(
        in_features,
        out_features,
        config=context.megatron,
        init_method=context.initialize(f"{name}.weight"),
        bias=has_bias,
        disable_grad_reduce=not sums_input_gradient,
        tp_group=context.tensor_group,
    )
    return linear


def row_linear(context: ModelContext, name: str) -> RowLinear:
    """y = sum over ranks of x_local W_local^T, + b; W [out, in] sharded over TP on dim 1, b [out] replicated."""
    build: Any = RowLinear
    if context.model.sigma_reparam:
        build = partial(SpectralRowLinear, SpectralNorm(context, name))
    return _built_row(build, context, name, has_bias=True)


def _built_row(build: Any, context: ModelContext, name: str, has_bias: bool) -> RowLinear:
    out_features, in_features = context.initialize.table[f"{name}.weight"].shape
    linear: RowLinear = build(
        context,
        in_features,
        out_features,
        config=context.megatron,
        init_method=context.initialize(f"{name}.weight"),
        bias=has_bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=context.tensor_group,
    )
    return linear


class LowRankInputProjection(nn.Module):
    """Factorised q, k or v projection.

    down.weight: [R, D]; replicated over TP, with the plan `sharded` sharded: dim 0
    up.weight: [D, R], sharded over TP: dim 0
    up.bias: [D], sharded over TP: dim 0
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.has_spectral_norm = context.model.sigma_reparam
        if self.has_spectral_norm:
            spectral_norm = SpectralNorm(context, name)
            self.down: Any = SpectralReplicatedDown(spectral_norm, context, f"{name}.down")
            self.up = column_linear(context, f"{name}.up", spectral_norm)
        else:
            is_split = context.low_rank_plan == "sharded"
            build: Any = column_linear if is_split else ReplicatedLinear
            self.down = build(context, f"{name}.down", has_bias=False)
            self.up = column_linear(context, f"{name}.up")

    def merged(self, hidden_BSD: torch.Tensor, down_RD: torch.Tensor) -> torch.Tensor:
        """Returns this rank's heads by the product of the factors, [B, S, D / TP].

        Args:
            hidden_BSD: The hidden state, as it enters sharded computation.
            down_RD: down.weight, likewise.
        """
        return functional.linear(hidden_BSD, self.up.weight @ down_RD, self.up.bias)

    def lower(self, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the latent [B, S, R], which then enters sharded computation, and what `rise` takes beside it.

        With sequence parallelism that is of this rank's positions, so that ranks share the work of a replicated factor.
        With the plan `sharded` it is this rank's share, [B, S, R / TP], of a hidden state that has entered already.
        """
        output = self.down(hidden_BSD)
        if self.has_spectral_norm:
            return output
        return (output[0] if isinstance(output, tuple) else output), None

    def rise(self, latent_BSR: torch.Tensor, image_R: torch.Tensor | None) -> torch.Tensor:
        """Returns this rank's heads of the projection, [B, S, D / TP]."""
        output_BSD, _ = self.up(latent_BSR) if image_R is None else self.up(latent_BSR, image_R)
        return output_BSD


def lowered_together(
    context: ModelContext, hidden_BSD: torch.Tensor, projections: dict[str, LowRankInputProjection]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Returns what `lower` returns of projections with replicated down factors, by name.

    In one process, or with sigmaReparam, it is `lower` itself; else the gradients of the hidden state are added up by
    the products that compute them, instead of in passes of their own.
    """
    if context.tensor_parallel == 1 or context.model.sigma_reparam or not projections:
        return {name: projection.lower(hidden_BSD) for name, projection in projections.items()}
    latents = _Latents.apply(hidden_BSD, *[projection.down.weight for projection in projections.values()])
    return {name: (latent, None) for name, latent in zip(projections, latents, strict=True)}


class _Latents(torch.autograd.Function):
    """Several linear maps of one input, whose gradient is summed by the products."""

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


class LowRankOutputProjection(nn.Module):
    """Factorised output projection: the latent, not the output, is summed over TP (R instead of D numbers per token).

    With sequence parallelism the factor behind it works on this rank's positions.

    down.weight: [R, D], sharded over TP: dim 1
    up.weight: [D, R], replicated over TP
    up.bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        down: Any = RowLinear
        if context.model.sigma_reparam:
            spectral_norm = SpectralNorm(context, name)
            down = partial(SpectralRowDown, spectral_norm)
            self.up: nn.Module = SpectralReplicatedLinear(spectral_norm, context, f"{name}.up")
        else:
            self.up = ReplicatedLinear(context, f"{name}.up", has_bias=True)
        self.down = _built_row(down, context, f"{name}.down", has_bias=False)

    def forward(self, heads_BSD: torch.Tensor) -> torch.Tensor:
        """Maps this rank's heads [B, S, D / TP] to the hidden state [B, S, D]."""
        latent_BSR, image_R = self.down(heads_BSD)
        return self.up(latent_BSR) if image_R is None else self.up(latent_BSR, image_R)
