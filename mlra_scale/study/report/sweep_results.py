"""The output folder of a sweep, read so that a sweep in progress or a torn line is no error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlra_scale.study.report.run_record import Record, is_number, number_or_nan, read_lines, read_mapping

RESULTS, STUDY, PLAN = "results.jsonl", "study.json", "sweep.yaml"
LEARNING_RATE, DEPTH = "optim.lr", "model.num_layers"
_SHORT = {LEARNING_RATE: "learning rate", DEPTH: "depth (blocks)", "model.hidden_size": "width"}


@dataclass(frozen=True)
class Cell:
    """One finished run of a sweep.

    Attributes:
        name: The cell.
        variant: What is compared.
        axes: Where on the sweep's axes it lies.
        seed: Cells that differ in the variant alone are a pair.
        state: done, diverged or failed.
        run: Its run directory.
        values: Everything that was recorded about it.
    """

    name: str
    variant: str
    axes: Mapping[str, Any]
    seed: Any
    state: str
    run: Path
    values: Record

    def value(self, name: str) -> float:
        """Returns a recorded number; nan where there is none. What a run that did not end well has last is none."""
        return number_or_nan(self.values.get(name)) if self.state == "done" else math.nan

    @property
    def initial_loss(self) -> float:
        """The loss at initialization, of every run that came so far."""
        return number_or_nan(self.values.get("initial_loss"))

    @property
    def has_outcome(self) -> bool:
        """Whether it says something about stability: a run that failed for other reasons does not."""
        return self.state in ("done", "diverged")

    def setting(self, *without: str) -> str:
        """Returns its place on the axes, some left out, as a text that is equal for equal places."""
        return setting_text({axis: value for axis, value in self.axes.items() if axis not in without})


@dataclass
class Sweep:
    """A sweep's output folder.

    Attributes:
        path: The folder.
        cells: The finished cells.
        study: Content of study.json; {} where it cannot be read.
        plan: Content of sweep.yaml; {} where it cannot be read.
        notes: What could not be read.
    """

    path: Path
    cells: list[Cell] = field(default_factory=list)
    study: Record = field(default_factory=dict)
    plan: Record = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def variants(self) -> list[str]:
        """The variants that have a finished cell, in the study's order."""
        return _in_order(self.plan.get("variants"), {cell.variant: None for cell in self.cells})

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The values on each axis, in order: of numbers in rising order."""
        found: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            for axis, value in cell.axes.items():
                found.setdefault(axis, {})[_key(value)] = value
        return {axis: _sorted(list(values.values())) for axis, values in found.items()}

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the finished cells."""
        return _sorted(list({_key(cell.seed): cell.seed for cell in self.cells}.values()))

    @property
    def planned(self) -> int | None:
        """How many cells there are to be; None where that is not known."""
        variants, axes, seeds = (self.plan.get(name) for name in ("variants", "axes", "seeds"))
        if not isinstance(variants, Mapping) or not isinstance(seeds, list):
            return None
        values = list(axes.values()) if isinstance(axes, Mapping) else []
        return math.prod([len(variants), len(seeds), *(len(value) for value in values if isinstance(value, list))])

    def in_state(self, state: str) -> list[Cell]:
        """Returns the cells in one state."""
        return [cell for cell in self.cells if cell.state == state]

    def settings(self, *without: str) -> list[str]:
        """Returns all places on the axes, some axes left out, in the order of their values."""
        axes = {axis: values for axis, values in self.axes.items() if axis not in without}

        def place(cell: Cell) -> tuple[int, ...]:
            keys = {axis: [_key(value) for value in values] for axis, values in axes.items()}
            return tuple(keys[axis].index(_key(cell.axes[axis])) if axis in cell.axes else -1 for axis in axes)

        return list({cell.setting(*without): None for cell in sorted(self.cells, key=place)})


def is_sweep(path: Path) -> bool:
    """Returns whether a folder is a sweep's output folder."""
    return any((path / name).is_file() for name in (RESULTS, STUDY, PLAN))


def open_sweep(path: Path) -> Sweep:
    """Reads a sweep's output folder.

    Args:
        path: The folder; none of its files need exist.

    Returns:
        What could be read. Of a cell that is there twice the later line counts.
    """
    sweep = Sweep(path)
    sweep.study = read_mapping(path / STUDY, sweep.notes)
    sweep.plan = read_mapping(path / PLAN, sweep.notes)
    lines = read_lines(path / RESULTS, sweep.notes)
    whole = [line for line in lines if isinstance(line.get("variant"), str) and line.get("state") is not None]
    if len(whole) < len(lines):
        sweep.notes.append(f"{RESULTS}: {len(lines) - len(whole)} line(s) without variant or state are left out.")
    cells = [_cell(line, path) for line in whole]
    sweep.cells = list({cell.name: cell for cell in cells}.values())
    return sweep


def _cell(line: Record, folder: Path) -> Cell:
    axes = line.get("axes") if isinstance(line.get("axes"), Mapping) else {}
    assert isinstance(axes, Mapping)
    name = str(line.get("cell") or f"{line['variant']} {setting_text(axes)} seed {line.get('seed')}")
    run = folder / str(line.get("run") or f"cells/{name}")
    return Cell(name, line["variant"], axes, line.get("seed"), str(line["state"]), run, line)


def setting_text(axes: Mapping[str, Any]) -> str:
    """Returns a place on the axes as text, such as 'depth (blocks) 48, learning rate 0.001'."""
    return ", ".join(f"{axis_name(axis)} {value_text(axes[axis])}" for axis in sorted(axes)) or "the one setting"


def axis_name(axis: str) -> str:
    """Returns what an axis is called: in words where that is shorter."""
    return _SHORT.get(axis, axis)


def value_text(value: Any) -> str:
    """Returns a value of an axis as text: numbers in the shortest way, so that 1e-3 and 0.001 are one."""
    if is_number(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def _key(value: Any) -> str:
    return value_text(value)


def _sorted(values: list[Any]) -> list[Any]:
    return sorted(values) if all(is_number(value) for value in values) else sorted(values, key=_key)


def _in_order(planned: Any, found: Mapping[str, None]) -> list[str]:
    names = list(planned) if isinstance(planned, Mapping) else []
    return list(dict.fromkeys([*(name for name in names if name in found), *found]))
