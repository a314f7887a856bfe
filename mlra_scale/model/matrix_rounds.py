"""How the matrices of a pipeline stage are dealt among its ranks, to be orthogonalised. Imports no torch.

The engines and the planner read the same deal.
"""

from __future__ import annotations

from collections.abc import Sequence


def work(shape: Sequence[int]) -> int:
    """Returns the multiply-adds of one Newton-Schulz iteration: 2 m^2 n + m^3 with m <= n."""
    small, large = sorted(shape)
    return 2 * small * small * large + small**3


def rounds_of(shapes: Sequence[Sequence[int]], num_ranks: int) -> list[list[int]]:
    """Deals matrices among ranks, one to each rank in a round.

    Matrices of about the same work are in one round, so that no rank waits long for another.

    Args:
        shapes: Rows and columns of the matrices, in any order that all ranks share.
        num_ranks: Ranks of the stage, tensor times data.

    Returns:
        The rounds; in each, the indices of the matrices by the rank that owns them. The last round may have fewer.
    """
    order = sorted(range(len(shapes)), key=lambda index: -work(shapes[index]))
    return [order[first : first + num_ranks] for first in range(0, len(order), num_ranks)]
