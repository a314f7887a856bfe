"""Reads the output folder of a sweep: one table of its cells, and the curves of their runs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mlra_scale.study.report.costs import Costs, costs_of
from mlra_scale.study.report.records import log10_or_nan, number_or_nan, read_steps, series
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.run_reader import Record, is_number, parse_any_json, read_lines, read_mapping

RESULTS, STUDY, PLAN = "results.jsonl", "study.json", "sweep.yaml"
LEARNING_RATE, DEPTH = "optim.lr", "model.num_layers"
_AXIS_NAMES = {LEARNING_RATE: "learning rate", DEPTH: "depth (blocks)", "model.hidden_size": "width"}


class Measure(NamedTuple):
    """A value of a finished cell: its name, its unit, its key in results.jsonl, whether its log10 is compared."""

    name: str
    unit: str
    key: str
    is_log: bool = False


MEASURES = (
    Measure("final training loss", "nats per token", "final_loss"),
    Measure("validation loss", "nats per token", "validation_loss"),
    Measure("TEV mean", "unit of the weights", "tev_mean"),
    Measure("TEV spread", "unit of the weights", "tev_std"),
    Measure("log10 of the embedding's gradient variance", "decades", "gradient_variance_embedding", True),
    Measure("log10 of shallow blocks' gradient variance", "decades", "gradient_variance_shallow", True),
    Measure("log10 of the last block's residual variance", "decades", "residual_variance", True),
    Measure("log10 of the largest attention logit", "decades", "largest_logit", True),
    Measure("log10 of the largest singular value of q k^T", "decades", "largest_qk_singular_value", True),
)
FINAL_LOSS, TEV_MEAN, EMBEDDING_VARIANCE = (MEASURES[index].name for index in (0, 2, 4))


class Quantity(NamedTuple):
    """What is drawn over steps: its name, the label of the y axis, and where it is in a line of metrics.jsonl."""

    name: str
    unit: str
    keys: str


LOSS_CURVE = Quantity("training loss", "loss\n(nats per token)", "loss")
TEV_CURVE = Quantity("TEV mean", "TEV mean\n(unit of the weights)", "tev_mean")
VARIANCE_CURVE = Quantity(
    "gradient variance of the embedding", "gradient variance", "gradients.kinds.embedding.gradient_variance"
)
QUANTITIES = (
    LOSS_CURVE,
    TEV_CURVE,
    Quantity("TEV spread", "TEV spread\n(unit of the weights)", "tev_std"),
    VARIANCE_CURVE,
)


class CellCurves(NamedTuple):
    """What the run of one cell recorded over its steps.

    Attributes:
        cell: Its row of `SweepRecord.cells`.
        curves: The finite values by step, by the name of the quantity.
        guarded: Steps at which the guard acted.
        costs: What measuring cost; None if the run has not recorded it.
    """

    cell: Record
    curves: dict[str, pd.Series]
    guarded: list[int]
    costs: Costs | None


@dataclass
class SweepRecord:
    """The content of a sweep's output folder.

    Attributes:
        path: The folder.
        cells: One row per finished cell: cell, variant, axis_values, seed (as text), state (done, diverged, failed),
            run (its directory), setting, rate (learning rate), initial_loss, spikes, line (of results.jsonl), and a
            column for each of MEASURES. Values of runs that are not done are nan, except the initial loss.
        study: Content of study.json; {} if it cannot be read.
        plan: Content of sweep.yaml; {} if it cannot be read.
        notes: What could not be read.
    """

    path: Path
    cells: pd.DataFrame
    study: Record = field(default_factory=dict)
    plan: Record = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def variants(self) -> list[str]:
        """The variants that have a finished cell, in the order of the study."""
        planned = self.plan.get("variants")
        found = list(dict.fromkeys(self.cells.variant))
        names = list(planned) if isinstance(planned, Mapping) else []
        return list(dict.fromkeys([*(name for name in names if name in found), *found]))

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The values on each axis, sorted."""
        found: dict[str, dict[str, Any]] = {}
        for axes in self.cells.axis_values:
            for axis, value in axes.items():
                found.setdefault(axis, {})[value_text(value)] = value
        return {axis: _sorted(values) for axis, values in found.items()}

    @property
    def seeds(self) -> list[str]:
        """The seeds of the finished cells."""
        return sorted(set(self.cells.seed), key=lambda text: (len(text), text))  # numbers by size

    @property
    def num_planned(self) -> int | None:
        """Number of cells of the study; None if it is not known."""
        variants, axes, seeds = (self.plan.get(name) for name in ("variants", "axes", "seeds"))
        if not isinstance(variants, Mapping) or not isinstance(seeds, list):
            return None
        values = list(axes.values()) if isinstance(axes, Mapping) else []
        return math.prod([len(variants), len(seeds), *(len(value) for value in values if isinstance(value, list))])

    def in_state(self, state: str) -> pd.DataFrame:
        """Returns the cells in one state."""
        return self.cells[self.cells.state == state]

    def settings(self, without: str = "") -> list[str]:
        """Returns all settings, an axis left out, in the order of their values."""
        orders = {axis: list(map(value_text, values)) for axis, values in self.axes.items() if axis != without}

        def position(axes: Mapping[str, Any]) -> tuple[int, ...]:
            return tuple(order.index(value_text(axes[axis])) if axis in axes else -1 for axis, order in orders.items())

        return list(dict.fromkeys(setting_text(axes, without) for axes in sorted(self.cells.axis_values, key=position)))


