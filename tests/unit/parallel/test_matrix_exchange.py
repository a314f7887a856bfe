"""Who sends what in a round: all ranks must agree on which collectives are called. tests/distributed moves data."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.model.parameters import ParameterInfo
from mlra_scale.parallel.matrix_exchange import MatrixExchange

SHAPES = [(8, 8), (4, 8), (8, 4), (16, 8)]
Runs = list[tuple[int, int]]
"""By matrix, first element and number of elements that a data rank holds of its shard."""


def runs_of(zero: int, sizes: list[int], data: int) -> list[Runs]:
    """What DeepSpeed gives each data rank: everything, a piece of all matrices one after the other, or of each."""
    if zero == 0:
        return [[(0, size) for size in sizes] for _ in range(data)]
    if zero == 3:
        pieces = [-(-size // data) for size in sizes]
        return [
            [(rank * piece, max(0, min(piece, size - rank * piece))) for piece, size in zip(pieces, sizes, strict=True)]
            for rank in range(data)
        ]
    piece, found = -(-sum(sizes) // data), []
    for rank in range(data):
        runs, start = [], 0
        for size in sizes:
            first, end = max(rank * piece - start, 0), min((rank + 1) * piece - start, size)
            runs.append((first, max(0, end - first)))
            start += size
        found.append(runs)
    return found


@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from([None, 0, 1])), min_size=1, max_size=12),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 5),
    st.sampled_from([0, 1, 3]),
)
def test_all_ranks_call_the_same_collectives_and_those_that_are_left_out_would_move_nothing(
    matrices: list[tuple[tuple[int, int], int | None]], tensor: int, data: int, zero: int
) -> None:
    infos = [ParameterInfo(f"m{number}", shape, dim, "factor") for number, (shape, dim) in enumerate(matrices)]
    held = runs_of(zero, [info.numel() // (1 if info.shard_dim is None else tensor) for info in infos], data)
    exchanges = []
    for rank in range(tensor * data):

        def gather(gathered: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
            for other, tensor_of in enumerate(gathered):
                tensor_of.copy_(torch.tensor(held[other // tensor]))

        topology: Any = SimpleNamespace(
            stage_group=None,
            tensor=tensor,
            data=data,
            data_rank=rank // tensor,
            tensor_rank=rank % tensor,
            device=torch.device("cpu"),
        )
        own = dict(zip([info.name for info in infos], held[rank // tensor], strict=True))
        with mock.patch("torch.distributed.all_gather", gather):
            exchanges.append(MatrixExchange(infos, own, topology, zero == 0, torch.float32))
    for turns in zip(*[exchange.rounds for exchange in exchanges], strict=True):
        assert len({(turn.is_sent, turn.is_returned) for turn in turns}) == 1
        sent = [(each.owner, rank, each.num_sent) for rank, turn in enumerate(turns) for each in turn.transfers]
        assert turns[0].is_sent == any(owner != rank and number > 0 for owner, rank, number in sent)
        returned = [(each.owner, rank, each.num_held) for rank, turn in enumerate(turns) for each in turn.transfers]
        assert turns[0].is_returned == any(owner != rank and number > 0 for owner, rank, number in returned)
        assert len({tuple((each.name, each.owner) for each in turn.transfers) for turn in turns}) == 1
