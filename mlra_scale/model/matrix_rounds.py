"""How the matrices of a pipeline stage are dealt among its ranks, to be orthogonalised. Imports no torch.

The engines and the planner read the same deal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby


def work(shape: Sequence[int]) -> int:
    """Returns the multiply-adds of one Newton-Schulz iteration: 2 m^2 n + m^3 with m <= n."""
    small, large = sorted(shape)
    return 2 * small * small * large + small**3


def rounds_of(
    shapes: Sequence[Sequence[int]], num_ranks: int, holders: Sequence[Mapping[int, float]] = ()
) -> list[dict[int, int]]:
    """Deals matrices among ranks, at most one to each rank in a round.

    A matrix goes to a rank that holds it, or at least half as much of it as any other, as far as the ranks' work stays
    alike: the largest matrix of each round is as small as in a deal that does not look at who holds what.

    Args:
        shapes: Rows and columns of the matrices, in any order that all ranks share.
        num_ranks: Ranks of the stage, tensor times data.
        holders: Of each matrix how many elements each rank holds; ranks without any are missing. Empty: all ranks hold
            equally many.

    Returns:
        The rounds, as few as possible; in each, the indices of the matrices by the rank that owns them, in order of the
        ranks.
    """
    owned: list[list[int]] = [[] for _ in range(num_ranks)]
    num_dealt = 0
    order = sorted(range(len(shapes)), key=lambda index: -work(shapes[index]))
    for _, equals in groupby(order, key=lambda index: work(shapes[index])):
        indices, others = list(equals), list[int]()
        num_dealt += len(indices)
        most = -(-num_dealt // num_ranks)  # no rank has more matrices of so much work
        if holders:  # first those that one rank holds alone
            indices.sort(key=lambda index: -max(holders[index].values()))
        for index in indices:
            free = {rank: held for rank, held in holders[index].items() if len(owned[rank]) < most} if holders else {}
            enough = max(free.values(), default=0.0) / 2
            near = [rank for rank, held in free.items() if held >= enough]
            if near and len(near) < num_ranks:
                owned[min(near, key=lambda rank: len(owned[rank]))].append(index)
            else:
                others.append(index)
        vacant = (rank for number in range(most) for rank in range(num_ranks) if len(owned[rank]) <= number)
        for index, rank in zip(others, vacant, strict=False):
            owned[rank].append(index)
    return [
        {rank: mine[number] for rank, mine in enumerate(owned) if number < len(mine)}
        for number in range(-(-len(shapes) // num_ranks))
    ]
