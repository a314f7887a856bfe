"""What the three sweeps say about the hypotheses of README.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from docs.studies.combine.protocol import ARMS, HYPOTHESES, MARGIN, RATES, RATES_DEPTH, SEEDS, Hypothesis
from docs.studies.combine.sweeps import VALIDATION, SweepError, best_rates
from docs.studies.combine.text import OPTIMIZER_ARMS, OPTIMIZERS_FIGURE, as_markdown
from mlra_scale.files import write_atomically
from mlra_scale.study.report import sweep_figures
from mlra_scale.study.report.comparisons import SENSITIVITY, sensitivities
from mlra_scale.study.report.statistics import LEVEL, Mean, holm, mean_of
from mlra_scale.study.report.sweep_record import DEPTH, LEARNING_RATE, MEASURES, SweepRecord, open_sweep

_BY_KEY = {measure.key: measure for measure in MEASURES}
LOGIT, SINGULAR, TEV = (_BY_KEY[key].name for key in ("largest_logit", "largest_qk_singular_value", "tev_mean"))
_ENDED = ("done", "diverged")
LEFT_OUT = "best loss by the other seeds"
"""What README.md first had as the best loss."""
FIGURES = {
    "loss-over-rates.png": "validation_loss",
    "logit-over-rates.png": "largest_logit",
    "singular-value-over-rates.png": "largest_qk_singular_value",
}


@dataclass(frozen=True)
class Sweeps:
    """The three sweeps."""

    screening: SweepRecord
    rates: SweepRecord
    depths: SweepRecord


def report(folders: tuple[Path, Path, Path], output: Path) -> dict[str, Any]:
    """Analyses the three sweeps and writes combine.json, combine.md and the figures.

    Args:
        folders: Output folders of the screening, of all rates, and of other depths.
        output: Where to write; made if need be.

    Returns:
        What combine.json holds.

    Raises:
        SweepError: A sweep cannot be read.
    """
    sweeps = Sweeps(*map(_opened, folders))
    result = analyse(sweeps)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "combine.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(output / "combine.md", as_markdown(result))
    for name, key in FIGURES.items():
        _draw(sweeps.rates, key, output / name)
    shown = sweeps.rates.cells.variant.isin(OPTIMIZER_ARMS)
    _draw(replace(sweeps.rates, cells=sweeps.rates.cells[shown]), "validation_loss", output / OPTIMIZERS_FIGURE)
    return result


def _draw(sweep: SweepRecord, key: str, file: Path) -> None:
    if png := sweep_figures.axis_figure(sweep, LEARNING_RATE, _BY_KEY[key]):
        file.write_bytes(png)


def _opened(folder: Path) -> SweepRecord:
    sweep = open_sweep(folder)
    if sweep.cells.empty:
        raise SweepError(f"{folder} holds no results of a sweep")
    return sweep


def analyse(sweeps: Sweeps) -> dict[str, Any]:
    """Returns the whole analysis as plain values."""
    values = values_of(sweeps)
    differences = {item.name: _difference(item, values) for item in HYPOTHESES}
    directed = [item.name for item in HYPOTHESES if item.sign != "none"]
    first = {item.name: _difference(item, values, LEFT_OUT) for item in HYPOTHESES if item.quantity == "best loss"}
    adjusted = dict(zip(directed, holm([_or_one(differences[name].p) for name in directed]), strict=True))
    return {
        "studies": {name: sweep.study for name, sweep in vars(sweeps).items()},
        "seeds": list(SEEDS),
        "screening": _screening(sweeps.screening),
        "arms": {arm: _arm(arm, sweeps, values) for arm in ARMS},
        "hypotheses": [
            {
                **asdict(item),
                **_plain(differences[item.name]),
                "adjusted_p": _finite(adjusted.get(item.name, math.nan)),
                "verdict": verdict(item, differences[item.name], adjusted.get(item.name, math.nan)),
            }
            for item in HYPOTHESES
        ],
        "left_out": {name: _plain(difference) for name, difference in first.items()},
    }


def values_of(sweeps: Sweeps) -> dict[tuple[str, str, int], pd.Series]:
    """Returns values by seed, by quantity, arm and depth; nan where a run that they need diverged or is missing.

    best loss: validation loss at the rate that is best by the mean of all seeds of which no run is missing; LEFT_OUT:
    at the one that is best by the mean of the other ones of them. sensitivity: of the validation loss over RATES
    (Wortsman et al. 2023). largest logit, largest singular value, TEV: the mean over RATES of the decimal logarithm.
    loss at depth: validation loss of the third sweep.
    """
    found: dict[tuple[str, str, int], pd.Series] = {}
    sensitive = sensitivities(sweeps.rates, VALIDATION)
    for arm in ARMS:
        cells = _of(sweeps.rates, arm)
        own = sensitive[sensitive.variant == arm].set_index("seed")[SENSITIVITY.name] if len(sensitive) else None
        found["sensitivity", arm, RATES_DEPTH] = _by_seed(own)
        ended = cells[cells.state.isin(_ENDED)]
        whole = _table(ended[ended.groupby("seed").rate.transform("nunique") == len(RATES)], VALIDATION)
        found["best loss", arm, RATES_DEPTH] = best_losses(whole)
        found[LEFT_OUT, arm, RATES_DEPTH] = left_out_best_losses(whole)
        logarithms = {"largest logit": _table(cells, LOGIT), "largest singular value": _table(cells, SINGULAR)}
        logarithms["TEV"] = np.log10(_table(cells, TEV))
        for quantity, table in logarithms.items():
            found[quantity, arm, RATES_DEPTH] = table.mean(axis=1, skipna=False)
        cells = _of(sweeps.depths, arm)
        for depth, at_depth in cells.groupby(cells.axis_values.map(lambda axes: axes.get(DEPTH))):
            found["loss at depth", arm, int(depth)] = _by_seed(at_depth.set_index("seed")[VALIDATION])
    return found


def best_losses(losses: pd.DataFrame) -> pd.Series:
    """Returns by seed the loss at the rate whose mean over all seeds is lowest.

    Args:
        losses: A row for each seed and a column for each rate; nan: diverged, infinitely high.
    """
    return losses[losses.fillna(math.inf).mean().idxmin()] if len(losses) else _by_seed(None)


def left_out_best_losses(losses: pd.DataFrame) -> pd.Series:
    """Returns by seed the loss at the rate whose mean over the other seeds is lowest; losses as in `best_losses`."""
    high = losses.fillna(math.inf)
    chosen = {seed: high.drop(index=seed).mean().idxmin() for seed in high.index if len(high) > 1}
    return pd.Series({seed: losses.loc[seed, rate] for seed, rate in chosen.items()}, dtype=np.float64)


def verdict(item: Hypothesis, difference: Mean, adjusted_p: float) -> str:
    """Returns "supported", "the reverse" or "undecided"; "refuted" for a difference where none was expected.

    A sign is supported, or reversed, if the interval excludes 0 and Holm's p over all hypotheses with a sign is below
    1 - LEVEL. No difference is supported if the interval lies within MARGIN, and refuted if it lies outside.
    """
    if not difference.has_spread:
        return "undecided"
    if item.sign == "none":
        if difference.low > -MARGIN and difference.high < MARGIN:
            return "supported"
        return "refuted" if difference.low > MARGIN or difference.high < -MARGIN else "undecided"
    if not (difference.excludes_zero and adjusted_p < 1.0 - LEVEL):
        return "undecided"
    return "supported" if (difference.value < 0.0) == (item.sign == "lower") else "the reverse"


def _difference(
    item: Hypothesis, values: Mapping[tuple[str, str, int], pd.Series], quantity: str | None = None
) -> Mean:
    keys = [(quantity or item.quantity, arm, item.depth) for arm in (item.first, item.second)]
    first, second = (values.get(key, _by_seed(None)) for key in keys)
    return mean_of((first - second).dropna())


def _screening(sweep: SweepRecord) -> dict[str, Any]:
    try:
        best = best_rates(sweep)
    except SweepError:
        best = {}
    arms = {}
    for arm in sweep.variants:
        cells = sweep.cells[sweep.cells.variant == arm]
        losses = {f"{rate:g}": _finite(loss) for rate, loss in zip(cells.rate, cells[VALIDATION], strict=True)}
        arms[arm] = {"best_rate": best.get(arm), "losses": losses}
    return arms


def _arm(arm: str, sweeps: Sweeps, values: Mapping[tuple[str, str, int], pd.Series]) -> dict[str, Any]:
    cells = _of(sweeps.rates, arm)
    by_rate = _table(cells, VALIDATION).mean(skipna=False)
    found = {f"{q}, {d} blocks": _plain(mean_of(v.dropna())) for (q, a, d), v in values.items() if a == arm}
    return {
        "losses": {f"{rate:g}": _finite(loss) for rate, loss in by_rate.items()},
        "diverged": int((cells.state == "diverged").sum()),
        "missing": len(SEEDS) * len(RATES) - int(cells.state.isin(_ENDED).sum()),
        "values": found,
    }


def _of(sweep: SweepRecord, arm: str) -> pd.DataFrame:
    return sweep.cells[sweep.cells.variant == arm].drop_duplicates("cell", keep="last")


def _table(cells: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns a measure with a row for each seed and a column for each rate."""
    return cells.pivot(index="seed", columns="rate", values=measure).astype(np.float64)


def _by_seed(values: pd.Series | None) -> pd.Series:
    return pd.Series(dtype=np.float64) if values is None else values.astype(np.float64)


def _or_one(p: float) -> float:
    return p if math.isfinite(p) else 1.0


def _plain(mean: Mean) -> dict[str, Any]:
    return {name: _finite(value) for name, value in asdict(mean).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
