"""Does TEV go with gradient variance, and either of them with the loss? Over the runs of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlra_scale.study.correlation import KINDS, MIN_UNITS, Correlation, correlation, spearman_of_changes
from mlra_scale.study.report.run_record import Record, at, in_steps, is_number, read_lines
from mlra_scale.study.report.sweep_results import LEARNING_RATE, Cell, Sweep, axis_name, value_text
from mlra_scale.study.statistics import Mean, mean_of

TEV, VARIANCE, LOSS = "TEV mean", "gradient variance (embedding)", "loss"
PAIRS = ((TEV, VARIANCE), (TEV, LOSS), (VARIANCE, LOSS))
MAX_STEPS = 30
"""Of one run: neighbouring steps tell nearly the same, and a bootstrap over all of them would take minutes."""


@dataclass(frozen=True)
class Observations:
    """TEV, gradient variance (as its decimal logarithm) and loss, seen together.

    Attributes:
        columns: By variable, one value per observation; nan where it was not measured.
        units: The number of the cell that each comes from.
        rates: The learning rate.
        settings: The number of the place on all axes.
        variants: The number of the variant.
        steps: The step, 0 for values of finished runs.
    """

    columns: dict[str, npt.NDArray[np.float64]]
    units: npt.NDArray[np.int64]
    rates: npt.NDArray[np.float64]
    settings: npt.NDArray[np.int64]
    variants: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]

    def chosen(self, kept: npt.NDArray[np.bool_]) -> Observations:
        """Returns some of the observations."""
        columns = {name: values[kept] for name, values in self.columns.items()}
        return Observations(
            columns,
            self.units[kept],
            self.rates[kept],
            self.settings[kept],
            self.variants[kept],
            self.steps[kept],
        )


@dataclass(frozen=True)
class Association:
    """One row: two variables, what is held fixed, and both coefficients.

    Attributes:
        first: A variable.
        second: The other.
        fixed: What is held fixed, in words.
        found: Spearman's and Pearson's coefficient.
    """

    first: str
    second: str
    fixed: str
    found: tuple[Correlation, ...]


class Associations:
    """All coefficients of a sweep."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._done = sweep.in_state("done")
        settings = {setting: number for number, setting in enumerate(sweep.settings())}
        self._setting_of = [settings[cell.setting()] for cell in self._done]
        self._rates = [value for value in sweep.axes.get(LEARNING_RATE, []) if is_number(value)]

    @property
    def num_left_out(self) -> int:
        """Cells that did not end well and so have no final value."""
        return len(self._sweep.cells) - len(self._done)

    @cached_property
    def final(self) -> Observations:
        """The last values of every run that ended well."""
        return self._gather([(cell, 0, _final_values(cell)) for cell in self._done])

    @cached_property
    def over_steps(self) -> Observations:
        """What was measured in one step of a run; only steps at which two runs were measured."""
        rows = [(cell, step, values) for cell in self._done for step, values in _values_over_steps(cell)]
        found = self._gather(rows)
        _, inverse, counts = np.unique(found.steps, return_inverse=True, return_counts=True)
        return found.chosen(counts[inverse] > 1)

    def _gather(self, rows: Sequence[tuple[Cell, int, tuple[float, float, float]]]) -> Observations:
        number_of = {cell.name: number for number, cell in enumerate(self._done)}
        numbers = np.array([number_of[cell.name] for cell, _, _ in rows], dtype=np.int64)
        values = np.array([found for _, _, found in rows], dtype=np.float64).reshape(-1, 3)
        rates = [cell.axes.get(LEARNING_RATE) for cell, _, _ in rows]
        return Observations(
            dict(zip((TEV, VARIANCE, LOSS), values.T, strict=True)),
            numbers,
            np.array([float(rate) if is_number(rate) else math.nan for rate in rates], dtype=np.float64),
            np.array([self._setting_of[number] for number in numbers], dtype=np.int64),
            np.array([self._sweep.variants.index(cell.variant) for cell, _, _ in rows], dtype=np.int64),
            np.array([step for _, step, _ in rows], dtype=np.int64),
        )

    def of_finished_runs(self) -> list[Association]:
        """Returns the associations of last values over runs."""
        return [row for pair in PAIRS for row in self._rows(self.final, *pair)]

    def within_steps(self) -> list[Association]:
        """Returns the associations over steps, the step itself taken out: all of them change as training goes on."""
        found = self.over_steps
        rows = []
        for first, second in PAIRS:
            rows.append(_row(found, first, second, "step", found.steps))
            if len(self._rates) > 1:
                both = _joint(found.steps, found.rates)
                rows.append(_row(found, first, second, "step and learning rate", both))
            if len(self._sweep.variants) > 1:
                everything = _joint(found.steps, found.settings, found.variants)
                rows.append(_row(found, first, second, "step, every axis and the variant", everything))
        return [row for row in rows if row is not None]

    def _rows(self, seen: Observations, first: str, second: str) -> Iterator[Association]:
        rows = [_row(seen, first, second, "nothing", None)]
        if len(self._rates) > 1:
            rows.append(_row(seen, first, second, "learning rate", _joint(seen.rates)))
            for rate in self._rates:
                fixed = f"learning rate {value_text(rate)}"
                rows.append(_row(seen.chosen(seen.rates == rate), first, second, fixed, None))
        others = [axis_name(axis) for axis in self._sweep.axes if axis != LEARNING_RATE]
        if others:
            names = "every axis" if self._rates else " and ".join(others)
            rows.append(_row(seen, first, second, names, seen.settings))
        if len(self._sweep.variants) > 1:
            names = "every axis and the variant" if self._sweep.axes else "the variant"
            rows.append(_row(seen, first, second, names, _joint(seen.settings, seen.variants)))
        yield from (row for row in rows if row is not None)

    def within_runs(self) -> Mean:
        """Correlates the changes of TEV and of gradient variance from one measurement to the next.

        Returns:
            Spearman's coefficient of each run, averaged over runs.
        """
        found, values = self.over_steps, []
        for unit in np.unique(found.units):
            own = found.chosen((found.units == unit) & np.isfinite(found.columns[TEV] + found.columns[VARIANCE]))
            value = spearman_of_changes(own.columns[TEV], own.columns[VARIANCE])
            values += [] if math.isnan(value) else [value]
        return mean_of(values)


