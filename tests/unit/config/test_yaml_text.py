"""YAML by the rules of version 1.2, and errors with their place."""

import pytest

from mlra_scale.config import yaml_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        (".5", 0.5),
        ("3.", 3.0),
        ("3", 3),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("on", "on"),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'8'", "8"),
        ("[q, k]", ["q", "k"]),
        ("{a: 0.5}", {"a": 0.5}),
        ("=", "="),
        ('"\\ud834\\udf00"', "\U0001d300"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    loaded = yaml_text.load(text)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-3", "010", "true", "null", "~", "", "1:30", "a: b", "# c", "\u00e9", "'", "\n", "-"]
)
def test_text_that_looks_like_something_else_survives(value: str) -> None:
    assert yaml_text.load(yaml_text.dump({"x": value})) == {"x": value}


def test_a_duplicate_key_is_refused_with_both_places() -> None:
    with pytest.raises(ValueError, match="line 4, column 3: key 'steps' is given twice, first on line 2; keep one"):
        yaml_text.load("train:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    with pytest.raises(ValueError, match="key 'a' is given twice"):
        yaml_text.load("{a: 1, a: 1}")


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\t- x", "a: &x 1", "b: *x", "? [1]\n: 2", "1: 2", "!!python/object:x {}", "!!int 1"]
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d+, column \d+: ") as caught:
        yaml_text.load(text)
    assert "\n" not in str(caught.value)


def test_control_characters_are_refused() -> None:
    with pytest.raises(ValueError, match="special characters are not allowed"):
        yaml_text.load("a: \x00")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1, column 4: text holds half of a surrogate pair"):
        yaml_text.load('a: "\\ud834"')


def test_values_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="line 1, column 4: anchors"):
        yaml_text.load("a: &x [*x]")
    with pytest.raises(ValueError, match="nested too deeply"):
        yaml_text.load("[" * 5000)
