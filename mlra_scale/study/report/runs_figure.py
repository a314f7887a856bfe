"""The figure of several runs: their curves over each other, one panel for each measure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mlra_scale.study.report import style
from mlra_scale.study.report.records import RunRecord
from mlra_scale.study.report.run_figures import Kind
from mlra_scale.study.report.step_figures import thin

PANELS: tuple[tuple[str, str, str, Kind, float], ...] = (
    ("Training loss", "loss", "nats per token", "free", 1.0),
    ("Validation loss", "validation_loss", "nats per token", "free", 1.0),
    ("TEV, mean over tokens", "tev_mean", "unit of\nthe weights", "linear", 1.0),
    ("Gradient norm, before clipping", "gradient_norm", "gradient norm", "free", 1.0),
    ("Learning rate", "learning_rate", "learning rate", "free", 1.0),
    ("Tokens per second", "tokens_per_second", "tokens/s", "linear", 1.0),
    ("MFU", "mfu", "%", "share", 100.0),
    ("Peak memory of a device", "memory_gib", "GiB", "share", 1.0),
)
"""Title, key of the record, unit, scale, and what values are multiplied by."""
_MAX_POINTS = 60
"""Longer curves are drawn thin, and as means over intervals of steps."""


@style.drawing()
def overlay_figure(runs: Mapping[str, RunRecord]) -> tuple[bytes | None, str]:
    """Draws every measure that a run has, the curves of all runs in one panel.

    Returns:
        The figure as PNG (None: there is nothing to draw), and the horizontal axis: optimizer steps, or tokens where
        the runs' batches differ.
    """
    axis = _axis_of(runs)
    found = {
        panel: curves
        for panel in PANELS
        if (curves := {name: values for name, run in runs.items() if (values := _curve(run, panel[1], axis)).size})
    }
    if not found:
        return None, axis
    figure = style.new_figure(1.75 * len(found) + 0.4)
    grid = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
    for axes, ((title, _, unit, kind, factor), curves) in zip(grid, found.items(), strict=True):
        for index, name in enumerate(runs):
            if name in curves:
                _draw(axes, factor * curves[name], style.look(index), name)
        style.choose_scale(axes, factor * np.concatenate([*curves.values()]), unit, kind)
        axes.set_title(title)
    grid[-1].set_xlabel(axis)
    handles = [style.handle(style.label(name), **style.look(index)) for index, name in enumerate(runs)]
    style.figure_legend(figure, handles, handlelength=3.2)
    return style.as_png(figure), axis


def _axis_of(runs: Mapping[str, RunRecord]) -> str:
    sizes = {(run.setting("train.global_batch_size"), run.setting("train.sequence_length")) for run in runs.values()}
    return "optimizer steps" if len(sizes) == 1 else "tokens"


def _curve(run: RunRecord, key: str, axis: str) -> pd.Series:
    values = run.series(key).dropna()
    if axis == "tokens":
        tokens = run.series("consumed_tokens").reindex(values.index)
        values = values[tokens.notna()].set_axis(tokens.dropna())
    return values


def _draw(axes: Axes, values: pd.Series, how: style.Look, name: str) -> None:
    if values.size > _MAX_POINTS:
        axes.plot(values, color=how["color"], lw=0.5, alpha=0.4)
        values = thin(values, _MAX_POINTS)
    style.curve(axes, values.index, values, how, name)
