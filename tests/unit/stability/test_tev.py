"""TEV against numpy: whole matrices, and every way of cutting them between ranks."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.stability.moments import Moments, merge_all, row_moments
from mlra_scale.stability.tev import TevRequest, TevStatistics, combine, report, tev_of_matrix

QUANTILES = (0.0, 0.1, 0.5, 0.77, 1.0)


def check(statistics: TevStatistics, matrix: np.ndarray, extremes: int = 0) -> None:
    """Compares with numpy in float64: 1e-12 relative plus 1e-12 of the largest element."""
    matrix = matrix.astype(np.float64)
    close = {"rtol": 1e-12, "atol": 1e-12 * np.abs(matrix).max()}
    tev = matrix.std(axis=1)
    assert statistics.num_tokens == len(matrix)
    np.testing.assert_allclose(statistics.mean, tev.mean(), **close)
    np.testing.assert_allclose(statistics.std, tev.std(), **close)
    for q, value in statistics.quantiles.items():
        np.testing.assert_allclose(value, np.quantile(tev, q), **close)
    np.testing.assert_allclose(statistics.mean_embedding_norm, np.linalg.norm(matrix.mean(axis=0)), **close)
    np.testing.assert_allclose(statistics.mean_row_rms, np.sqrt((matrix**2).mean(axis=1)).mean(), **close)
    assert len(statistics.highest) == len(statistics.lowest) == min(extremes, len(matrix))
    for listed, expected in ((statistics.highest, np.sort(tev)[::-1]), (statistics.lowest, np.sort(tev))):
        np.testing.assert_allclose([value for _, value in listed], expected[: len(listed)], **close)
        np.testing.assert_allclose([tev[token] for token, _ in listed], expected[: len(listed)], **close)


def random_matrix(rows: int, columns: int, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (mean + generator.standard_normal((rows, columns)) * generator.uniform(0.5, 2, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (61, 24), (1000, 768)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
def test_matrix_equals_numpy(shape: tuple[int, int], mean: float) -> None:
    matrix = random_matrix(*shape, mean=mean)
    check(tev_of_matrix(matrix, quantiles=QUANTILES, extremes=5), matrix, extremes=5)


def test_types_are_read_as_they_are_and_never_written() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        matrix = torch.from_numpy(random_matrix(30, 17, mean=2.0)).to(dtype)
        before = matrix.clone()
        check(tev_of_matrix(matrix), matrix.double().numpy())
        assert torch.equal(matrix, before)


def test_vocabulary_of_gpt2_with_padding() -> None:
    matrix: np.ndarray = np.zeros((50304, 64), dtype=np.float32)
    matrix[:50257] = random_matrix(50257, 64, mean=0.1)
    matrix[50257:] = 1e6
    check(tev_of_matrix(matrix, num_rows=50257, extremes=3), matrix[:50257], extremes=3)


@pytest.mark.parametrize("value", [0.1, -3.7, 1e4, 1e-30, 3.3e38])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_rows_have_exactly_no_variability(value: float, dtype: type) -> None:
    matrix: np.ndarray = np.full((5, 769), value, dtype=dtype)
    statistics = tev_of_matrix(matrix, extremes=1)
    assert statistics.mean == statistics.std == statistics.lowest[0][1] == statistics.highest[0][1] == 0.0
    assert set(statistics.quantiles.values()) == {0.0}
    # And in pieces: every element of the matrix on a rank of its own boundary.
    request = TevRequest(5, 769)
    assert measure_cut(matrix, request, [100, 769, 1600, 1601, 3000]).mean == 0.0


def test_one_spread_row_among_constant_rows_of_a_matrix_that_is_not_contiguous() -> None:
    matrix = np.full((9, 32), 7.25, dtype=np.float32)
    matrix[4, 3] += 1
    statistics = tev_of_matrix(torch.from_numpy(matrix.T.copy()).T, extremes=2)
    assert statistics.highest[0][0] == 4 and statistics.highest[1][1] == 0.0
    assert statistics.lowest == [(0, 0.0), (1, 0.0)]
    check(statistics, matrix, extremes=2)


def test_what_is_no_embedding_is_refused() -> None:
    for matrix in (np.zeros(4), np.zeros((2, 3), dtype=int), np.zeros((0, 3)), np.zeros((3, 0))):
        with pytest.raises(ValueError, match="matrix"):
            tev_of_matrix(matrix)
    with pytest.raises(ValueError, match="real tokens is 4; use 1 to 3"):
        tev_of_matrix(np.ones((3, 3)), num_rows=4)


def test_row_moments_of_a_row_with_a_large_mean_lose_nothing() -> None:
    generator = np.random.default_rng(0)
    # Integers, so that the truth is known exactly: the deviations alone have the same spread.
    deviations = generator.integers(-5, 6, (50, 96)).astype(np.float64)
    mean, std = row_moments(torch.from_numpy(deviations + 2.0**40))
    np.testing.assert_allclose(std, deviations.std(axis=1), rtol=1e-14)
    np.testing.assert_allclose(mean - 2.0**40, deviations.mean(axis=1), atol=2.0**-12)


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=9), min_size=1, max_size=9))
def test_merged_moments_equal_those_of_all_numbers(sets: list[list[float]]) -> None:
    merged = merge_all(Moments.of(len(s), float(np.mean(s)), float(np.std(s))) if s else Moments() for s in sets)
    numbers = np.array([number for s in sets for number in s])
    assert merged.count == len(numbers)
    if len(numbers):
        largest = np.abs(numbers).max()
        np.testing.assert_allclose(merged.mean, numbers.mean(), rtol=1e-12, atol=1e-13 * largest)
        # The mean square keeps its digits; its root near zero does not.
        np.testing.assert_allclose(merged.std**2, numbers.var(), rtol=1e-12, atol=1e-13 * largest**2)
    else:
        assert math.isnan(merged.std)


def measure_cut(matrix: np.ndarray, request: TevRequest, cuts: list[int]) -> TevStatistics:
    """What the ranks would compute together if the flat matrix were cut at these places, one rank per part."""
    flat = torch.from_numpy(matrix).flatten()
    edges = [0, *sorted(cuts), flat.numel()]
    return measure_ranks([[(low, flat[low:high])] for low, high in itertools.pairwise(edges)], request)


def measure_ranks(ranks: list[list[tuple[int, torch.Tensor]]], request: TevRequest) -> TevStatistics:
    reports = [report(request, parts, torch.device("cpu")) for parts in ranks]
    longest = max(gathered.numel() for gathered, _ in reports)
    padded = [np.pad(gathered.numpy(), (0, longest - gathered.numel())) for gathered, _ in reports]
    return combine(request, padded, np.sum([summed.numpy() for _, summed in reports], axis=0))


@dataclass
class Case:
    matrix: np.ndarray
    request: TevRequest
    ranks: list[list[tuple[int, torch.Tensor]]]


@st.composite
def fragmentations(draw: st.DrawFn) -> Case:
    """A padded matrix, cut anywhere, its parts dealt out to any number of ranks in any order."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    padding = draw(st.integers(0, 4))
    mean = draw(st.sampled_from([0.0, 1.0, -1e4]))
    matrix = random_matrix(rows + padding, columns, mean=mean, seed=draw(st.integers(0, 9)))
    for row in draw(st.sets(st.integers(0, rows - 1), max_size=2)):
        matrix[row] = matrix[row, 0]
    matrix[rows:] = draw(st.sampled_from([0.0, 1e9]))
    cuts = sorted(draw(st.sets(st.integers(0, matrix.size), max_size=12)))
    num_ranks = draw(st.integers(1, 6))
    flat, edges = torch.from_numpy(matrix).flatten(), [0, *cuts, matrix.size]
    ranks: list[list[tuple[int, torch.Tensor]]] = [[] for _ in range(num_ranks)]
    for low, high in draw(st.permutations(list(itertools.pairwise(edges)))):
        ranks[draw(st.integers(0, num_ranks - 1))].append((low, flat[low:high]))
    quantiles = draw(st.sampled_from([(), QUANTILES]))
    return Case(matrix, TevRequest(rows, columns, quantiles, draw(st.integers(0, 14))), ranks)


