"""The history of mixes: whatever the changes, every data set's samples come once each and in its own order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.data.blend import BLOCK
from mlra_scale.data.mix import Mix, SampleOrder, continued


def mix(weights: dict[str, float], from_sample: int = 0) -> Mix:
    return Mix(tuple(f"data/{name}" for name in weights), tuple(weights), tuple(weights.values()), from_sample)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Mix, ...]:
    """Mixes of some of five data sets, copies of one data set included, at growing places."""
    history: tuple[Mix, ...] = ()
    place = 0
    for _ in range(draw(st.integers(1, 5))):
        names = tuple(draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=6)))
        weights = tuple(draw(st.floats(0.01, 10.0)) for _ in names)
        history = continued(history, Mix(names, names, weights, place))
        place += draw(st.sampled_from([0, 1, 7, 64, 1000, BLOCK, BLOCK + 13]))
    return history


@settings(max_examples=100, deadline=None)
@given(histories(), st.integers(1, 3000))
def test_no_sample_of_any_data_set_is_repeated_or_left_out(history: tuple[Mix, ...], further: int) -> None:
    order = SampleOrder(history)
    samples = np.arange(history[-1].from_sample + further)
    data_sets, local = order.locate(samples)
    for number in range(order.num_data_sets):
        mine = local[data_sets == number]
        assert (mine == np.arange(len(mine))).all()
    # Stateless: any sample by itself gives the same.
    some = samples[:: max(1, len(samples) // 50)][::-1]
    assert (order.locate(some)[0] == data_sets[some]).all() and (order.locate(some)[1] == local[some]).all()
    # In each span only its own data sets, by its own weights.
    ends = [*(item.from_sample for item in history[1:]), len(samples)]
    for span, (item, end) in enumerate(zip(history, ends, strict=True)):
        found = np.bincount(data_sets[item.from_sample : end], minlength=order.num_data_sets)
        here = SampleOrder(history[: span + 1]).current
        assert found[here].sum() == found.sum()
        shares = np.array(item.pattern.proportions) * (end - item.from_sample)
        assert np.abs(found[here] - shares).max() <= 4


@settings(max_examples=50, deadline=None)
@given(histories(), st.integers(0, 3000))
def test_a_change_leaves_what_was_read_as_it_was(history: tuple[Mix, ...], later: int) -> None:
    place = history[-1].from_sample + later
    longer = continued(history, Mix(("new",), ("new",), (1.0,), max(place, 1)))
    before, after = (SampleOrder(item).locate(np.arange(max(place, 1))) for item in (history, longer))
    assert (before[0] == after[0]).all() and (before[1] == after[1]).all()


def test_a_data_set_that_paused_continues_where_it_stopped() -> None:
    history = continued((), mix({"a": 1, "b": 1}))
    history = continued(history, mix({"a": 1}, 100))
    history = continued(history, mix({"b": 1, "a": 3}, 140))
    order = SampleOrder(history)
    data_sets, local = order.locate(np.arange(180))
    assert order.current == [1, 0]
    assert (data_sets == 1)[100:140].sum() == 0
    assert local[data_sets == 1].tolist() == list(range(60)) and local[data_sets == 0].tolist() == list(range(120))


def test_the_same_mix_makes_no_history() -> None:
    first = continued((), mix({"a": 0.7, "b": 0.3}))
    assert continued(first, mix({"a": 7, "b": 3}, 50)) == first, "weights are relative"
    assert len(continued(first, mix({"b": 0.3, "a": 0.7}, 50))) == 2, "the order decides on the pattern"
    changed = continued(first, mix({"a": 1}, 50))
    assert [item.from_sample for item in changed] == [0, 50]
    assert continued(changed, mix({"a": 0.7, "b": 0.3}, 50)) == first, "nothing was read of the change"
    assert continued(first, mix({"c": 1}, 0)) == (mix({"c": 1}, 0),)


def test_a_mix_survives_json_and_damage_is_refused() -> None:
    item = mix({"a": 0.7, "b": 0.3}, 12)
    assert Mix.from_dict(item.to_dict()) == item
    damages: list[dict[str, object]] = [
        {"weights": [1.0]},
        {"weights": None},
        {"names": []},
        {"weights": [1.0, 0.0]},
        {"from_sample": "x"},
    ]
    for damage in damages:
        with pytest.raises(ValueError):
            Mix.from_dict({**item.to_dict(), **damage})
