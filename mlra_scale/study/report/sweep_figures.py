"""The figures of a sweep's final values: over its axes, as paired differences, and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from mlra_scale.study.report import style
from mlra_scale.study.report.associations import LOSS, PAIRS, TEV, VARIANCE
from mlra_scale.study.report.comparisons import MIN_PAIRS, PairedComparison
from mlra_scale.study.report.records import number_or_nan
from mlra_scale.study.report.sweep_record import (
    LEARNING_RATE,
    Measure,
    SweepRecord,
    axis_name,
    setting_text,
    value_text,
)
from mlra_scale.training.run_reader import is_number

_MAX_RATE_ROWS = 4
_CROSS_HEIGHT = 0.06
"""Height of the row of crosses of one variant, as a share of the plot."""
_LABELS = {
    TEV: "TEV mean\n(unit of the weights)",
    VARIANCE: "gradient variance, embedding\n(log10)",
    LOSS: "final training loss\n(nats per token)",
}


@style.drawing()
def axis_figure(sweep: SweepRecord, axis: str, measure: Measure) -> bytes | None:
    """Draws a measure over one axis, a plot for each setting of the others; None: there are not two values."""
    values = [float(value) for value in sweep.axes.get(axis, []) if is_number(value)]
    numbers = sweep.cells.axis_values.map(lambda axes: number_or_nan(axes.get(axis)))
    others = sweep.cells.axis_values.map(lambda axes: setting_text(axes, without=axis))
    cells = sweep.cells.assign(number=numbers, others=others)[numbers.notna()]
    if len(values) < 2 or not cells[measure.name].notna().any():
        return None
    settings = [setting for setting in sweep.settings(axis) if (cells.others == setting).any()]
    diverging = [name for name in sweep.variants if "diverged" in set(sweep.cells.state[sweep.cells.variant == name])]
    is_log = min(values) > 0 and (axis == LEARNING_RATE or max(values) > 3 * min(values))
    figure, plots, leftmost = style.grid_of(settings, 2.5, sharey=True)
    for axes, setting in zip(plots, settings, strict=True):
        for index, variant in enumerate(sweep.variants):
            own = cells[(cells.others == setting) & (cells.variant == variant)]
            x_of = dict(zip(values, _beside(values, index, len(sweep.variants), is_log), strict=True))
            own = own.assign(x=own.number.map(x_of))
            _draw_means(axes, own, list(x_of.values()), measure, style.look(index))
            if variant in diverging:
                height = 1.0 - (diverging.index(variant) + 0.5) * _CROSS_HEIGHT
                _draw_diverged(axes, own.x[own.state == "diverged"], height, style.look(index))
        _finish_axis(axes, axis, values, is_log)
        if len(settings) == 1 and setting != "the one setting":
            axes.set_title(style.label(setting, 60))
    for axes in leftmost:
        style.choose_scale(axes, cells[measure.name], f"{measure.name}\n({measure.unit})")
    _make_room_above(plots[0], len(diverging) * _CROSS_HEIGHT)
    handles = style.variant_handles(sweep.variants)
    handles.append(style.handle("one run", ls="", marker="o", ms=3, mfc="white", mec="black"))
    if diverging:
        handles.append(style.handle("number diverged", ls="", marker="x", ms=5, mew=1.4, color="black"))
    style.figure_legend(figure, handles, handlelength=3.2)
    return style.as_png(figure)


def _draw_means(axes: Axes, cells: pd.DataFrame, x: list[float], measure: Measure, look: style.Look) -> None:
    """Draws every run of a variant as a small open marker, and means with standard errors."""
    marker = {"marker": look["marker"], "mec": look["color"], "mfc": "white", "ms": 3, "mew": 0.7}
    axes.plot(cells.x, cells[measure.name], ls="", **marker)
    by_x = cells.groupby("x")[measure.name]
    axes.errorbar(x, by_x.mean().reindex(x), by_x.sem().reindex(x).fillna(0.0), capsize=2.5, lw=1.3, **look)


def _draw_diverged(axes: Axes, x: pd.Series, height: float, look: style.Look) -> None:
    """Draws a crossed-out marker at the upper edge, with the number of runs that diverged: they have no final value."""
    across, color = axes.get_xaxis_transform(), look["color"]
    how: dict[str, Any] = {"ls": "", "transform": across, "clip_on": False, "mec": color}
    beside: dict[str, Any] = {"xycoords": across, "xytext": (6, -3), "textcoords": "offset points"}
    for x_value, count in x.value_counts().items():
        axes.plot([x_value], [height], marker=look["marker"], ms=8, mfc="white", mew=0.8, **how)
        axes.plot([x_value], [height], marker="x", ms=5, mew=1.4, **how)
        axes.annotate(str(count), (x_value, height), fontsize=7, color=color, **beside)


def _finish_axis(axes: Axes, axis: str, values: list[float], is_log: bool) -> None:
    if is_log:
        axes.set_xscale("log")
    # Values whose labels would overlap the one before have none.
    positions, kept = np.log(values) if is_log else np.array(values), [0]
    for index in range(1, len(values)):
        if positions[index] - positions[kept[-1]] >= (positions[-1] - positions[0]) / 7:
            kept.append(index)
    axes.xaxis.set_major_locator(FixedLocator([values[index] for index in kept]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: value_text(float(f"{value:.6g}")))
    axes.set_xlabel(f"{axis_name(axis)} (log scale)" if is_log else axis_name(axis))


def _beside(values: list[float], index: int, count: int, is_log: bool) -> list[float]:
    """Returns x values moved a little sideways, so that variants of equal value do not hide each other."""
    positions = np.log(values) if is_log else np.array(values)
    moved = positions + 0.06 * (index - (count - 1) / 2) * np.diff(positions).min()
    return (np.exp(moved) if is_log else moved).tolist()


def _make_room_above(axes: Axes, share: float) -> None:
    """Leaves the upper share of a plot without data."""
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(np.array(axes.get_ylim()))
    axes.set_ylim(*scale.inverted().transform(np.array([low, low + (high - low) / (1.0 - share)])))


@style.drawing()
def difference_figure(comparisons: Sequence[PairedComparison]) -> bytes | None:
    """Draws the paired differences of one measure with intervals, a plot for each two variants; None: no pair."""
    by_names: dict[str, list[PairedComparison]] = {}
    for item in comparisons:
        if item.difference.n > 0:
            by_names.setdefault(item.names, []).append(item)
    if not by_names:
        return None
    heights, measure = [0.5 + 0.2 * len(items) for items in by_names.values()], comparisons[0].measure
    figure = style.new_figure(sum(heights) + 0.35 * len(heights) + 0.6)
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (names, items) in zip(grid, by_names.items(), strict=True):
        _draw_differences(axes, items[::-1])
        axes.set_title(style.label(names, 80))
        axes.tick_params(axis="x", labelbottom=True)
    grid[-1].set_xlabel(f"paired difference of {measure.name} ({measure.unit}); left of 0: the first is lower")
    handles = [
        style.handle(style.label("supported after Holm's adjustment", 20), marker="o", color="black"),
        style.handle(style.label("not supported", 20), marker="o", mfc="white", color="black"),
        style.handle(style.label(f"fewer than {MIN_PAIRS} pairs", 20), marker="x", ls="", color="black"),
    ]
    style.figure_legend(figure, handles, title="95 % intervals")
    return style.as_png(figure)


def _draw_differences(axes: Axes, items: Sequence[PairedComparison]) -> None:
    for height, item in enumerate(items):
        difference = item.difference
        if difference.n < MIN_PAIRS:
            axes.plot([difference.value], [height], marker="x", color="black", ls="")
        else:
            axes.plot([difference.low, difference.high], [height] * 2, color="black", lw=1.3, marker="|", ms=6)
            face = "black" if item.is_supported else "white"
            axes.plot([difference.value], [height], marker="o", color="black", mfc=face, ls="", ms=5.5)
    axes.axvline(0.0, color="0.35", lw=1.0, ls="--", zorder=0.5)
    names = [style.label(f"{item.setting}  (n = {item.difference.n})", 60) for item in items]
    axes.set_yticks(range(len(items)), names)
    axes.set_ylim(-0.6, len(items) - 0.4)
    axes.grid(axis="y", visible=False)


@style.drawing()
def scatter_figure(sweep: SweepRecord, seen: pd.DataFrame) -> bytes | None:
    """Draws final values of runs (`associations.final_values`) against each other; None: no run has two of them.

    The marker is the variant, the shade the learning rate.
    """
    pairs = [pair for pair in PAIRS if len(seen.dropna(subset=[*pair])) > 0]
    if not pairs:
        return None
    rates = np.unique(seen.rate.dropna())
    # The lightest shade is not white: the edge of a marker is visible.
    shades = mpl.colormaps["cividis"](np.linspace(0.05, 0.95, max(1, rates.size)))
    index_of = {rate: index for index, rate in enumerate(rates)}
    # Values at different rates are far apart: each of a few rates has its own row of plots.
    row_of = index_of if 1 < rates.size <= _MAX_RATE_ROWS and seen.rate.notna().all() else {}
    rows = max(1, len(row_of))
    figure = style.new_figure(0.4 + 2.7 * rows)
    grid = figure.subplots(rows, len(pairs), squeeze=False)
    for column, (first, second) in enumerate(pairs):
        x, y = (LOSS, VARIANCE) if (first, second) == (VARIANCE, LOSS) else (first, second)
        for run in seen.to_dict("records"):
            how = {"ls": "", "marker": style.look(sweep.variants.index(run["variant"]))["marker"], "ms": 6}
            fill = shades[index_of[run["rate"]]] if run["rate"] in index_of else "0.5"
            axes = grid[row_of.get(run["rate"], 0), column]
            axes.plot(run[x], run[y], mfc=fill, mec="black", mew=0.6, **how)
        for axes in grid[:, column]:
            axes.set_xlabel(_LABELS[x])
            axes.set_ylabel(_LABELS[y])
    for rate, row in row_of.items():
        grid[row, 0].set_title(f"learning rate {value_text(float(rate))}")
    empty: dict[str, Any] = {"ls": "", "mec": "black"}
    handles = [
        style.handle(style.label(variant, 18), marker=style.look(index)["marker"], mfc="white", **empty)
        for index, variant in enumerate(sweep.variants)
    ]
    if rates.size > 1:
        names = [f"rate {value_text(float(rate))}" for rate in rates]
        handles += [style.handle(n, marker="o", mfc=s, **empty) for n, s in zip(names, shades, strict=True)]
    style.figure_legend(figure, handles)
    return style.as_png(figure)