def is_sweep(path: Path) -> bool:
    """Returns whether a folder is the output folder of a sweep."""
    return any((path / name).is_file() for name in (RESULTS, STUDY, PLAN))


def open_sweep(path: Path) -> SweepRecord:
    """Reads the output folder of a sweep, of which any file may be missing; of two lines of a cell the later counts."""
    notes: list[str] = []
    study = read_mapping(path / STUDY, notes, parse_any_json)
    plan = read_mapping(path / PLAN, notes)
    lines = read_lines(path / RESULTS, notes)
    complete = [line for line in lines if isinstance(line.get("variant"), str) and line.get("state") is not None]
    if len(complete) < len(lines):
        notes.append(f"{RESULTS}: {len(lines) - len(complete)} line(s) without variant or state are left out")
    return SweepRecord(path, table_of(complete, path), study, plan, notes)


def read_curves(sweep: SweepRecord) -> list[CellCurves]:
    """Reads the record of every cell once; what cannot be read gives empty curves."""
    found = []
    for cell in sweep.cells.to_dict("records"):
        run = RunDirectory(cell["run"])
        records = read_steps(run.metrics, [], is_optional=True)
        events = read_lines(run.events, [], is_optional=True)
        steps = [event.get("step") for event in events if str(event.get("event")).startswith("guard_")]
        curves = {quantity.name: series(records, quantity.keys).dropna() for quantity in QUANTITIES}
        guarded = [int(step) for step in steps if is_number(step)]
        found.append(CellCurves(cell, curves, guarded, costs_of(records)))
    return found


def table_of(lines: Collection[Record], folder: Path) -> pd.DataFrame:
    """Returns the table of finished cells (SweepRecord.cells).

    Args:
        lines: Lines of results.jsonl.
        folder: What their run directories are relative to.
    """
    rows = {row["cell"]: row for line in lines for row in [_row(line, folder)]}
    columns = "cell variant axis_values seed state run setting rate initial_loss spikes line"
    return pd.DataFrame(rows.values(), columns=[*columns.split(), *(measure.name for measure in MEASURES)])


def _row(line: Record, folder: Path) -> Record:
    axes = line["axes"] if isinstance(line.get("axes"), Mapping) else {}
    seed, is_done = value_text(line.get("seed")), line["state"] == "done"
    name = str(line.get("cell") or f"{line['variant']} {setting_text(axes)} seed {seed}")
    row = {
        "cell": name,
        "variant": line["variant"],
        "axis_values": axes,
        "seed": seed,
        "state": str(line["state"]),
        "run": folder / str(line.get("run") or f"cells/{name}"),
        "setting": setting_text(axes),
        "rate": number_or_nan(axes.get(LEARNING_RATE)),
        "initial_loss": number_or_nan(line.get("initial_loss")),
        "spikes": number_or_nan(line.get("spikes")) if is_done else math.nan,
        "line": line,
    }
    for measure in MEASURES:
        read = log10_or_nan if measure.is_log else number_or_nan
        row[measure.name] = read(line.get(measure.key)) if is_done else math.nan
    return row


def setting_text(axes: Mapping[str, Any], without: str = "") -> str:
    """Returns a setting, a value of every axis, as text, such as 'depth (blocks) 48, learning rate 0.001'."""
    parts = [f"{axis_name(axis)} {value_text(axes[axis])}" for axis in sorted(axes) if axis != without]
    return ", ".join(parts) or "the one setting"


def axis_name(axis: str) -> str:
    """Returns the name of an axis for people."""
    return _AXIS_NAMES.get(axis, axis)


def value_text(value: Any) -> str:
    """Returns a value of an axis as text: numbers in the shortest form, so that 1e-3 and 0.001 are equal."""
    if is_number(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def _sorted(by_text: Mapping[str, Any]) -> list[Any]:
    """Returns values, given by their texts: numbers by size, others by text."""
    return sorted(by_text.values(), key=None if all(map(is_number, by_text.values())) else value_text)
