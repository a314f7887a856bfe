"""Layer norms: of queries and keys (QK-norm), of a block (LayerNorm scaling), and the final one.

Shape suffixes: B batch, S sequence, N heads on this rank, H head dimension, D hidden.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.model.context import ModelContext, Stream
from mlra_scale.model.recomputation import recomputes, recomputing
from mlra_scale.model.tensor_parallel import copy_to_tensor_parallel, on_slice


class HeadNorm(nn.Module):
    """Layer norm over the width of each head of queries or keys, without bias (QK-norm; arXiv 2302.05442, 2309.14322).

    weight: [H], for all heads; replicated over TP (a rank sees its heads only: the gradient is summed over TP)
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        super().__init__()
        self.context = context
        self.weight = nn.Parameter(torch.empty(context.table[f"{name}.weight"].shape))
        context.initialize(f"{name}.weight")(self.weight)

    def forward(self, heads_BSNH: torch.Tensor) -> torch.Tensor:
        (weight_H,) = copy_to_tensor_parallel(self.context, self.weight)
        return functional.layer_norm(heads_BSNH, weight_H.shape, weight_H, eps=self.context.model.layer_norm_eps)


class BlockNorm(nn.LayerNorm):
    """Layer norm of a block, with `model.layer_norm_scaling` times 1/sqrt(l) (Sun et al. 2025, arXiv 2502.05795).

    weight, bias: [D], replicated over TP
    """

    def __init__(self, context: ModelContext, block: int | None) -> None:
        super().__init__(context.model.hidden_size, eps=context.model.layer_norm_eps)
        self.context = context
        self.factor: torch.Tensor | None = None
        if context.model.layer_norm_scaling and block is not None:
            # A tensor: torch.compile would make every block's number part of a graph of its own. Neither a buffer nor a
            # new floating-point tensor, which DeepSpeed would round to 16 bits. On the CPU, as every scalar may be.
            zero = torch.zeros((), dtype=torch.int64, device="cpu")
            self.factor = zero.double().fill_(context.model.norm_factor(block))

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        weight_D, bias_D = self._scaled(*on_slice(self.context, self.weight, self.bias))
        return functional.layer_norm(hidden_BSD, self.normalized_shape, weight_D, bias_D, self.eps)

    def recomputing(self, hidden_BSD: torch.Tensor, normed_BSD: torch.Tensor) -> AbstractContextManager[None]:
        """See recomputation.recomputing. Copies weight and bias, which ZeRO 3 frees when the layer is done."""
        if not recomputes(self.context):
            return nullcontext()
        copies = self._scaled(self.weight.detach().clone(), self.bias.detach().clone())
        return recomputing(
            self.context, normed_BSD, functional.layer_norm, hidden_BSD, self.normalized_shape, *copies, self.eps
        )

    def _scaled(self, weight_D: torch.Tensor, bias_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The factor is on weight and bias, as in an export: they are smaller than the output.
        return (weight_D, bias_D) if self.factor is None else (weight_D * self.factor, bias_D * self.factor)


class FinalNorm(BlockNorm):
    """The last layer norm: takes the stream, returns the hidden state alone. It is never scaled."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, block=None)

    def forward(self, stream: Stream) -> torch.Tensor:
        return super().forward(self.context.unpack(stream)[0])
