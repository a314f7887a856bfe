"""Correlations of TEV, gradient variance and loss over the runs of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mlra_scale.study.report.comparisons import learning_rates
from mlra_scale.study.report.records import Record, at, is_number, log10_or_nan, number_or_nan, read_metrics
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
    TEV_MEAN,
    SweepRecord,
    axis_name,
    value_text,
)

TEV, VARIANCE, LOSS = "TEV mean", "gradient variance (embedding)", "loss"
PAIRS = ((TEV, VARIANCE), (TEV, LOSS), (VARIANCE, LOSS))
MAX_STEPS = 30
"""Steps per run: neighbouring steps are nearly equal, and a bootstrap over all of them would take minutes."""


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


def values_over_steps(sweep: SweepRecord) -> pd.DataFrame:
    """Returns the values at up to MAX_STEPS steps per run, with the column `step`; only steps that two runs share."""
    cells = sweep.in_state("done")[["cell", "variant", "setting", "rate", "run"]]
    rows = [
        {**cell, **values} for cell in cells.to_dict("records") for values in _spread(read_metrics(cell.pop("run")))
    ]
    found = pd.DataFrame(rows, columns=["cell", "variant", "setting", "rate", "step", TEV, VARIANCE, LOSS])
    return found[found.groupby("step").step.transform("size") > 1].reset_index(drop=True)


def _spread(records: Sequence[Record]) -> Iterator[dict[str, float]]:
    """Yields the values of evenly spread steps at which TEV and gradient variance were measured."""
    found = []
    for record in records:
        variance = log10_or_nan(at(record, "gradients.kinds.embedding.gradient_variance"))
        if is_number(tev := record.get("tev_mean")) and not math.isnan(variance):
            loss = number_or_nan(record.get("loss"))
            found.append({"step": int(record["step"]), TEV: float(tev), VARIANCE: variance, LOSS: loss})
    count = min(MAX_STEPS, len(found))
    for index in np.unique(np.linspace(0, max(0, len(found) - 1), count).round().astype(int)):
        yield found[index]


def of_finished_runs(sweep: SweepRecord) -> list[Association]:
    """Returns the associations of final values over runs."""
    seen, rates = final_values(sweep), learning_rates(sweep)
    other_axes = [axis_name(axis) for axis in sweep.axes if axis != LEARNING_RATE]
    rows: list[Association | None] = []
    for pair in PAIRS:
        rows.append(_associate(seen, pair, "nothing"))
        if rates:
            rows.append(_associate(seen, pair, "learning rate", ["rate"]))
            rows += [_associate(seen[seen.rate == rate], pair, f"learning rate {value_text(rate)}") for rate in rates]
        if other_axes:
            names = "every axis" if LEARNING_RATE in sweep.axes else " and ".join(other_axes)
            rows.append(_associate(seen, pair, names, ["setting"]))
        if len(sweep.variants) > 1:
            names = "every axis and the variant" if sweep.axes else "the variant"
            rows.append(_associate(seen, pair, names, ["setting", "variant"]))
    return [row for row in rows if row is not None]


def within_steps(sweep: SweepRecord, seen: pd.DataFrame) -> list[Association]:
    """Returns the associations of `values_over_steps`, the step held fixed: all values change during training."""
    fixed = {"step": ["step"]}
    if learning_rates(sweep):
        fixed["step and learning rate"] = ["step", "rate"]
    if len(sweep.variants) > 1:
        fixed["step, every axis and the variant"] = ["step", "setting", "variant"]
    rows = [_associate(seen, pair, words, columns) for pair in PAIRS for words, columns in fixed.items()]
    return [row for row in rows if row is not None]


def within_runs(seen: pd.DataFrame) -> Mean:
    """Returns Spearman's coefficient of the changes of TEV and gradient variance in each run, averaged over runs."""
    values = [spearman_of_changes(own[TEV], own[VARIANCE]) for _, own in seen.groupby("cell")]
    return mean_of([value for value in values if not math.isnan(value)])


def _associate(
    seen: pd.DataFrame, pair: tuple[str, str], fixed: str, columns: Sequence[str] = ()
) -> Association | None:
    """Returns one association, or None if fewer than MIN_RUNS runs have both values."""
    seen = seen.dropna(subset=[*pair])
    if seen.cell.nunique() < MIN_RUNS:
        return None
    groups = seen.groupby([*columns], dropna=False).ngroup().to_numpy() if columns else None
    x, y, runs = seen[pair[0]].to_numpy(), seen[pair[1]].to_numpy(), pd.factorize(seen.cell)[0]
    return Association(*pair, fixed, tuple(correlation(kind, x, y, runs, groups) for kind in KINDS))
