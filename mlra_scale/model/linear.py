"""Linear maps under tensor parallelism: dense or low-rank, column- or row-parallel, with every collective in sight.

A factorised projection (MLRA; Chung et al. 2024, arXiv 2409.07787, sec. 3) computes P(x) = (x W_D^T) W_U^T + b with
W_D [R, in] and W_U [out, R]; nothing stands between the factors, so W_U W_D merges exactly into one dense weight.

Tensor-parallel plan A: the factor on the full side is replicated and every rank computes the whole latent; the
factor on the split side is sharded. A replicated factor sees the whole gradient only if its latent's gradient is
summed over the ranks: that all-reduce is `copy_to_tensor_parallel` below, and leaving it out is the classic way to
train a model that slowly explodes.

Shape suffixes: B batch, S sequence, D hidden, R rank.
"""

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from mlra_scale.model.context import ModelContext


def copy_to_tensor_parallel(context: ModelContext, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Marks replicated tensors as entering sharded computation: identity forward, one all-reduce of gradients backward.

    Several tensors share one all-reduce.

    Args:
        context: The model's context.
        *tensors: Replicated tensors of equal leading dimensions.

    Returns:
        The same values.
    """
    if context.tensor_parallel == 1:
        return list(tensors)
    if len(tensors) == 1:
        return [copy_to_tensor_model_parallel_region(tensors[0], group=context.tensor_group)]
    packed = copy_to_tensor_model_parallel_region(torch.cat(tensors, dim=-1), group=context.tensor_group)
    return list(packed.split([tensor.size(-1) for tensor in tensors], dim=-1))


class ReplicatedLinear(nn.Module):
    """y = x W^T (+ b), held whole by every tensor-parallel rank.

    weight: [out, in], replicated over TP
    bias: [out], replicated over TP
    """

    def __init__(self, context: ModelContext, name: str, has_bias: bool) -> None:
        super().__init__()
        info = context.initialize.table[f"{name}.weight"]
        self.weight = nn.Parameter(torch.empty(info.shape))
        context.initialize(info.name)(self.weight)
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(info.shape[0]))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


def column_linear(context: ModelContext, name: str) -> ColumnParallelLinear:
    """y = x W^T + b with W [out, in] and b [out] sharded over TP on dim 0.

    The caller reduces the input's gradient (`copy_to_tensor_parallel`), so that several projections share one
    all-reduce.
    """
    out_features, in_features = context.initialize.table[f"{name}.weight"].shape
    return ColumnParallelLinear(
        in_features,
        out_features,
        config=context.megatron,
        init_method=context.initialize(f"{name}.weight"),
        bias=True,
        disable_grad_reduce=True,
        tp_group=context.tensor_group,
    )


def row_linear(context: ModelContext, name: str, has_bias: bool = True) -> RowParallelLinear:
    """y = sum over ranks of x_local W_local^T, + b; W [out, in] sharded over TP on dim 1, b [out] replicated."""
    out_features, in_features = context.initialize.table[f"{name}.weight"].shape
    return RowParallelLinear(
        in_features,
        out_features,
        config=context.megatron,
        init_method=context.initialize(f"{name}.weight"),
        bias=has_bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=context.tensor_group,
    )


class LowRankInputProjection(nn.Module):
    """Factorised q, k or v projection, plan A.

    down.weight: [R, D], replicated over TP (its latent's gradient is all-reduced over TP)
    up.weight: [D, R], sharded over TP: dim 0
    up.bias: [D], sharded over TP: dim 0
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.down = ReplicatedLinear(context, f"{name}.down", has_bias=False)
        self.up = column_linear(context, f"{name}.up")


class LowRankOutputProjection(nn.Module):
    """Factorised output projection: the latent, not the output, is summed over TP (R instead of D numbers per token).

    down.weight: [R, D], sharded over TP: dim 1
    up.weight: [D, R], replicated over TP
    up.bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.down = row_linear(context, f"{name}.down", has_bias=False)
        self.up = ReplicatedLinear(context, f"{name}.up", has_bias=True)

    def forward(self, heads_BSD: torch.Tensor) -> torch.Tensor:
        """Maps this rank's heads [B, S, D / TP] to the hidden state [B, S, D]."""
        latent_BSR, _ = self.down(heads_BSD)
        return self.up(latent_BSR)
