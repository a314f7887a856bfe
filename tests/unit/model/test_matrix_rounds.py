"""The deal of matrices among the ranks of a stage."""

from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.model.matrix_rounds import rounds_of, work

SHAPES = [(64, 64), (32, 64), (64, 32), (256, 64), (64, 256)]


def test_work_is_that_of_an_iteration_on_the_smaller_side() -> None:
    assert work((64, 256)) == work((256, 64)) == 2 * 64 * 64 * 256 + 64**3


@given(st.data(), st.lists(st.sampled_from(SHAPES), max_size=40), st.integers(1, 9))
def test_rounds_are_few_and_as_short_as_they_can_be_whoever_holds_what(
    data: st.DataObject, shapes: list[tuple[int, int]], num_ranks: int
) -> None:
    held_by = st.dictionaries(st.integers(0, num_ranks - 1), st.floats(1.0, 9.0), min_size=1)
    holders = data.draw(st.just([]) | st.lists(held_by, min_size=len(shapes), max_size=len(shapes)))
    rounds = rounds_of(shapes, num_ranks, holders)
    assert sorted(index for indices in rounds for index in indices.values()) == list(range(len(shapes)))
    assert all([*indices] == sorted(indices) and {*indices} <= {*range(num_ranks)} for indices in rounds)
    # Sorted by work and cut: no deal into so many rounds has a shorter one.
    in_order = sorted(map(work, shapes), reverse=True)
    longest = [max(work(shapes[index]) for index in indices.values()) for indices in rounds]
    assert longest == in_order[::num_ranks]


@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=40), st.integers(1, 9))
def test_matrices_that_all_ranks_hold_alike_are_dealt_in_order(shapes: list[tuple[int, int]], num_ranks: int) -> None:
    order = sorted(range(len(shapes)), key=lambda index: -work(shapes[index]))
    in_rounds = [order[first : first + num_ranks] for first in range(0, len(order), num_ranks)]
    alike = [dict.fromkeys(range(num_ranks), 5.0) for _ in shapes]
    for holders in ([], alike):
        dealt = rounds_of(shapes, num_ranks, holders)
        assert [{work(shapes[index]) for index in each.values()} for each in dealt] == [
            {work(shapes[index]) for index in each} for each in in_rounds
        ]
    assert rounds_of([(32, 64), (64, 256), (64, 32), (256, 64)], 3) == [{0: 1, 1: 3, 2: 0}, {0: 2}]


def test_matrices_go_to_those_that_hold_them_as_far_as_all_have_as_much_to_do() -> None:
    equal = [(64, 64)] * 4
    assert rounds_of(equal, 2, [{1: 9}, {1: 9}, {0: 9}, {0: 9}]) == [{0: 2, 1: 0}, {0: 3, 1: 1}]
    # Rank 1 holds three of four, and owns two.
    assert rounds_of(equal, 2, [{1: 9}, {1: 9}, {1: 9}, {0: 9}]) == [{0: 3, 1: 0}, {0: 2, 1: 1}]
    # Of the two large ones each rank gets one.
    assert rounds_of([(256, 64), (256, 64), (64, 64), (64, 64)], 2, [{0: 9}] * 4) == [{0: 0, 1: 1}, {0: 2, 1: 3}]
    # Most of it lies on rank 2; of two that hold about as much, the one that owns less.
    assert rounds_of([(64, 64)], 3, [{0: 1, 1: 2, 2: 9}]) == [{2: 0}]
    assert rounds_of(equal, 3, [{0: 9}, {0: 5, 1: 4}, {1: 9}, {2: 9}]) == [{0: 0, 1: 2, 2: 3}, {0: 1}]
    # Those that one rank holds alone come first.
    assert rounds_of(equal[:2], 2, [{0: 5, 1: 4}, {0: 9}]) == [{0: 1, 1: 0}]


def test_the_deal_compares_each_part_a_few_times_however_many_ranks_hold_one() -> None:
    """Every rank makes the whole deal at its start."""

    class Counted(float):
        comparisons = 0

        def __gt__(self, other: float) -> bool:
            Counted.comparisons += 1
            return float(self) > other

    num_ranks, num_matrices = 1024, 8
    holders = [dict.fromkeys(range(num_ranks), Counted(5.0)) for _ in range(num_matrices)]
    assert len(rounds_of([(64, 64)] * num_matrices, num_ranks, holders)) == 1
    assert 0 < Counted.comparisons <= 4 * num_ranks * num_matrices
