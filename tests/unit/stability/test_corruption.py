"""Which ranks are named for what the passes of a step have computed."""

import math
from collections.abc import Iterable

import pytest

from mlra_scale.stability.corruption import BACKWARD, BOUND, FORWARD, PROPOSED, REDUCED, _are_close, wrong_ranks

Degrees = tuple[int, int, int]


class Passes:
    """Fingerprints of a step that nothing disturbs, and what then is changed in them."""

    def __init__(self, stages: int = 1, data: int = 1, tensor: int = 1) -> None:
        self.degrees: Degrees = (stages, data, tensor)

        def of(stage: int, data_rank: int, tensor_rank: int) -> list[int]:
            # Of the micro-batches of a data rank, whoever computes them.
            return [1000 * stage + 100 * data_rank + 10 * tensor_rank + place for place in range(4)]

        def of_rank(rank: int) -> list[list[int]]:
            stage, rest = divmod(rank, data * tensor)
            data_rank, tensor_rank = divmod(rest, tensor)
            own, others = of(stage, data_rank, tensor_rank), of(stage, (data_rank + 1) % data, tensor_rank)
            return [own, others, [*own]] if data > 1 else [own, [*own]]

        self.values = [of_rank(rank) for rank in range(stages * data * tensor)]

    def spoil(self, ranks: Iterable[int], number: int, places: Iterable[int]) -> "Passes":
        for rank in ranks:
            for place in places:
                self.values[rank][number][place] += 7
        return self

    @property
    def named(self) -> list[int]:
        return sorted(wrong_ranks(self.values, self.degrees, lambda first, second: first == second))


ALL = (FORWARD, BACKWARD, REDUCED, PROPOSED)


@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 3, 2)])
def test_equal_passes_name_nobody(degrees: Degrees) -> None:
    assert Passes(*degrees).named == []


@pytest.mark.parametrize("number", [0, -1], ids=["repeated", "own"])
def test_a_rank_whose_passes_differ_is_named(number: int) -> None:
    assert Passes(data=3).spoil([1], number, ALL).named == [1]
    assert Passes(data=2).spoil([1], number, [BACKWARD, REDUCED]).named == [1]
    assert Passes().spoil([0], number, [BACKWARD]).named == [0]


def test_what_spreads_through_a_pipeline_names_the_stage_where_it_began() -> None:
    # The activation of stage 1 of 3: later stages compute with it, and all get wrong gradients.
    passes = Passes(stages=3).spoil([1, 2], -1, [FORWARD]).spoil([0, 1, 2], -1, [BACKWARD])
    assert passes.named == [1]
    # The gradient that stage 1 sends back.
    assert Passes(stages=3).spoil([0, 1], -1, [BACKWARD]).named == [1]
    # A message back to stage 0, which stage 1 has sent right.
    assert Passes(stages=3).spoil([0], -1, [BACKWARD]).named == [0]


def test_tensor_ranks_are_named_as_far_as_they_differ() -> None:
    assert Passes(tensor=2, data=2).spoil([2, 3], -1, ALL).named == [2, 3], "sums in every block spread it"
    assert Passes(tensor=2, data=2).spoil([3], -1, [BACKWARD]).named == [3], "the gradient of its own shard"


def test_a_pass_that_differs_on_another_rank_alone_names_both() -> None:
    # Data rank 1 computes those of rank 2 wrong, once; or rank 2 does, always alike, for these operands only.
    assert Passes(data=3).spoil([1], 1, ALL).named == [1, 2]
    assert Passes(data=3).spoil([2], 0, ALL).spoil([2], -1, ALL).named == [1, 2]
    assert Passes(data=2).spoil([0], 1, ALL).named == [0, 1]


def test_a_rank_that_always_computes_wrong_is_named_by_its_two_neighbours() -> None:
    # Rank 2 agrees with itself, and differs from rank 1, which computes the same, and from what rank 0 has of its own.
    passes = Passes(data=3)
    for number in (0, 1, 2):
        passes.spoil([2], number, ALL)
    assert passes.named == [2]


def test_of_two_data_ranks_that_differ_twice_none_can_be_told_from_the_other() -> None:
    passes = Passes(data=2)
    for number in (0, 1, 2):
        passes.spoil([1], number, ALL)
    assert passes.named == [0, 1]


def test_wrong_sums_name_the_ranks_that_hold_them() -> None:
    assert Passes(data=2).spoil([1], -1, [REDUCED]).named == [1]
    assert Passes().spoil([0], 0, [REDUCED]).named == [0]
    assert Passes(data=2).spoil([0, 1], 1, [REDUCED]).named == [], (
        "over exchanged data they are summed in another order"
    )


def test_a_wrong_norm_names_who_holds_the_gradients_or_else_who_received_it() -> None:
    assert Passes(data=2).spoil([1], -1, [REDUCED]).spoil([0, 1], -1, [PROPOSED]).named == [1]
    assert Passes(data=2).spoil([0], -1, [PROPOSED]).named == [0]


def test_norms_are_compared_within_a_bound() -> None:
    assert _are_close(1.0, 1.0 + 0.9 * BOUND) and not _are_close(1.0, 1.0 + 1.1 * BOUND)
    assert _are_close(0.0, 0.0) and not _are_close(0.0, 1e-9)
    assert _are_close(math.inf, math.nan) and not _are_close(math.inf, 1.0)
