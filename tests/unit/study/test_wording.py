"""Sentences claim no difference that the interval does not support."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs scipy (the extra report)")

from mlra_scale.study.report.comparisons import SENSITIVITY, PairedComparison
from mlra_scale.study.report.statistics import Correlation, holm, mean_of
from mlra_scale.study.report.wording import coefficient_text, correlation_verdict, number, p_text, with_error


def comparison(values: list[float], adjusted_p: float | None = None, comparisons: int = 1) -> PairedComparison:
    mean = mean_of(values)
    p = mean.p if adjusted_p is None else adjusted_p
    return PairedComparison(SENSITIVITY, "a", "b", "s", mean, (), adjusted_p=p, num_adjusted=comparisons)


def text_of(values: list[float], adjusted_p: float | None = None, comparisons: int = 1) -> str:
    return comparison(values, adjusted_p, comparisons).statement.removesuffix(".")


def test_a_difference_is_stated_with_everything_that_supports_it() -> None:
    assert text_of([-0.19, -0.2, -0.21, -0.2], comparisons=12) == (
        "lower by 0.2000 +- 0.0041; the 95 % interval -0.2130 to -0.1870 excludes 0, Holm-adjusted p = 1.9e-5 over "
        "12 comparisons, n = 4"
    )
    assert text_of([0.19, 0.2, 0.21]).startswith(
        "higher by 0.2000 +- 0.0058; the 95 % interval 0.1752 to 0.2248 excludes"
    )


def test_no_difference_is_stated_with_its_error() -> None:
    assert text_of([-0.07, -0.01, -0.01]) == (
        "no difference is supported: -0.030 +- 0.020 (95 % interval -0.116 to 0.056), n = 3"
    )


def test_a_difference_that_is_one_of_many_is_not_named() -> None:
    text = text_of([-0.19, -0.2, -0.21], adjusted_p=0.08, comparisons=60)
    assert text.startswith("no difference is supported: -0.2000 +- 0.0058")
    assert "excludes 0 when taken alone, but Holm-adjusted p = 0.080 over 60 comparisons, n = 3" in text


@pytest.mark.parametrize("values", [[], [-0.2], [-0.2, -0.21]])
def test_fewer_than_three_pairs_make_no_claim(values: list[float]) -> None:
    text = text_of(values)
    assert "no claim is made" in text and "supported" not in text and "lower" not in text
    assert not comparison(values).is_claimable


def test_equal_differences_make_no_claim() -> None:
    assert text_of([0.0] * 5) == "no claim is made: the difference is 0 in each of the 5 pairs, so its error is unknown"
    assert "no claim is made: the difference is 0.100" in text_of([0.1] * 5)
    assert not comparison([0.0] * 5).is_claimable


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), max_size=7), st.integers(1, 40))
def test_lower_and_higher_are_claimed_exactly_where_the_interval_supports_it(values: list[float], others: int) -> None:
    mean = mean_of(values)
    adjusted = holm([mean.p if comparison(values).is_claimable else 1.0, *[0.5] * (others - 1)])[0]
    text = text_of(values, adjusted, others)
    named = text.startswith(("lower", "higher"))
    assert named == comparison(values, adjusted, others).is_supported
    if named:
        assert mean.n >= 3 and (mean.low > 0 or mean.high < 0) and adjusted < 0.05
        assert text.startswith("lower") == (mean.value < 0)
    if mean.n < 3:
        assert "no claim is made" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (1.0, "1.00"),
        (-12.345, "-12.3"),
        (0.001, "0.00100"),
        (4.2e-9, "4.20e-9"),
        (123456.0, "1.23e5"),
        (99999.0, "99999"),
        (math.nan, "-"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_values_are_written_to_the_digits_of_their_error() -> None:
    assert with_error(mean_of([1.0, 1.1, 1.3])) == "1.133 +- 0.088"
    assert with_error(mean_of([1000.0, 3000.0])) == "2000 +- 1000"
    assert with_error(mean_of([1e-9, 2e-9])) == "1.50e-9 +- 5.0e-10"
    assert with_error(mean_of([2.0])) == "2.00"
    assert with_error(mean_of([])) == "-"


def test_p_values_are_not_more_precise_than_they_are() -> None:
    assert [p_text(p) for p in (0.0, 1e-12, 0.034, math.nan)] == ["< 1e-6", "< 1e-6", "= 0.034", "is undefined"]


def test_correlations_are_named_where_their_interval_excludes_zero() -> None:
    def of(value: float, low: float, high: float, runs: int = 20) -> Correlation:
        return Correlation("Spearman", runs, runs, value, low, high)

    nan = math.nan
    assert correlation_verdict(of(0.6, 0.2, 0.8)) == "positive: the interval excludes 0"
    assert correlation_verdict(of(-0.6, -0.8, -0.2)) == "negative: the interval excludes 0"
    assert correlation_verdict(of(0.6, -0.1, 0.8)) == "none supported: the interval includes 0"
    assert correlation_verdict(of(0.6, nan, nan)) == "no claim: no interval could be drawn"
    assert correlation_verdict(of(nan, nan, nan)) == "undefined: one of the two does not vary"
    assert correlation_verdict(of(nan, nan, nan, runs=3)) == "none given: fewer than 5 runs"
    assert coefficient_text(of(0.6, -0.001, 0.8)) == "0.60 (0.00 to 0.80)"
    assert coefficient_text(of(nan, nan, nan)) == "-"
