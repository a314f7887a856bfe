"""JSON from files that may be damaged or hostile: every fault is a ValueError that names the file.

`json.loads` alone raises RecursionError for deep nesting, keeps the last of two equal keys, reads 1e999 as infinity,
and takes a number with thousands of digits or half of a surrogate pair, which fail later and elsewhere. This module
imports the standard library only.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 1024**2
"""Size up to which a JSON file is read, in bytes; the stored files of this project are far smaller."""

MAX_DEPTH = 64
"""How deeply objects and lists may be nested; the stored files of this project nest less than ten deep."""

_LARGEST_INTEGER = 2**64
_NO_LIMIT = (b"1000000000000000019884624838656", b"Infinity")
"""What transformers writes for "no limit": int(1e30) in tokenizer_config.json; in config.json of models with Mamba
layers "time_step_limit": [0.0, Infinity]."""


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads a regular file whole.

    Raises:
        ValueError: It cannot be read, is no regular file (reading a pipe could wait for ever), or is larger than
            `max_bytes`; the message begins with the path.
    """
    where = printable(str(path))
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{where} is not a regular file")
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise ValueError(f"{where} is larger than {max_bytes} bytes, which is too large for such a file")
    return content


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file of at most `max_bytes` bytes: `read_bytes` and `parse_json`, with the errors of both."""
    return parse_json(read_bytes(path, max_bytes), printable(str(path)))


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON file that must hold an object at its top; as `read_json` otherwise."""
    return _object(read_json(path, max_bytes), path)


def read_foreign_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file of transformers: as `read_json_object`, but "no limit" is read as 0 instead of refused."""
    content = read_bytes(path)
    for text in _NO_LIMIT:
        content = content.replace(text, b"0")
    return _object(parse_json(content, printable(str(path))), path)


def parse_json(content: str | bytes, where: str, allow_nan: bool = False) -> Any:
    """Parses JSON text.

    Args:
        content: The text, or its bytes in UTF-8.
        where: What the error message begins with: the path of the file, with a line number where it has lines.
        allow_nan: Whether NaN and infinities (also numbers such as 1e999) are allowed.

    Returns:
        Plain Python values: no key twice in an object, nested up to MAX_DEPTH, integers of at most 64 bits, text that
        can be encoded in UTF-8.

    Raises:
        ValueError: The text is not such a value; the message begins with `where`.
    """
    number = float if allow_nan else _finite
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_int=_integer, parse_float=number, parse_constant=number
        )
        _check(value)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not valid JSON: {position}: {printable(error.msg)}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    return value


def printable(text: str, max_length: int | None = None) -> str:
    r"""Returns text fit for a terminal: escape sequences, control and direction characters become \x1b, \u202e, ...

    Args:
        text: Text that comes from a file.
        max_length: Longer text is cut in its middle; None: it is not.
    """
    if max_length is not None and len(text) > max_length:
        text = f"{text[: max_length // 2]} ... {text[-(max_length // 2) :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"has the key '{printable(twice, 80)}' twice in one object; keep one of them")
    return values


def _integer(text: str) -> int:
    # Before int(), whose time grows with the square of the number of digits.
    value = int(text) if len(text) <= 21 else _LARGEST_INTEGER
    if abs(value) >= _LARGEST_INTEGER:
        raise ValueError(f"has the integer {printable(text, 40)}, which does not fit 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"has the number {printable(text, 40)}, which is not finite; write a finite number")
    return value


def _check(value: Any) -> None:
    """Checks depth and text of a parsed value, level by level: without recursion."""
    level, depth = [value], 0
    while level:
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, (dict, list)):
                if depth == MAX_DEPTH:
                    raise ValueError(f"is nested more than {MAX_DEPTH} deep")
                following += item
                following += item.values() if isinstance(item, dict) else ()
        level, depth = following, depth + 1


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"has text with half of a surrogate pair: '{printable(text, 80)}'") from None


def _object(value: Any, path: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    names: dict[type, str] = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    found = names.get(type(value), "null")
    raise ValueError(f"{printable(str(path))} must hold a JSON object {{...}}, not {found}")
