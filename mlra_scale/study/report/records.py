"""What a run recorded. A missing file, a torn line or a wrong value becomes a note or a gap, never an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlra_scale.config import stored_yaml
from mlra_scale.study.results import num_shallow
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.run_reader import Record, is_number, last_start_or_end, read_lines, read_mapping, value_at

Array = npt.NDArray[np.float64]
Keys = str | tuple[str, ...]
"""Where a value is in a line: a dotted path, or the keys themselves if one of them has a dot."""

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
        return value_at(self.config, dotted, default)

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
        last = last_start_or_end(self.events)
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
    run, notes = RunDirectory(path), list[str]()
    return RunRecord(
        path,
        config=read_mapping(run.config, notes, stored_yaml.parse),
        metrics=read_steps(run.metrics, notes),
        rolled_back=read_steps(run.rolled_back, notes, is_optional=True),
        events=read_lines(run.events, notes),
        notes=notes,
    )


def read_steps(path: Path, notes: list[str], is_optional: bool = False) -> list[Record]:
    """Reads the lines that have a step, sorted by it; arguments as for `run_reader.read_lines`."""
    lines = read_lines(path, notes, is_optional)
    return sorted((line for line in lines if is_number(line.get("step"))), key=lambda line: line["step"])


def task_figures(run: RunRecord, section: str) -> list[tuple[str, str]]:
    """Returns what evaluation.tasks has measured: names and their figures, in the order of the record.

    `section` is `tasks`, which has texts, or `harness`.
    """
    found = [record[section] for record in run.metrics if isinstance(record.get(section), dict)]
    pairs = (
        (str(name), str(figure))
        for values in found
        for name, figures in values.items()
        if isinstance(figures, dict)
        for figure in figures
    )
    return list(dict.fromkeys(pairs))


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


def block_values(record: Record, keys: Keys) -> Array | None:
    """Returns a list over blocks as numbers, nan for anything else; None if it was not recorded."""
    values = value_at(record, keys)
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
        value = value_at(record, keys, _MISSING)
        if over_shallow is not None:
            blocks = block_values(record, keys)
            value = _MISSING if blocks is None else float(over_shallow(blocks[: num_shallow(blocks.size)]))
        if value is not _MISSING:
            found[float(record["step"])] = number_or_nan(value)
    return pd.Series(found, dtype=np.float64)
