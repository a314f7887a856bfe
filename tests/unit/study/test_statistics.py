"""Numbers against tables, closed forms and numpy."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.study.statistics import (
    Mean,
    holm,
    learning_rate_sensitivity,
    mean_of,
    t_quantile,
    t_two_sided,
)

VALUES = st.lists(st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("dof", "level", "expected"),
    # Tables of Student's t, as in any textbook.
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (3, 0.95, 3.1824),
        (4, 0.99, 4.6041),
        (10, 0.95, 2.2281),
        (30, 0.9, 1.6973),
    ],
)
def test_quantiles_of_student(dof: int, level: float, expected: float) -> None:
    assert t_quantile(dof, level) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 50.0])
def test_p_values_have_closed_forms_for_few_degrees(t: float) -> None:
    assert t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)
    assert t_two_sided(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)


@pytest.mark.parametrize("dof", [3, 4, 7, 20])
def test_p_values_are_the_integral_of_the_density(dof: int) -> None:
    t = np.linspace(0.0, 2.5, 200_001)
    scale = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
    density = scale * (1 + t * t / dof) ** (-(dof + 1) / 2)
    within = 2 * float(np.trapezoid(density, t))
    assert t_two_sided(2.5, dof) == pytest.approx(1 - within, abs=1e-9)


def test_an_infinite_statistic_has_no_chance() -> None:
    assert t_two_sided(math.inf, 5) == pytest.approx(0.0, abs=1e-15)


def test_a_mean_by_hand() -> None:
    # Differences 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, error sqrt(14/12).
    mean = mean_of([1.0, 2.0, 3.0, 6.0])
    error = math.sqrt(14 / 12)
    assert (mean.n, mean.value) == (4, 3.0)
    assert mean.error == pytest.approx(error, rel=1e-12)
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
def test_values_that_do_not_differ_tell_nothing_about_their_error(values: list[float]) -> None:
    mean = mean_of(values)
    assert not mean.has_spread and not mean.excludes_zero and math.isnan(mean.p)


@given(VALUES)
def test_a_mean_agrees_with_numpy(values: list[float]) -> None:
    mean, array = mean_of(values), np.array(values)
    assert mean.value == pytest.approx(array.mean(), abs=1e-9)
    assert mean.error == pytest.approx(array.std(ddof=1) / math.sqrt(array.size), abs=1e-9)
    assert mean.low <= mean.value <= mean.high


@given(VALUES, st.floats(-50, 50), st.randoms(use_true_random=False))
def test_pairs_may_be_shifted_turned_and_shuffled(values: list[float], shift: float, draw: random.Random) -> None:
    second = np.linspace(-1.0, 1.0, len(values))
    first = second + np.array(values)
    plain = mean_of(first - second)
    shared = shift * np.arange(len(values))
    assert _numbers(mean_of((first + shared) - (second + shared))) == pytest.approx(_numbers(plain), abs=1e-7)
    turned = mean_of(second - first)
    assert (turned.value, turned.low, turned.high) == pytest.approx((-plain.value, -plain.high, -plain.low), abs=1e-9)
    order = list(range(len(values)))
    draw.shuffle(order)
    assert _numbers(mean_of(first[order] - second[order])) == pytest.approx(_numbers(plain), abs=1e-9)


def _numbers(mean: Mean) -> tuple[float, ...]:
    return mean.value, mean.error, mean.low, mean.high


@given(VALUES)
def test_the_interval_and_the_p_value_agree(values: list[float]) -> None:
    mean = mean_of(values)
    if mean.has_spread and abs(mean.p - 0.05) > 1e-9:
        assert mean.excludes_zero == (mean.p < 0.05)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int) -> None:
    draws = np.random.default_rng(n).normal(loc=0.3, size=(4000, n))
    covered = sum(mean.low <= 0.3 <= mean.high for mean in map(mean_of, draws))
    # Binomial: 4 standard errors of a share of 0.95 in 4000.
    assert covered / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_holm_by_hand() -> None:
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, the last raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.6, 0.5]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    assert min(adjusted) == pytest.approx(min(1.0, len(values) * min(values)))


def test_holm_rarely_names_anything_where_nothing_is() -> None:
    p_values = np.random.default_rng(3).uniform(size=(4000, 8))
    wrong = sum(min(holm(row)) < 0.05 for row in p_values)
    # 1 - (1 - 0.05/8)^8 = 0.0489 for independent ones; 4 standard errors.
    assert wrong / 4000 == pytest.approx(0.0489, abs=4 * math.sqrt(0.0489 * 0.9511 / 4000))


def test_learning_rate_sensitivity_by_hand() -> None:
    # Capped at the initial loss of 10: 5, 4, 4.5, 10; above the best one: 1, 0, 0.5, 6.
    assert learning_rate_sensitivity([5.0, 4.0, 4.5, math.nan], [10.0] * 4) == pytest.approx(7.5 / 4)
    assert learning_rate_sensitivity([5.0, 4.0, 4.5, 12.0], [10.0] * 4) == pytest.approx(7.5 / 4)
    assert learning_rate_sensitivity([4.0, 4.0], [10.0, 10.0]) == 0.0


def test_a_model_that_always_diverges_is_not_called_insensitive() -> None:
    assert math.isnan(learning_rate_sensitivity([math.nan, 12.0], [10.0, 10.0]))
    assert math.isnan(learning_rate_sensitivity([], []))


@given(st.lists(st.floats(0, 9), min_size=1, max_size=8), st.floats(0, 5))
def test_learning_rate_sensitivity_does_not_depend_on_the_level(losses: list[float], level: float) -> None:
    initial = [10.0] * len(losses)
    plain = learning_rate_sensitivity(losses, initial)
    raised = learning_rate_sensitivity([loss + level for loss in losses], [10.0 + level] * len(losses))
    assert raised == pytest.approx(plain, abs=1e-9) and plain >= 0
