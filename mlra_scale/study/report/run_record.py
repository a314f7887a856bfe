"""What a run directory holds, read so that a run in progress, a torn line or a missing file is no error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from mlra_scale.config import stored_yaml, yaml_text
from mlra_scale.config.json_text import parse_json
from mlra_scale.study.statistics import num_shallow
from mlra_scale.training.run_directory import RunDirectory

Record = dict[str, Any]
Extract = Callable[[Record], Any]

_ENDS = ("finished", "stopped", "failed", "preempted", "interrupted")


@dataclass(frozen=True)
class Series:
    """One measure over steps.

    Attributes:
        steps: Where it was measured, rising.
        values: What was measured; nan where it was no finite number.
    """

    steps: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.values).any())

    @property
    def finite(self) -> Series:
        """The finite values alone."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


@dataclass
class RunRecord:
    """A run directory's content.

    Attributes:
        path: The directory.
        config: The resolved configuration as plain values; {} where it cannot be read.
        metrics: The record, in rising order of steps.
        rolled_back: What the guard undid, with the number of the rollback.
        events: The event log.
        notes: What could not be read.
    """

    path: Path
    config: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)
    rolled_back: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, extract: Extract) -> Series:
        """Returns one measure over the steps at which it was recorded."""
        return series_of(self.metrics, extract)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """Returns a field of the configuration, or the default where it is not there."""
        return at(self.config, dotted, default)

    def events_named(self, *names: str) -> list[Record]:
        """Returns the events of these names."""
        return [event for event in self.events if event.get("event") in names]

    @property
    def last_step(self) -> int:
        """The newest recorded step; 0 without any."""
        return int(max((record["step"] for record in self.metrics), default=0))

    @property
    def state(self) -> str:
        """How the run stands, in words."""
        last = next((e for e in reversed(self.events) if e.get("event") in ("start", *_ENDS)), {})
        if last.get("event") == "stopped":
            diverged = {3: "loss or gradient norm was no number", 7: "the guard gave up"}
            causes = [text for code, text in diverged.items() if last.get("exit_code") == code]
            return f"diverged: {causes[0]}" if causes else f"stopped: {last.get('reason', 'no reason recorded')}"
        if last.get("event") == "failed":
            return f"failed: {last.get('reason', 'no reason recorded')}"
        event = str(last.get("event", "unknown"))
        return "in progress, or ended without a word" if event == "start" else event


def open_run(path: Path) -> RunRecord:
    """Reads a run directory.

    Args:
        path: The directory; none of its files need exist.

    Returns:
        What could be read.
    """
    run, record = RunDirectory(path), RunRecord(path)
    record.config = read_mapping(run.config, record.notes, stored_yaml.parse)
    record.metrics = in_steps(read_lines(run.metrics, record.notes))
    record.rolled_back = in_steps(read_lines(run.rolled_back, record.notes, is_optional=True))
    record.events = read_lines(run.events, record.notes)
    return record


def read_lines(path: Path, notes: list[str], is_optional: bool = False) -> list[Record]:
    """Reads the objects of a file of JSON lines and leaves out what is none.

    Args:
        path: The file.
        notes: Takes a sentence for a file that is missing or lines that cannot be read. A last line that was cut short
            is normal while a run is at work, and goes unmentioned.
        is_optional: Whether a missing file is normal as well.
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
    """Reads a YAML or JSON file that holds one mapping; {} and a note where that cannot be done.

    Args:
        path: The file.
        notes: Receives the note.
        parse_yaml: Parses the text of a YAML file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        value = parse_json(text, path.name, allow_nan=True) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return {}
    except ValueError as error:
        reason = f"{error}" if path.suffix == ".json" else f"{path.name}: {error}"  # parse_json's names the file
        notes.append(f"{reason}; the file is left out.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no mapping and is left out.")
        return {}
    return value


def in_steps(records: Sequence[Record]) -> list[Record]:
    """Returns the records that have a step, in rising order; several of one step stay as they came."""
    return sorted((record for record in records if is_number(record.get("step"))), key=lambda record: record["step"])


def is_number(value: Any) -> TypeGuard[int | float]:
    """Returns whether a value is a finite number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def moment(value: Any) -> str:
    """Returns a time as it is recorded to the second; '' where there is none."""
    return value[:19].replace("T", " ") if isinstance(value, str) else ""


def number_or_nan(value: Any) -> float:
    """Returns a finite number as a float, and nan for anything else."""
    return float(value) if is_number(value) else math.nan


def at(mapping: Mapping[str, Any], dotted: str, default: Any = None) -> Any:
    """Returns what a dotted path leads to, or the default where there is nothing."""
    value: Any = mapping
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def series_of(records: Sequence[Record], extract: Extract) -> Series:
    """Returns one measure over the records; None where it was not measured, anything but a number is nan."""
    found = [(record["step"], number_or_nan(value)) for record in records if (value := extract(record)) is not None]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return Series(np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64))


def named(dotted: str) -> Extract:
    """Returns what reads one value of a record; a value that was null, no finite number, is nan and not missing."""

    def extract(record: Record) -> Any:
        missing = object()
        value = at(record, dotted, missing)
        return None if value is missing else number_or_nan(value)

    return extract


def quantile_named(level: str) -> Extract:
    """Returns what reads one quantile of TEV: its name has a dot of its own."""

    def extract(record: Record) -> Any:
        quantiles = record.get("tev_quantiles")
        return quantiles.get(level) if isinstance(quantiles, Mapping) else None

    return extract


def over_blocks(dotted: str, record: Record) -> npt.NDArray[np.float64] | None:
    """Returns a list over blocks as numbers, or None where it was not measured."""
    values = at(record, dotted)
    return np.array([number_or_nan(value) for value in values]) if isinstance(values, list) and values else None


def of_shallow_blocks(dotted: str, reduce: Callable[[npt.NDArray[np.float64]], Any]) -> Extract:
    """Returns what reduces a list over blocks to one number for the shallow ones."""

    def extract(record: Record) -> Any:
        values = over_blocks(dotted, record)
        return None if values is None else float(reduce(values[: num_shallow(values.size)]))

    return extract