def _row(
    seen: Observations, first: str, second: str, fixed: str, groups: npt.NDArray[np.int64] | None
) -> Association | None:
    """Returns one row, or None where not even MIN_UNITS runs have both values, whatever is held fixed."""
    kept = np.isfinite(seen.columns[first]) & np.isfinite(seen.columns[second])
    if np.unique(seen.units[kept]).size < MIN_UNITS:
        return None
    groups = None if groups is None else groups[kept]
    x, y, units = seen.columns[first][kept], seen.columns[second][kept], seen.units[kept]
    return Association(first, second, fixed, tuple(correlation(kind, x, y, units, groups) for kind in KINDS))


def _joint(*labels: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Returns one number per combination of labels; nan is a label like others."""
    numbers = [np.unique(label, return_inverse=True)[1] for label in labels]
    return np.unique(np.stack(numbers, axis=1), axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def _log10(value: object) -> float:
    return math.log10(value) if is_number(value) and value > 0 else math.nan


def _final_values(cell: Cell) -> tuple[float, float, float]:
    return cell.value("tev_mean"), _log10(cell.values.get("gradient_variance_embedding")), cell.value("final_loss")


def _values_over_steps(cell: Cell) -> list[tuple[int, tuple[float, float, float]]]:
    """TEV, log10 gradient variance and loss of the steps at which the first two were measured, MAX_STEPS of them."""
    records = in_steps(read_lines(cell.run / "metrics.jsonl", [], is_optional=True))
    found = [(int(record["step"]), values) for record in records if (values := _values_of(record)) is not None]
    if len(found) <= MAX_STEPS:
        return found
    return [found[index] for index in np.unique(np.linspace(0, len(found) - 1, MAX_STEPS).round().astype(int))]


def _values_of(record: Record) -> tuple[float, float, float] | None:
    tev, loss = record.get("tev_mean"), record.get("loss")
    variance = _log10(at(record, "gradients.kinds.embedding.gradient_variance"))
    if not is_number(tev) or math.isnan(variance):
        return None
    return float(tev), variance, float(loss) if is_number(loss) else math.nan
