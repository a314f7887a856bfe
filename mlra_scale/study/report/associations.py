"""Correlations of TEV, gradient variance and loss over the runs of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mlra_scale.study.report.comparisons import learning_rates
from mlra_scale.study.report.records import log10_or_nan
from mlra_scale.study.report.statistics import (
    KINDS,
    MIN_RUNS,
    Correlation,
    Mean,
    correlation,
    mean_of,
    spearman_of_changes,
)
from mlra_scale.study.report.sweep_record import (
    EMBEDDING_VARIANCE,
    FINAL_LOSS,
    LEARNING_RATE,
    LOSS_CURVE,
    TEV_CURVE,
    TEV_MEAN,
    VARIANCE_CURVE,
    CellCurves,
    SweepRecord,
    axis_name,
    value_text,
)

TEV, VARIANCE, LOSS = "TEV mean", "gradient variance (embedding)", "loss"
PAIRS = ((TEV, VARIANCE), (TEV, LOSS), (VARIANCE, LOSS))
MAX_STEPS = 30
"""Steps per run: neighbouring steps are nearly equal, and a bootstrap over all of them would take minutes."""
_OF_A_CELL = ["cell", "variant", "setting", "rate"]

Fixed = tuple[str, list[str], pd.DataFrame]
"""What is held fixed: in words, as columns, and the table of values."""


class Association(NamedTuple):
    """Two variables, what is held fixed (in words), and Spearman's and Pearson's coefficient."""

    first: str
    second: str
    fixed: str
    found: tuple[Correlation, ...]


def final_values(sweep: SweepRecord) -> pd.DataFrame:
    """Returns the cells that are done, with their final values as TEV, VARIANCE (decimal logarithm) and LOSS."""
    names = {TEV_MEAN: TEV, EMBEDDING_VARIANCE: VARIANCE, FINAL_LOSS: LOSS}
    return sweep.in_state("done").rename(columns=names).reset_index(drop=True)


def values_over_steps(runs: Sequence[CellCurves]) -> pd.DataFrame:
    """Returns the values at up to MAX_STEPS steps of each run that is done, and `step`, where two runs share the step.

    The steps are evenly spread over those at which TEV and gradient variance were measured.
    """
    tables = [pd.DataFrame(columns=["step", TEV, VARIANCE, LOSS, *_OF_A_CELL])]
    for run in runs:
        if run.cell["state"] == "done":
            variance = run.curves[VARIANCE_CURVE.name].map(log10_or_nan)
            values = {TEV: run.curves[TEV_CURVE.name], VARIANCE: variance, LOSS: run.curves[LOSS_CURVE.name]}
            table = pd.DataFrame(values).dropna(subset=[TEV, VARIANCE]).rename_axis("step").reset_index()
            spread = np.linspace(0, len(table) - 1, min(MAX_STEPS, len(table))).round().astype(int)
            tables.append(table.iloc[np.unique(spread)].assign(**{name: run.cell[name] for name in _OF_A_CELL}))
    found = pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)
    return found[found.groupby("step").step.transform("size") > 1].reset_index(drop=True)


def of_finished_runs(sweep: SweepRecord) -> list[Association]:
    """Returns the associations of final values over runs."""
    seen, rates = final_values(sweep), learning_rates(sweep)
    fixed: list[Fixed] = [("nothing", [], seen)]
    if rates:
        fixed.append(("learning rate", ["rate"], seen))
        fixed += [(f"learning rate {value_text(rate)}", [], seen[seen.rate == rate]) for rate in rates]
    if other_axes := [axis_name(axis) for axis in sweep.axes if axis != LEARNING_RATE]:
        words = "every axis" if LEARNING_RATE in sweep.axes else " and ".join(other_axes)
        fixed.append((words, ["setting"], seen))
    if len(sweep.variants) > 1:
        words = "every axis and the variant" if sweep.axes else "the variant"
        fixed.append((words, ["setting", "variant"], seen))
    return _associate(fixed)


def within_steps(sweep: SweepRecord, seen: pd.DataFrame) -> list[Association]:
    """Returns the associations of `values_over_steps`, the step held fixed: all values change during training."""
    fixed: list[Fixed] = [("step", ["step"], seen)]
    if learning_rates(sweep):
        fixed.append(("step and learning rate", ["step", "rate"], seen))
    if len(sweep.variants) > 1:
        fixed.append(("step, every axis and the variant", ["step", "setting", "variant"], seen))
    return _associate(fixed)


def _associate(fixed: Sequence[Fixed]) -> list[Association]:
    """Returns the associations of all pairs of variables, without those that fewer than MIN_RUNS runs have."""
    found = []
    for (first, second), (words, columns, table) in itertools.product(PAIRS, fixed):
        seen = table.dropna(subset=[first, second])
        if seen.cell.nunique() >= MIN_RUNS:
            groups = seen.groupby(columns, dropna=False).ngroup().to_numpy() if columns else None
            x, y, runs = seen[first].to_numpy(), seen[second].to_numpy(), pd.factorize(seen.cell)[0]
            coefficients = tuple(correlation(kind, x, y, runs, groups) for kind in KINDS)
            found.append(Association(first, second, words, coefficients))
    return found


def within_runs(seen: pd.DataFrame) -> Mean:
    """Returns Spearman's coefficient of the changes of TEV and gradient variance in each run, averaged over runs."""
    values = [spearman_of_changes(own[TEV], own[VARIANCE]) for _, own in seen.groupby("cell")]
    return mean_of([value for value in values if not math.isnan(value)])
