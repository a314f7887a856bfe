"""The report of several runs: what differs between them, their results side by side, and their curves in one figure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlra_scale.config import Config, ConfigError
from mlra_scale.study.report.page import Samples, write_report
from mlra_scale.study.report.records import RunRecord, open_run
from mlra_scale.study.report.runs_figure import overlay_figure
from mlra_scale.study.report.wording import number
from mlra_scale.training.resume import flat

_OF_THE_RECORD = ("wandb.", "tensorboard.", "profile.")
"""Fields whose difference is none of the runs."""
_UNKNOWN = "-"


def report_runs(paths: Sequence[Path], output: Path, samples: Samples | None = None) -> list[Path]:
    """Writes the report of several runs, which may be in progress; returns the paths of page and images.

    Args:
        paths: The run directories, of different names (`names_of`).
        output: The folder to write to.
        samples: Text by prompt and name of a run.
    """
    runs = dict(zip(names_of(paths), map(open_run, paths), strict=True))
    figure, axis = overlay_figure(runs)
    return write_report(
        output,
        "runs.html",
        {"runs.png": figure},
        title=f"Runs {', '.join(runs)}" if len(runs) <= 4 else f"{len(runs)} runs",
        lead="One run each: differences as small as those between two seeds say nothing. Claims need a sweep.",
        names=list(runs),
        results=list(_results(runs)),
        differences=differences(runs),
        figure=figure,
        alternative=f"Curves of {', '.join(runs)} over {axis}; the table above has their last values.",
        axis=axis,
        samples=samples or {},
        notes=[f"{name}: {note}" for name, run in runs.items() for note in run.notes],
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """Returns a name for each path: its folder's or, where two of these are equal, the path below what all share."""
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        common = os.path.commonpath(resolved)
        names = [os.path.relpath(path, common) for path in resolved]
    return names


def differences(runs: Mapping[str, RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns each field of the configuration that is not the same in all runs, with its value in each.

    A run whose configuration cannot be read is compared with none.
    """
    fields = [flat(run.config) for run in runs.values()]
    names = dict.fromkeys(name for values in fields for name in values if not name.startswith(_OF_THE_RECORD))
    rows = [(name, [_text(values.get(name, _UNKNOWN)) for values in fields]) for name in names]
    return [
        (name, texts)
        for name, texts in rows
        if len({text for text, values in zip(texts, fields, strict=True) if values}) > 1
    ]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _results(runs: Mapping[str, RunRecord]) -> Iterator[tuple[str, list[str], str]]:
    """Yields the rows of the table of results, each with the unit; a row that no run has is left out."""
    common = _last_common_evaluation(list(runs.values()))
    for name, unit, of in (
        ("state", "", lambda run: run.state),
        ("steps", "", lambda run: f"{run.last_step} of {run.setting('train.steps', '?')}"),
        ("tokens", "", lambda run: _count(run.series("consumed_tokens").max())),
        ("parameters", "", _parameters),
        ("training loss, last", "nats per token", lambda run: _last(run, "loss")),
        ("training loss, mean of the last tenth", "nats per token", _last_tenth),
        ("validation loss, last", "nats per token", lambda run: _last(run, "validation_loss")),
        (
            f"validation loss at step {common}, the last that all have",
            "nats per token",
            lambda run: _at(run, "validation_loss", common),
        ),
        ("TEV mean, last", "unit of the weights", lambda run: _last(run, "tev_mean")),
        ("tokens per second, median", "", lambda run: _count(_after_first(run, "tokens_per_second").median())),
        ("MFU, median", "%", lambda run: number(100 * _after_first(run, "mfu").median())),
        ("peak memory of a device", "GiB", lambda run: number(run.series("memory_gib").max())),
        ("time of all steps", "s", lambda run: number(_seconds(run))),
    ):
        texts = [of(run) for run in runs.values()]
        if any(text != _UNKNOWN for text in texts):
            yield name, texts, unit


def _last(run: RunRecord, key: str) -> str:
    values = run.series(key).dropna()
    return number(values.iloc[-1], 5) if values.size else _UNKNOWN


def _at(run: RunRecord, key: str, step: int | None) -> str:
    return _UNKNOWN if step is None else number(run.series(key)[step], 5)


def _last_tenth(run: RunRecord) -> str:
    values = run.series("loss").dropna()
    values = values[values.index > 0.9 * run.last_step]
    return number(values.mean(), 5) if values.size > 1 else _UNKNOWN


def _count(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else _UNKNOWN


def _parameters(run: RunRecord) -> str:
    try:
        return f"{Config.from_dict(run.config).model.num_parameters():,}"
    except ConfigError:
        return _UNKNOWN


def _after_first(run: RunRecord, key: str) -> pd.Series:
    """A rate, without the first record: the first steps of a start are its slowest."""
    return run.series(key).dropna().iloc[1:]


def _seconds(run: RunRecord) -> float:
    """Each recorded rate is the mean since the one before it; a resumed run has all its steps in the record."""
    table = pd.DataFrame({"tokens": run.series("consumed_tokens"), "rate": run.series("tokens_per_second")})
    table = table[(table.rate > 0) & table.tokens.notna()]
    return float((table.tokens.diff().fillna(table.tokens) / table.rate).sum()) if table.size else float("nan")


def _last_common_evaluation(runs: Sequence[RunRecord]) -> int | None:
    """The last trained step at which all runs have a validation loss; None: there is none, or it is each one's last."""
    steps = [set(run.series("validation_loss").dropna().index) - {0} for run in runs]
    common = set.intersection(*steps)
    return int(max(common)) if common and any(max(own) > max(common) for own in steps) else None
