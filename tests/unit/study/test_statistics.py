"""Means, adjustment, sensitivity and correlations by hand, and intervals that count runs and not values."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs scipy (the extra report)")

from mlra_scale.study.report.statistics import (
    MIN_RUNS,
    Mean,
    coefficient,
    correlation,
    holm,
    learning_rate_sensitivity,
    mean_of,
    spearman_of_changes,
    without_groups,
)

VALUES = st.lists(st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=2, max_size=12)


def test_a_mean_by_hand() -> None:
    # Differences 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, error sqrt(14/12).
    mean = mean_of([1.0, 2.0, 3.0, 6.0])
    error = math.sqrt(14 / 12)
    assert (mean.n, mean.value) == (4, 3.0)
    assert mean.error == pytest.approx(error, rel=1e-12)
    # 3.182446: a textbook's table of Student's t for 3 degrees of freedom.
    assert (mean.low, mean.high) == pytest.approx((3 - 3.182446 * error, 3 + 3.182446 * error), rel=1e-6)
    # t = 2.777 with 3 degrees of freedom; p from the closed form 1 - 2/pi (theta + sin theta cos theta).
    theta = math.atan(3 / error / math.sqrt(3))
    assert mean.p == pytest.approx(1 - 2 / math.pi * (theta + math.sin(theta) * math.cos(theta)), rel=1e-9)
    assert not mean.excludes_zero


def test_too_few_values_have_no_error() -> None:
    assert mean_of([]).n == 0 and math.isnan(mean_of([]).value)
    one = mean_of([2.0])
    assert (one.n, one.value) == (1, 2.0)
    assert math.isnan(one.error) and math.isnan(one.p) and not one.excludes_zero


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [5.1 - 5.0, 6.1 - 6.0, 7.1 - 7.0]])
def test_values_without_spread_say_nothing_about_their_error(values: list[float]) -> None:
    mean = mean_of(values)
    assert not mean.has_spread and not mean.excludes_zero and math.isnan(mean.p)


@settings(deadline=None)
@given(VALUES, st.floats(-50, 50), st.randoms(use_true_random=False))
def test_pairs_may_be_shifted_swapped_and_shuffled(values: list[float], shift: float, draw: random.Random) -> None:
    second = np.linspace(-1.0, 1.0, len(values))
    first = second + np.array(values)
    plain = mean_of(first - second)
    shared = shift * np.arange(len(values))
    assert _numbers(mean_of((first + shared) - (second + shared))) == pytest.approx(_numbers(plain), abs=1e-7)
    swapped = mean_of(second - first)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-plain.value, -plain.high, -plain.low), abs=1e-9
    )
    order = list(range(len(values)))
    draw.shuffle(order)
    assert _numbers(mean_of(first[order] - second[order])) == pytest.approx(_numbers(plain), abs=1e-9)
    if plain.has_spread and abs(plain.p - 0.05) > 1e-9:
        assert plain.excludes_zero == (plain.p < 0.05)


def _numbers(mean: Mean) -> tuple[float, ...]:
    return mean.value, mean.error, mean.low, mean.high


def test_holm_by_hand() -> None:
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, the last raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.6, 0.5]) == [1.0, 1.0]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    assert min(adjusted) == pytest.approx(min(1.0, len(values) * min(values)))


def test_learning_rate_sensitivity_by_hand() -> None:
    # Capped at the initial loss of 10: 5, 4, 4.5, 10; above the best one: 1, 0, 0.5, 6.
    assert learning_rate_sensitivity([5.0, 4.0, 4.5, math.nan], [10.0] * 4) == pytest.approx(7.5 / 4)
    assert learning_rate_sensitivity([5.0, 4.0, 4.5, 12.0], [10.0] * 4) == pytest.approx(7.5 / 4)
    assert learning_rate_sensitivity([4.0, 4.0], [10.0, 10.0]) == 0.0


def test_a_model_that_always_diverges_is_not_called_insensitive() -> None:
    assert math.isnan(learning_rate_sensitivity([math.nan, 12.0], [10.0, 10.0]))
    assert math.isnan(learning_rate_sensitivity([], []))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9 / 3])
def test_a_constant_has_no_correlation(constant: float) -> None:
    assert math.isnan(coefficient("Pearson", np.full(7, constant), np.arange(7.0)))
    assert math.isnan(coefficient("Pearson", [1.0, 2.0], [1.0, 2.0])), "too few values"
    x = np.arange(8.0)
    assert coefficient("Pearson", 1e3 + 1e-6 * x, x) == pytest.approx(1.0, abs=1e-6), "a small variation is one"


def test_spearman_sees_any_rising_relation() -> None:
    x, runs = np.arange(10.0), np.arange(10)
    found = correlation("Spearman", x, np.exp(x), runs)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert correlation("Pearson", x, np.exp(x), runs).value < 0.9


def test_subtracting_groups_is_the_regression_on_their_indicators() -> None:
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    values = np.random.default_rng(0).normal(size=9)
    indicators = np.eye(3)[groups]
    fitted = indicators @ np.linalg.lstsq(indicators, values, rcond=None)[0]
    assert without_groups(values, groups) == pytest.approx(values - fitted, abs=1e-12)


def test_changes_of_series_that_both_rise() -> None:
    steps, shared, x, y = np.arange(200.0), *np.random.default_rng(1).normal(size=(3, 200))
    assert np.corrcoef(steps + x, steps + y)[0, 1] > 0.99
    assert abs(spearman_of_changes(np.cumsum(2 + x), np.cumsum(2 + y))) < 0.2, "only the trend is common"
    rising = [np.cumsum(8 + shared + 0.1 * noise) for noise in (x, y)]
    assert (np.diff(rising[0]) > 0).all() and spearman_of_changes(*rising) > 0.9
    assert math.isnan(spearman_of_changes(steps, x)), "no change differs from another"


def test_an_association_that_the_learning_rate_makes_is_gone_when_it_is_fixed() -> None:
    draw = np.random.default_rng(2)
    rate = np.repeat([0, 1, 2, 3], 15)
    x, y = rate + 0.3 * draw.normal(size=60), rate + 0.3 * draw.normal(size=60)
    for kind in ("Spearman", "Pearson"):
        plain, fixed = correlation(kind, x, y, np.arange(60)), correlation(kind, x, y, np.arange(60), rate)
        assert plain.is_supported and plain.value > 0.8
        assert not fixed.is_supported and abs(fixed.value) < 0.3


def test_an_association_within_rates_is_found_where_the_rates_hide_it() -> None:
    draw = np.random.default_rng(3)
    rate, inner = np.repeat([0, 1, 2, 3], 15), draw.normal(size=60)
    x, y = 3.0 * rate + inner, -3.0 * rate + inner + 0.3 * draw.normal(size=60)
    assert correlation("Pearson", x, y, np.arange(60)).value < -0.5
    fixed = correlation("Pearson", x, y, np.arange(60), rate)
    assert fixed.is_supported and fixed.value > 0.8


def test_values_of_one_run_do_not_count_as_so_many_runs() -> None:
    draw = np.random.default_rng(4)
    x, y, runs = draw.normal(size=12), draw.normal(size=12), np.arange(12)
    once = correlation("Pearson", x, y, runs)
    assert once == correlation("Pearson", x, y, runs), "the same data give the same interval"
    often = correlation("Pearson", np.repeat(x, 25), np.repeat(y, 25), np.repeat(runs, 25))
    assert (often.n, often.runs) == (300, 12)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high), abs=1e-9)
    as_runs = correlation("Pearson", np.repeat(x, 25), np.repeat(y, 25), np.arange(300))
    assert as_runs.high - as_runs.low < 0.5 * (once.high - once.low)


def test_the_bootstrap_draws_runs_with_replacement_from_a_fixed_seed() -> None:
    x, y = np.random.default_rng(6).normal(size=(2, 15))
    drawn = np.random.default_rng(20240909).integers(15, size=(1000, 15))
    expected = np.quantile([np.corrcoef(x[row], y[row])[0, 1] for row in drawn], [0.025, 0.975])
    found = correlation("Pearson", x, y, np.arange(15))
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-12)


def test_few_runs_get_no_coefficient() -> None:
    x = np.arange(100.0)
    found = correlation("Pearson", x, x, np.arange(100) % (MIN_RUNS - 1))
    assert math.isnan(found.value) and math.isnan(found.low) and found.runs == MIN_RUNS - 1
