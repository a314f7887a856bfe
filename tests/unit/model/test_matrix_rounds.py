"""The deal of matrices among the ranks of a stage."""

from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.model.matrix_rounds import rounds_of, work

SHAPES = [(64, 64), (32, 64), (64, 32), (256, 64), (64, 256)]


def test_work_is_that_of_an_iteration_on_the_smaller_side() -> None:
    assert work((64, 256)) == work((256, 64)) == 2 * 64 * 64 * 256 + 64**3


@given(st.lists(st.sampled_from(SHAPES), max_size=40), st.integers(1, 9))
def test_every_matrix_has_one_owner_and_a_round_has_matrices_of_neighbouring_work(
    shapes: list[tuple[int, int]], num_ranks: int
) -> None:
    rounds = rounds_of(shapes, num_ranks)
    assert sorted(index for indices in rounds for index in indices) == list(range(len(shapes)))
    # Full rounds but for the last: no rank owns a matrix more than another, or two in one round.
    assert [len(indices) for indices in rounds[:-1]] == [num_ranks] * (len(rounds) - 1)
    assert all(0 < len(indices) <= num_ranks for indices in rounds)
    in_order = [work(shapes[index]) for indices in rounds for index in indices]
    assert in_order == sorted(in_order, reverse=True)


def test_matrices_of_equal_work_stay_in_order() -> None:
    assert rounds_of([(32, 64), (64, 256), (64, 32), (256, 64)], 3) == [[1, 3, 0], [2]]
