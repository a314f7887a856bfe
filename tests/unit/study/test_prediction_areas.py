"""ROC areas against hand and brute force, and what drawing runs anew says about them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.studies.predict.areas import Field, comparable, interval, resampled_counts, roc_area, roc_areas


def field_of(keys: list[int], is_positive: list[bool], units: list[int]) -> Field:
    return comparable(np.array(keys), np.array(is_positive, bool), np.array(units))


def test_against_an_area_computed_by_hand() -> None:
    # 3 against 1, 4, 3: won, lost, tied: 1/2. 5 against all three: 1. Mean: 3/4.
    values = np.array([3.0, 5.0, 1.0, 4.0, 3.0])
    field = field_of([0] * 5, [True, True, False, False, False], list(range(5)))
    assert roc_area(field, values) == 0.75
    assert roc_area(field, -values) == 0.25
    assert roc_area(field, np.zeros(5)) == 0.5


def test_nothing_to_compare_is_no_area_and_no_interval() -> None:
    field = field_of([0, 1], [True, False], [0, 1])
    assert np.isnan(roc_area(field, np.array([1.0, 2.0])))
    assert len(resampled_counts(field, 10, seed=0)) == 0
    assert interval(roc_areas(field, np.array([1.0, 2.0]), resampled_counts(field, 10, seed=0)), 0.95) is None
    assert interval(np.array([np.nan]), 0.95) is None


cases = st.lists(
    st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 5), st.integers(0, 3) | st.none()), min_size=1
)


def area_by_brute_force(windows: list[tuple[int, bool, int, float | None]], counts: list[int]) -> float:
    """Loops over copies of runs, written without a look at the implementation."""
    events: dict[int, list[float]] = {}
    for key, positive, unit, value in windows:
        if not positive or value is None:
            continue
        won = []
        for other_key, other_positive, other_unit, other in windows:
            if other_key == key and not other_positive and other_unit != unit and other is not None:
                won += [1.0 if value > other else 0.5 if value == other else 0.0] * counts[other_unit]
        if won:
            events.setdefault(unit, []).append(sum(won) / len(won))
    means = [sum(placements) / len(placements) for unit, placements in events.items() for _ in range(counts[unit])]
    return sum(means) / len(means) if means else np.nan


@settings(deadline=None)
@given(cases, st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_against_brute_force(windows: list[tuple[int, bool, int, float | None]], counts: list[int]) -> None:
    keys, is_positive, units, values = (list(column) for column in zip(*windows, strict=True))
    field = field_of(keys, is_positive, units)
    array = np.array([np.nan if value is None else value for value in values])
    assert roc_area(field, array) == pytest.approx(area_by_brute_force(windows, [1] * 6), abs=1e-12, nan_ok=True)
    # And with runs that count several times or never. The field numbers only the runs that it needs.
    used = sorted({units[index] for index in [*field.positive, *field.negative]})
    area = roc_areas(field, array, np.array([[counts[unit] for unit in used]], np.float64))[0]
    assert area == pytest.approx(area_by_brute_force(windows, counts), abs=1e-12, nan_ok=True)


def test_resamples_hold_as_many_events_and_controls_as_there_are() -> None:
    field = field_of([0] * 9, [True] * 4 + [False] * 5, list(range(9)))
    counts = resampled_counts(field, 50, seed=1)
    assert counts.shape == (50, 9)
    assert (counts[:, :4].sum(axis=1) == 4).all() and (counts[:, 4:].sum(axis=1) == 5).all()
    assert counts.std(axis=0).min() > 0
    assert np.array_equal(counts, resampled_counts(field, 50, seed=1))


@pytest.mark.parametrize("spread_of_runs", [0.0, 2.0])
def test_intervals_hold_the_truth_about_as_often_as_they_say(spread_of_runs: float) -> None:
    """Of 12 runs with an event and 12 without, 5 windows each at common steps, none of which tells anything.

    Where windows of a run resemble each other, intervals that took them for independent would be too short by sqrt(5).
    """
    held, units, keys = 0, np.repeat(np.arange(24), 5), np.tile(np.arange(5), 24)
    for seed in range(200):
        generator = np.random.default_rng(seed)
        values = spread_of_runs * generator.standard_normal(24)[units] + generator.standard_normal(120)
        field = comparable(keys, units < 12, units)
        limits = interval(roc_areas(field, values, resampled_counts(field, 200, seed=0)), 0.95)
        assert limits is not None
        held += limits[0] <= 0.5 <= limits[1]
    # 190 of 200 are due; the binomial's 3 sigma are 9, and percentile intervals of so few runs are a little short (92
    # to 93 % in 400 sweeps).
    assert 175 <= held <= 199
