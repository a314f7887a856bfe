"""guard.json: the rollbacks of a run, which have to outlive the checkpoints that they lead to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlra_scale.config.json_text import read_json_object
from mlra_scale.files import write_atomically

VERSION = 2
"""Version 1 has no key `version`, and is otherwise the same."""


def write_rollbacks(path: Path, rollbacks: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file at once."""
    write_atomically(path, json.dumps({"version": VERSION, "rollbacks": [*rollbacks]}, indent=1) + "\n")


def read_rollbacks(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Reads the file; a missing one is a run that never went back.

    Raises:
        ValueError: It is none of ours; the message begins with the path.
    """
    if not path.exists():
        return ()
    content = read_json_object(path)
    version, rollbacks = content.get("version", 1), content.get("rollbacks")
    if type(version) is int and version > VERSION:
        raise ValueError(f"{path} has version {version}, this program reads 1 to {VERSION}; use the one that wrote it")
    is_sound = type(version) is int and version >= 1 and isinstance(rollbacks, list)
    if not is_sound or not all(isinstance(item, dict) and _is_rollback(item) for item in rollbacks or ()):
        raise ValueError(f"{path} is no record of the guard; move it away to read all data again")
    return tuple(rollbacks or ())


def _is_rollback(item: Mapping[str, Any]) -> bool:
    numbers = [item.get(key) for key in ("step", "to_step", "skipped_from", "skipped_to")]
    return all(type(number) is int and number >= 0 for number in numbers) and isinstance(item.get("reason"), str)
