"""Coefficients against numpy and regression, and intervals that count runs and not values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlra_scale.study.correlation import (
    MIN_UNITS,
    correlation,
    pearson,
    ranks,
    spearman_of_changes,
    without_groups,
)

COLUMN = hnp.arrays(np.float64, 12, elements=st.integers(-9, 9).map(float))


def test_equal_values_share_their_rank() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


@settings(deadline=None)
@given(COLUMN, COLUMN)
def test_pearson_is_that_of_numpy(x: np.ndarray, y: np.ndarray) -> None:
    if x.std() == 0 or y.std() == 0:
        assert math.isnan(pearson(x, y))
    else:
        assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9 / 3])
def test_a_constant_has_no_correlation(constant: float) -> None:
    assert math.isnan(pearson(np.full(7, constant), np.arange(7.0)))
    assert math.isnan(pearson(np.array([1.0, 2.0]), np.array([1.0, 2.0])))


def test_a_small_variation_on_a_large_mean_is_no_constant() -> None:
    x = np.arange(8.0)
    assert pearson(1e3 + 1e-6 * x, x) == pytest.approx(1.0, abs=1e-6)


def test_spearman_sees_any_rising_relation() -> None:
    x, units = np.arange(10.0), np.arange(10)
    found = correlation("Spearman", x, np.exp(x), units)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert correlation("Pearson", x, np.exp(x), units).value < 0.9


def test_taking_groups_out_is_the_regression_on_their_indicators() -> None:
    draw = np.random.default_rng(0)
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    values = draw.normal(size=9)
    indicators = np.eye(3)[groups]
    fitted = indicators @ np.linalg.lstsq(indicators, values, rcond=None)[0]
    assert without_groups(values, groups) == pytest.approx(values - fitted, abs=1e-12)


def test_changes_of_series_that_both_rise() -> None:
    draw = np.random.default_rng(1)
    steps, shared, x, y = np.arange(200.0), *draw.normal(size=(3, 200))
    assert np.corrcoef(steps + x, steps + y)[0, 1] > 0.99
    assert abs(spearman_of_changes(np.cumsum(2 + x), np.cumsum(2 + y))) < 0.2, (
        "they have nothing but the rise in common"
    )
    rising = [np.cumsum(8 + shared + 0.1 * noise) for noise in (x, y)]
    assert (np.diff(rising[0]) > 0).all() and spearman_of_changes(*rising) > 0.9
    assert math.isnan(spearman_of_changes(steps, x)), "no change differs from another"


def test_an_association_that_the_learning_rate_makes_is_gone_when_it_is_fixed() -> None:
    draw = np.random.default_rng(2)
    rate = np.repeat([0, 1, 2, 3], 15)
    x, y = rate + 0.3 * draw.normal(size=60), rate + 0.3 * draw.normal(size=60)
    units = np.arange(60)
    for kind in ("Spearman", "Pearson"):
        plain, fixed = correlation(kind, x, y, units), correlation(kind, x, y, units, rate)
        assert plain.is_supported and plain.value > 0.8
        assert not fixed.is_supported and abs(fixed.value) < 0.3


def test_an_association_within_rates_is_found_where_the_rates_hide_it() -> None:
    draw = np.random.default_rng(3)
    rate = np.repeat([0, 1, 2, 3], 15)
    inner = draw.normal(size=60)
    x, y = 3.0 * rate + inner, -3.0 * rate + inner + 0.3 * draw.normal(size=60)
    assert correlation("Pearson", x, y, np.arange(60)).value < -0.5
    fixed = correlation("Pearson", x, y, np.arange(60), rate)
    assert fixed.is_supported and fixed.value > 0.8


def test_values_of_one_run_do_not_count_as_so_many_runs() -> None:
    draw = np.random.default_rng(4)
    x, y, units = draw.normal(size=12), draw.normal(size=12), np.arange(12)
    once = correlation("Pearson", x, y, units)
    often = correlation("Pearson", np.repeat(x, 25), np.repeat(y, 25), np.repeat(units, 25))
    assert (often.n, often.units) == (300, 12)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high), abs=1e-9)
    as_runs = correlation("Pearson", np.repeat(x, 25), np.repeat(y, 25), np.arange(300))
    assert as_runs.high - as_runs.low < 0.5 * (once.high - once.low)


def test_intervals_of_unrelated_values_mostly_include_zero() -> None:
    draw = np.random.default_rng(5)
    found = [correlation("Spearman", draw.normal(size=20), draw.normal(size=20), np.arange(20)) for _ in range(30)]
    # Percentile intervals of 20 units are a little short: 0.90 to 0.95; 30 draws scatter by 0.05.
    assert np.mean([item.is_supported for item in found]) <= 0.2


def test_few_runs_get_no_coefficient() -> None:
    x = np.arange(100.0)
    found = correlation("Pearson", x, x, np.arange(100) % (MIN_UNITS - 1))
    assert math.isnan(found.value) and math.isnan(found.low) and found.units == MIN_UNITS - 1


def test_the_same_data_give_the_same_interval() -> None:
    x, y = np.random.default_rng(6).normal(size=(2, 15))
    assert correlation("Pearson", x, y, np.arange(15)) == correlation("Pearson", x, y, np.arange(15))
