"""Selective activation checkpointing: results that are cheap to compute again are not kept for the backward pass.

Of a block these are the outputs of its layer norms and of its GELU (2 D + F of the 8 D + 2 F numbers that a token keeps
with dense attention). Autograd keeps their inputs anyway; it computes the outputs again where it reads them. No matrix
product and no communication is repeated. The numbers are the same bit by bit: the same operation on the same input.

Korthikanti et al. 2022 (arXiv 2205.05198, sec. 5) recompute the inner attention; scaled_dot_product_attention does that
itself.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from mlra_scale.model.context import ModelContext


@contextmanager
def recomputed(output: torch.Tensor, compute: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Within the block, operations on `output` keep how it is computed instead of keeping it.

    Args:
        output: A contiguous tensor.
        compute: Returns the same values again. It must hold none but detached tensors, or the graph would never be
            freed, and be valid until the backward pass.
    """
    storage, size = output.untyped_storage().data_ptr(), output.numel()

    @cache  # computed when it is first read, for all who read it
    def compute_once() -> torch.Tensor:
        with torch.no_grad():
            return compute()

    def pack(tensor: torch.Tensor) -> Any:
        is_output = tensor.untyped_storage().data_ptr() == storage and tensor.numel() == size
        # Readers may have another view of it: all tokens in one dimension.
        return (compute_once, tensor.shape) if is_output and tensor.is_contiguous() else tensor

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        read, shape = packed
        tensor: torch.Tensor = read().view(shape)
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield


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
