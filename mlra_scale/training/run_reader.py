"""Reads what a run left behind, however damaged: what cannot be read becomes a note, never an error. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from mlra_scale.config import yaml_text
from mlra_scale.config.json_text import parse_json, printable
from mlra_scale.training.record import lines_from_end

Record = dict[str, Any]

_ENDS = ("finished", "stopped", "failed", "preempted", "interrupted")


def read_lines(path: Path, notes: list[str], is_optional: bool = False) -> list[Record]:
    """Reads the objects of a file of JSON lines; a last line that is torn is left out without a note.

    Args:
        path: The file.
        notes: Receives a sentence about a file that cannot be read, or about lines that are no objects.
        is_optional: Whether a missing file is normal.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        _note_error(path, error, notes, is_optional)
        return []
    found = [_object_in(line) for line in lines if line.strip()]
    objects = [item for item in (*found, _object_in(last)) if item is not None]
    if num_bad := found.count(None):
        notes.append(f"{path.name}: {num_bad} line(s) are no JSON objects and are left out")
    return objects


def last_values(path: Path, keys: Collection[str], notes: list[str]) -> dict[str, int | float]:
    """Returns the last number under each key of a file of JSON lines; their cadences differ.

    Reads backwards, and no more of a long file than that takes, up to a limit. A missing file is normal.

    Args:
        path: The file.
        keys: Keys of its objects.
        notes: As for `read_lines`.
    """
    found: dict[str, int | float] = {}
    missing, num_bad = set(keys), 0
    try:
        with path.open("rb", buffering=0) as file:
            for line in lines_from_end(file):
                # Where one of them is rare, most lines need not be parsed.
                if not line.strip() or (found and not any(f'"{key}"'.encode() in line for key in missing)):
                    continue
                item = _object_in(line)
                num_bad += item is None
                found |= {key: value for key in missing if is_number(value := (item or {}).get(key))}
                if not (missing := missing - set(found)):
                    break
    except OSError as error:
        _note_error(path, error, notes, is_optional=True)
    if num_bad:
        notes.append(f"{path.name}: {num_bad} line(s) are no JSON objects and are left out")
    return found


def read_mapping(
    path: Path, notes: list[str], parse: Callable[[str], Any] = yaml_text.load, is_optional: bool = False
) -> Record:
    """Reads a file that holds one mapping; returns {} and adds a note if it cannot be read.

    Args:
        path: The file.
        notes: As for `read_lines`.
        parse: Returns the content of a text, or raises ValueError.
        is_optional: Whether a missing file is normal.
    """
    try:
        value = parse(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(value, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as error:
        _note_error(path, error, notes, is_optional)
        return {}
    return value


def parse_any_json(text: str) -> Any:
    """Parses JSON with numbers that are not finite; for `read_mapping`."""
    return parse_json(text, "it", allow_nan=True)


def last_start_or_end(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the newest event that is a start or an end of a run; {} without any."""
    return next((event for event in reversed(events) if event.get("event") in ("start", *_ENDS)), {})


def is_number(value: Any) -> TypeGuard[int | float]:
    """Returns whether a value is a finite number and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def value_at(mapping: Mapping[str, Any], keys: str | Sequence[str], default: Any = None) -> Any:
    """Returns a value in nested mappings, or the default if there is none.

    Args:
        mapping: The outermost one.
        keys: A dotted path, or the keys themselves if one of them has a dot.
        default: What is returned if a key is missing.
    """
    value: Any = mapping
    for key in keys.split(".") if isinstance(keys, str) else keys:
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def _object_in(line: bytes) -> Record | None:
    try:
        value = parse_json(line, "the line", allow_nan=True)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _note_error(path: Path, error: OSError | ValueError, notes: list[str], is_optional: bool) -> None:
    if not (is_optional and isinstance(error, FileNotFoundError)):
        reason = error.strerror if isinstance(error, OSError) else printable(str(error), 200)
        notes.append(f"{path.name} cannot be read ({reason})")
