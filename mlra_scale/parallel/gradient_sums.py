"""Adds the bf16 gradients of each micro-batch to DeepSpeed's flat fp32 sums, with few kernels.

DeepSpeed's BF16_Optimizer keeps one flat fp32 buffer of gradients per parameter group, and adds to it parameter by
parameter: a kernel that converts, one that adds, and one in the backward pass that adds to a zeroed bf16 gradient.
These were 57 of the 108 kernels of a block. Here the gradients of a micro-batch are joined in pieces of the flat order,
and each piece is added by one kernel. The sums are the same to the last bit: fp32, micro-batch by micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_ELEMENTS_PER_PIECE = 1 << 24
"""Of several parameters that are joined: the copy takes 32 MiB. A larger parameter is a piece of its own, uncopied."""


@dataclass(frozen=True)
class _Piece:
    """Parameters that lie one after the other in a flat buffer, and their part of it."""

    parameters: tuple[nn.Parameter, ...]
    sums: torch.Tensor


class GradientSums:
    """Replaces the methods of DeepSpeed's BF16_Optimizer that touch gradients."""

    def __init__(self, optimizer: Any) -> None:
        self._pieces = list(_pieces(optimizer))
        for parameters, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, total in zip(parameters, sums, strict=True):
                parameter._hp_grad = total  # where DeepSpeed's pipeline looks for that of the tied embedding
        optimizer.update_hp_grads = self.add
        optimizer.clear_lp_grads = self.drop

    @torch.no_grad()
    def add(self, clear_lp_grads: bool = False) -> None:
        """Adds the gradients of a micro-batch and drops them, whatever DeepSpeed's argument is."""
        for piece in self._pieces:
            gradients = []
            for parameter in piece.parameters:
                assert parameter.grad is not None, tuple(parameter.shape)
                gradients.append(parameter.grad.view(-1))
                parameter.grad = None
            piece.sums.add_(gradients[0] if len(gradients) == 1 else torch.cat(gradients))

    def drop(self, set_to_none: bool = True) -> None:
        """Drops bf16 gradients, so that the backward pass creates new ones instead of adding to old ones."""
        for piece in self._pieces:
            for parameter in piece.parameters:
                parameter.grad = None


def _pieces(optimizer: Any) -> Iterator[_Piece]:
    """Cuts each group's flat buffer into pieces between parameters."""
    for parameters, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True):
        start, size = 0, 0
        members: list[nn.Parameter] = []
        for parameter in parameters:
            if members and size + parameter.numel() > _ELEMENTS_PER_PIECE:
                yield _Piece(tuple(members), flat.narrow(0, start, size))
                start, size, members = start + size, 0, []
            members.append(parameter)
            size += parameter.numel()
        yield _Piece(tuple(members), flat.narrow(0, start, size))