@settings(max_examples=300, deadline=None)
@given(fragmentations())
def test_any_fragmentation_equals_numpy(case: Case) -> None:
    statistics = measure_ranks(case.ranks, case.request)
    check(statistics, case.matrix[: case.request.num_tokens], case.request.extremes)
    constant = (case.matrix == case.matrix[:, :1]).all(axis=1)[: case.request.num_tokens]
    exact = dict(statistics.lowest)
    assert all(value == 0.0 for token, value in exact.items() if constant[token])


def test_rows_that_span_many_ranks() -> None:
    matrix = random_matrix(3, 1000, mean=10.0)
    cuts = [1, 400, 500, 999, 1000, 1001, 1002, 2100, 2101, 2500]
    check(measure_cut(matrix, TevRequest(3, 1000, QUANTILES, 1), cuts), matrix, extremes=1)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(50, 16)
    expected = tev_of_matrix(matrix, extremes=4)
    monkeypatch.setattr("mlra_scale.stability.moments.CPU_CHUNK", 40)
    chunked = tev_of_matrix(matrix, extremes=4)
    assert (chunked.mean, chunked.std, chunked.highest) == (expected.mean, expected.std, expected.highest)


def test_gaps_and_overlaps_are_noticed() -> None:
    matrix = torch.from_numpy(random_matrix(6, 10)).flatten()
    request = TevRequest(6, 10)
    with pytest.raises(AssertionError, match="5 of 6 rows"):
        measure_ranks([[(0, matrix[:30])], [(40, matrix[40:])]], request)
    with pytest.raises(AssertionError, match="row 3 has 5 of 10"):
        measure_ranks([[(0, matrix[:35])], [(40, matrix[40:])]], request)
    with pytest.raises(AssertionError, match="7 of 6 rows"):
        measure_ranks([[(0, matrix[:40])], [(30, matrix[30:])]], request)
