"""Data of a resumed run: known by fingerprint, mixed anew only when somebody asked for it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mlra_scale.config import Named
from mlra_scale.data.mix import DataIdentity, Mix
from mlra_scale.training.start.resume_choice import DataComparison, DataHistory, compare_data

NOTHING, BLEND = Named(), Named(frozenset({"data.blend"}))


def identity(
    data_sets: dict[str, float], prints: Sequence[str] = (), validation: str | None = None, tokenizer: str | None = "T"
) -> DataIdentity:
    """Data sets that lie where their names say; their fingerprints are their names unless others are given."""
    names = tuple(data_sets)
    mix = Mix(names, tuple(name * 20 for name in prints or names), tuple(data_sets.values()))
    return DataIdentity(mix, validation, tokenizer, is_blend=len(names) > 1)


def compared(was: DataIdentity, now: DataIdentity, named: Named = NOTHING, consumed: int = 100) -> DataComparison:
    return compare_data(now, DataHistory.of(was, [was.mix]), consumed, named)


def test_the_same_data_may_move() -> None:
    was = identity({"a": 0.7, "b": 0.3})
    result = compared(was, identity({"x": 0.7, "y": 0.3}, "ab"))
    assert result == DataComparison((was.mix,))
    assert compared(was, identity({"x": 7, "y": 3}, "ab"), BLEND) == DataComparison((was.mix,))


def test_a_checkpoint_of_version_1_knows_the_data_by_their_earlier_fingerprints() -> None:
    was, now = identity({"a": 3, "b": 1}, validation="v"), identity({"a": 3, "b": 1}, ["A", "B"], validation="V")
    assert len(compared(was, now).problems) == 3
    now = replace(now, earlier={"a" * 20: "A" * 20, "b" * 20: "B" * 20, "v": "V"})
    result = compared(was, now)
    assert result.mixes == (now.mix,) and result.problems == []
    assert list(map(str, result.changes)) == ["form of the data's fingerprints: 1 -> 2"]
    # In another mix each data set continues where it stopped: it is the same one.
    other = replace(now, mix=replace(now.mix, weights=(1.0, 1.0)))
    mixes = compared(was, other, BLEND).mixes
    assert [mix.fingerprints for mix in mixes] == [now.mix.fingerprints] * 2
    # Once converted, nothing is said any more.
    assert compare_data(now, DataHistory.of(now, result.mixes), 100, NOTHING) == DataComparison((now.mix,))


def test_another_mix_begins_at_the_next_sample() -> None:
    was, now = identity({"a": 1}), identity({"a": 1, "b": 3})
    result = compared(was, now, BLEND, consumed=128)
    assert result.problems == [] and [mix.from_sample for mix in result.mixes] == [0, 128]
    (change,) = result.changes
    assert str(change) == 'data.blend: {"a": 1} -> {"a": 1, "b": 3}'
    again = compare_data(now, DataHistory.of(now, result.mixes), 200, BLEND)
    assert again == DataComparison(result.mixes), "the same command line once more changes nothing"


@pytest.mark.parametrize(
    ("now", "field", "part"),
    [
        (identity({"b": 1}), "data.path", "'data.blend={b: 1}' data.path=null"),
        (identity({"a": 1, "b": 3}), "data.blend (data set 2 of 2)", "has 1 data set(s)"),
        (identity({"a": 1}, tokenizer="U"), "data (tokenizer)", "tokenizer T"),
        (identity({"a": 1}, validation="v"), "data.validation_path", "leave them out"),
    ],
)
def test_data_that_nobody_asked_for_are_refused(now: DataIdentity, field: str, part: str) -> None:
    result = compared(identity({"a": 1}), now)
    (problem,) = result.problems
    assert problem.field == field and part in problem.remedy, problem
    assert len(result.mixes) == 1 and result.changes == []


def test_missing_data_sets_and_other_weights_are_reported() -> None:
    was = identity({"a": 0.5, "b": 0.5})
    (problem,) = compared(was, identity({"a": 0.5})).problems
    assert problem.field == "data set 2" and "reads b" in problem.remedy
    (problem,) = compared(was, identity({"a": 0.6, "b": 0.4})).problems
    assert problem.field == "data.blend" and "[0.5, 0.5], in this order" in problem.remedy
    assert "data.blend={a: 0.6, b: 0.4}" in problem.remedy


def test_data_that_were_replaced_in_place_are_refused_though_named() -> None:
    result = compared(identity({"a": 0.5, "b": 0.5}), identity({"a": 0.5, "b": 0.5}, "ac"), BLEND)
    (problem,) = result.problems
    assert problem.field == "data.blend.b" and "were replaced" in problem.remedy


def test_a_tokenizer_that_is_not_known_is_not_compared() -> None:
    assert compared(identity({"a": 1}, tokenizer=None), identity({"a": 1})).problems == []
    named = compared(identity({"a": 1}), identity({"b": 1}, tokenizer="U"), BLEND)
    assert [problem.field for problem in named.problems] == ["data (tokenizer)"], "other data, yes; another text, no"


@pytest.mark.parametrize(("was", "now"), [("v", None), ("v", "w"), (None, "w")])
def test_validation_data_stay(was: str | None, now: str | None) -> None:
    result = compared(identity({"a": 1}, validation=was), identity({"a": 1}, validation=now), BLEND)
    assert [problem.field for problem in result.problems] == ["data.validation_path"]


def test_the_history_survives_json_and_damage_is_an_error() -> None:
    history = DataHistory.of(identity({"a": 1}, validation="v"), [identity({"a": 1}).mix])
    assert DataHistory.from_dict(history.to_dict()) == history
    damages: list[dict[str, object]] = [{}, {"mixes": None}, {"mixes": [{}], "validation": None, "tokenizer": None}]
    for damage in damages:
        with pytest.raises(ValueError, match="not a"):
            DataHistory.from_dict(damage)
