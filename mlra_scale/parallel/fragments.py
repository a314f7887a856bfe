"""Pieces of global tensors that a rank holds."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of one parameter."""

    name: str  # canonical parameter name
    start: int  # first element, counted in this rank's tensor-parallel shard flattened row by row
    values: torch.Tensor  # fp32 master weights, or gradients, 1-D
    exp_avg: torch.Tensor | None = None  # Adam's first moment, or momentum, of the same elements, if requested
    exp_avg_sq: torch.Tensor | None = None  # Adam's second moment likewise; None where only momentum is kept


def scale_rows(fragment: Fragment, width: int, factors: torch.Tensor) -> None:
    """Multiplies every element by the factor of its row, in place; a factor of 1 changes no bit.

    Args:
        fragment: Of a matrix, or of a vector, whose elements are its rows. It may begin and end inside a row.
        width: Elements of a row.
        factors: Of the rows of this rank's tensor-parallel shard.
    """
    first_row, skipped = divmod(fragment.start, width)
    length = fragment.values.numel()
    rows = factors[first_row : -(-(fragment.start + length) // width)]
    of_elements = rows.to(fragment.values).repeat_interleave(width)
    fragment.values.mul_(of_elements[skipped : skipped + length])
