"""The keyed permutation: a bijection, a pure function of its arguments, and random to the eye."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.data.permutation import permute


def order(size: int, seed: int, epoch: int = 0, stream: int = 0) -> np.ndarray:
    return permute(np.arange(size), size, seed, np.full(size, epoch), stream)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(0, 100))
def test_is_a_bijection(size: int, seed: int, epoch: int, stream: int) -> None:
    assert (np.sort(order(size, seed, epoch, stream)) == np.arange(size)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 2**63 - 1), st.data())
def test_every_element_is_computed_by_itself(size: int, seed: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    epochs = np.array(data.draw(st.lists(st.integers(0, 50), min_size=len(places), max_size=len(places))))
    together = permute(places, size, seed, epochs)
    alone = [int(permute(places[i : i + 1], size, seed, epochs[i : i + 1])[0]) for i in range(len(places))]
    assert together.tolist() == alone
    assert together.min() >= 0 and together.max() < size
    pairs = set(zip(places.tolist(), epochs.tolist(), strict=True))
    assert len({(e, v) for e, v in zip(epochs.tolist(), alone, strict=True)}) == len(pairs)


def test_seeds_epochs_and_streams_have_orders_of_their_own() -> None:
    orders = [order(1000, *key) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1 + 2**32, 0, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.01  # chance: 0.001


def test_all_orders_of_a_tiny_set_come_up_equally_often() -> None:
    for size in (2, 3, 4, 5):
        epochs = 40_000
        orders = permute(np.tile(np.arange(size), epochs), size, 7, np.repeat(np.arange(epochs), size))
        codes = orders.reshape(epochs, size) @ size ** np.arange(size)
        counts = np.unique(codes, return_counts=True)[1]
        kinds = math.factorial(size)
        assert len(counts) == kinds
        expected = epochs / kinds
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        freedom = kinds - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom), (size, chi_square)


def test_every_place_gets_every_element_equally_often() -> None:
    for size in (20, 100):
        epochs = 20_000
        places = np.tile([0, size // 2, size - 1], epochs)
        values = permute(places, size, 3, np.repeat(np.arange(epochs), 3)).reshape(epochs, 3)
        for column in values.T:
            counts = np.bincount(column, minlength=size)
            chi_square = float(((counts - epochs / size) ** 2 / (epochs / size)).sum())
            assert chi_square < size - 1 + 5 * math.sqrt(2 * (size - 1))


def test_neighbours_are_torn_apart() -> None:
    for size in (1000, 5000, 100_003):
        shuffled = order(size, 11)
        places = np.arange(size)
        # A uniform permutation moves an element by (n^2 - 1) / 3n on average, standard error about n / sqrt(22.5 n).
        assert abs(np.abs(shuffled - places).mean() / size - 1 / 3) < 5 / math.sqrt(22.5 * size)
        for lag in (1, 2, 16):
            correlation = np.corrcoef(shuffled[:-lag], shuffled[lag:])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(size)
        assert (np.abs(np.diff(shuffled)) == 1).sum() < 15  # expected: 2


def test_the_order_is_frozen() -> None:
    # A run is resumed by its sample count alone: these numbers must never change, on no machine and in no version.
    assert order(10, 1234).tolist() == [9, 2, 8, 1, 0, 3, 6, 7, 5, 4]
    assert order(10, 1234, epoch=1).tolist() == [2, 1, 5, 9, 0, 3, 8, 4, 7, 6]
    assert permute(np.array([0, 1, 10**9]), 10**10, 5, np.array([0, 0, 3]), 2).tolist() == [
        417602783,
        5757162463,
        645810650,
    ]
