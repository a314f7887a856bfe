"""JSON from damaged or hostile files gives one ValueError that names the file, never another exception."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.config.json_text import MAX_DEPTH, parse_json, printable, read_bytes, read_json, read_json_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON: line 1, column 1"),
        (b'{"a": 1', "is not valid JSON: line 1, column 8"),
        (b'{"a": 1}\n{"b": 2}', "is not valid JSON: line 2, column 1"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"\\u001b[2J": 1, "\\u001b[2J": 2}', r"has the key '\x1b[2J' twice"),
        (b"[" * 100_000, f"is nested more than {MAX_DEPTH} deep"),
        (b'{"a":' * 100_000, f"is nested more than {MAX_DEPTH} deep"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"is nested more than {MAX_DEPTH} deep"),
        (b'{"a": NaN}', "has the number NaN, which is not finite"),
        (b"[-Infinity]", "has the number -Infinity, which is not finite"),
        (b"[1e999]", "has the number 1e999, which is not finite"),
        (b"[18446744073709551616]", "has the integer 18446744073709551616, which does not fit 64 bits"),
        (b"[" + b"9" * 100_000 + b"]", "which does not fit 64 bits"),
        (b'["\\ud800"]', r"half of a surrogate pair: '\ud800'"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (b'["\xff"]', "is not UTF-8 text (byte 2)"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text (byte 0)"),
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
    ],
)
def test_a_fault_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_sound_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"a": [1, 2.5, null, true, "\\u00e9\\ud83d\\ude00"], "seed": 18446744073709551615}')
    assert read_json(path) == {"a": [1, 2.5, None, True, "\u00e9\U0001f600"], "seed": 2**64 - 1}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    assert parse_json("[NaN, 1e999, -Infinity]", "x", allow_nan=True)[1:] == [float("inf"), -float("inf")]


def test_what_is_no_file_of_the_right_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing.json cannot be read: No such file"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_json(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_bytes(b" " * 10 + b"1")
    with pytest.raises(ValueError, match="is larger than 10 bytes"):
        read_bytes(tmp_path / "large.json", max_bytes=10)
    assert read_json(tmp_path / "large.json", max_bytes=11) == 1


@pytest.mark.parametrize(("text", "kind"), [("[]", "a list"), ("null", "null"), ("1", "a number"), ('""', "text")])
def test_an_object_is_wanted_at_the_top(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"some.json must hold a JSON object .*, not {kind}"):
        read_json_object(path)


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[2J\r\n\x00\x9b\u202e\u2028\ud800 b\u00e9") == (
        r"a\x1b[2J\r\n\x00\x9b\u202e\u2028\ud800 b" + "\u00e9"
    )
    assert printable("x" * 100, 10) == "xxxxx ... xxxxx"


@given(st.binary(max_size=200) | st.text(alphabet='[]{}":,0123456789eE.-+ntfNaI\\u', max_size=60))
def test_any_bytes_give_a_value_or_the_error(content: bytes | str) -> None:
    try:
        parse_json(content, "some.json")
    except ValueError as error:
        assert str(error).startswith("some.json ")
        assert str(error).isprintable()
