"""Pieces of global tensors that a rank owns."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of one parameter.

    Attributes:
        name: Canonical parameter name.
        start: First element, counted in this rank's tensor-parallel shard flattened row by row.
        values: fp32 master weights, or gradients, 1-D.
        exp_avg: Adam's first moment of the same elements, where asked for.
        exp_avg_sq: Adam's second moment of the same elements, where asked for.
    """

    name: str
    start: int
    values: torch.Tensor
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
