"""Reads what runs recorded. A missing file, a torn line or a wrong value becomes a note, never an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlra_scale.config import stored_yaml, yaml_text
from mlra_scale.config.json_text import parse_json
from mlra_scale.study.results import num_shallow
from mlra_scale.training.run_directory import RunDirectory

Record = dict[str, Any]
Array = npt.NDArray[np.float64]
Keys = str | tuple[str, ...]
"""Where a value is in nested mappings: a dotted path, or the keys themselves if one of them has a dot."""

_ENDS = ("finished", "stopped", "failed", "preempted", "interrupted")
_MISSING = object()


@dataclass
class RunRecord:
    """The content of a run directory.

    Attributes:
        path: The directory.
        config: The resolved configuration as plain values; {} if it cannot be read.
        metrics: The lines of metrics.jsonl in the order of their steps.
        rolled_back: The lines that the guard undid, each with the number of its rollback.
        events: The lines of events.jsonl.
        notes: What could not be read.
    """

    path: Path
    config: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)
    rolled_back: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, keys: Keys) -> pd.Series:
        """Returns one measure over steps; see `series`."""
        return series(self.metrics, keys)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """Returns a field of the configuration, or the default if it is missing."""
        return at(self.config, dotted, default)

    def events_named(self, *names: str) -> list[Record]:
        """Returns the events of these names."""
        return [event for event in self.events if event.get("event") in names]

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 without any."""
        return int(max((record["step"] for record in self.metrics), default=0))

    @property
    def state(self) -> str:
        """The state of the run in words, from the last start or end among its events."""
        last = next((e for e in reversed(self.events) if e.get("event") in ("start", *_ENDS)), {})
        event, reason = str(last.get("event", "unknown")), last.get("reason", "no reason recorded")
        if event == "stopped":
            diverged = {3: "loss or gradient norm was not finite", 7: "the guard gave up"}
            causes = [text for code, text in diverged.items() if last.get("exit_code") == code]
            return f"diverged: {causes[0]}" if causes else f"stopped: {reason}"
        if event == "failed":
            return f"failed: {reason}"
        return "in progress, or ended without an event" if event == "start" else event


def open_run(path: Path) -> RunRecord:
    """Reads a run directory, of which any file may be missing."""
    run, record = RunDirectory(path), RunRecord(path)
    record.config = read_mapping(run.config, record.notes, stored_yaml.parse)
    record.metrics = in_steps(read_lines(run.metrics, record.notes))
    record.rolled_back = in_steps(read_lines(run.rolled_back, record.notes, is_optional=True))
    record.events = read_lines(run.events, record.notes)
    return record


def read_metrics(run: Path) -> list[Record]:
    """Reads the metrics of a run directory in the order of their steps; [] if there are none."""
    return in_steps(read_lines(run / "metrics.jsonl", [], is_optional=True))


def read_lines(path: Path, notes: list[str], is_optional: bool = False) -> list[Record]:
    """Reads the objects of a file of JSON lines; other lines are left out.

    Args:
        path: The file.
        notes: Receives a sentence about a file that is missing or lines that are invalid, except the last line: while
            a run is in progress it may be cut short.
        is_optional: Whether a missing file is normal.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        if not (is_optional and isinstance(error, FileNotFoundError)):
            notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return []
    objects, num_bad = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line, path.name, allow_nan=True) if line.strip() else None
        except ValueError:
            num_bad += number < len(lines)
            continue
        if isinstance(value, dict):
            objects.append(value)
        else:
            num_bad += line.strip() != ""
    if num_bad:
        notes.append(f"{path.name}: {num_bad} line(s) are no JSON objects and are left out.")
    return objects


def read_mapping(path: Path, notes: list[str], parse_yaml: Callable[[str], Any] = yaml_text.load) -> Record:
    """Reads a YAML or JSON file that holds one mapping; returns {} and adds a note if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        value = parse_json(text, path.name, allow_nan=True) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return {}
    except ValueError as error:
        reason = f"{error}" if path.suffix == ".json" else f"{path.name}: {error}"  # parse_json names the file
        notes.append(f"{reason}; the file is left out.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no mapping and is left out.")
        return {}
    return value


def in_steps(records: Sequence[Record]) -> list[Record]:
    """Returns the records that have a step, sorted by it."""
    return sorted((record for record in records if is_number(record.get("step"))), key=lambda record: record["step"])


def is_number(value: Any) -> TypeGuard[int | float]:
    """Returns whether a value is a finite number and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number_or_nan(value: Any) -> float:
    """Returns a finite number as a float, and nan for anything else."""
    return float(value) if is_number(value) else math.nan


def log10_or_nan(value: Any) -> float:
    """Returns the decimal logarithm of a positive number, and nan for anything else."""
    return math.log10(value) if is_number(value) and value > 0 else math.nan


def time_text(value: Any) -> str:
    """Returns a recorded time to the second; '' if there is none."""
    return value[:19].replace("T", " ") if isinstance(value, str) else ""


def event_text(event: Record) -> str:
    """Returns the values of an event beside its time, name and step."""
    hidden = {"time", "event", "step"}
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in hidden and value is not None)


def at(mapping: Mapping[str, Any], keys: Keys, default: Any = None) -> Any:
    """Returns the value at these keys, or the default if there is none."""
    value: Any = mapping
    for key in keys.split(".") if isinstance(keys, str) else keys:
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def block_values(record: Record, keys: Keys) -> Array | None:
    """Returns a list over blocks as numbers, nan for anything else; None if it was not recorded."""
    values = at(record, keys)
    return np.array([number_or_nan(value) for value in values]) if isinstance(values, list) and values else None


def series(records: Sequence[Record], keys: Keys, over_shallow: Callable[[Array], Any] | None = None) -> pd.Series:
    """Returns one measure over steps.

    Args:
        records: Lines of metrics.jsonl.
        keys: Where the value is in a line.
        over_shallow: Reduces a list over blocks to one number for the shallow ones; None: the value is a number.

    Returns:
        The values by step; nan at steps where the recorded value is not a finite number.
    """
    found = {}
    for record in records:
        value = at(record, keys, _MISSING)
        if over_shallow is not None:
            blocks = block_values(record, keys)
            value = _MISSING if blocks is None else float(over_shallow(blocks[: num_shallow(blocks.size)]))
        if value is not _MISSING:
            found[float(record["step"])] = number_or_nan(value)
    return pd.Series(found, dtype=np.float64)
