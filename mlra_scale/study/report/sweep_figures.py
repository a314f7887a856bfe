"""The figures of a sweep: curves over its axes, paired differences, and what goes with what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from mlra_scale.study.report import style
from mlra_scale.study.report.associations import LOSS, PAIRS, TEV, VARIANCE, Observations
from mlra_scale.study.report.comparisons import Comparison, Measure
from mlra_scale.study.report.run_record import is_number
from mlra_scale.study.report.sweep_results import LEARNING_RATE, Cell, Sweep, axis_name, value_text
from mlra_scale.study.statistics import mean_of
from mlra_scale.study.verdicts import MIN_PAIRS

_MAX_RATE_ROWS = 4
_CROSS_HEIGHT = 0.06
"""Of the row of crosses of one variant, as a share of the plot."""
_UNITS = {TEV: "unit of the weights", VARIANCE: "log10", LOSS: "nats per token"}


def axis_figure(sweep: Sweep, axis: str, measure: Measure) -> bytes | None:
    """Draws a measure over one axis, a plot for each place on the others.

    Args:
        sweep: The sweep.
        axis: The axis; its values are numbers.
        measure: What to draw.

    Returns:
        The figure as PNG, or None where the axis has fewer than two numbers or nothing was measured.
    """
    values = [float(value) for value in sweep.axes.get(axis, []) if is_number(value)]
    cells = [cell for cell in sweep.cells if is_number(cell.axes.get(axis))]
    drawn = np.array([measure.of(cell) for cell in cells])
    if len(values) < 2 or not np.isfinite(drawn).any():
        return None
    settings = [s for s in sweep.settings(axis) if any(cell.setting(axis) == s for cell in cells)]
    with style.drawing():
        figure, plots, leftmost = style.grid_of(settings, 2.5, sharey=True)
        for axes, setting in zip(plots, settings, strict=True):
            _draw_axis(axes, sweep, axis, values, [c for c in cells if c.setting(axis) == setting], measure)
            if len(settings) == 1 and setting != "the one setting":
                axes.set_title(style.label(setting, 60))
        for axes in leftmost:
            style.choose_scale(axes, drawn, f"{measure.name}\n({measure.unit})")
        num_diverging = len(_diverging(sweep))
        _make_room_above(plots[0], num_diverging * _CROSS_HEIGHT)
        _legend_of_variants(figure, sweep.variants, num_diverging > 0)
        return style.as_png(figure)


def _draw_axis(axes: Axes, sweep: Sweep, axis: str, values: list[float], cells: list[Cell], measure: Measure) -> None:
    is_log = min(values) > 0 and (axis == LEARNING_RATE or max(values) > 3 * min(values))
    for index, variant in enumerate(sweep.variants):
        look = style.style(index)
        points = []
        for place, value in enumerate(values):
            here = [cell for cell in cells if cell.variant == variant and cell.axes[axis] == value]
            x = _beside(values, place, index - (len(sweep.variants) - 1) / 2, is_log)
            found = [number for cell in here if math.isfinite(number := measure.of(cell))]
            axes.plot([x] * len(found), found, ls="", marker=look.marker, ms=3, mfc="white", mec=look.color, mew=0.7)
            num_diverged = sum(cell.state == "diverged" for cell in here)
            if num_diverged:
                _mark_diverged(axes, x, num_diverged, _diverging(sweep).index(variant), look)
            mean = mean_of(found)
            points.append((x, mean.value, mean.error if mean.n > 1 else 0.0))
        x_values, means, errors = np.array(points).T
        axes.errorbar(x_values, means, errors, color=look.color, ls=look.line, marker=look.marker, capsize=2.5, lw=1.3)
    if is_log:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_readable(values, is_log)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: value_text(float(f"{value:.6g}")))
    axes.set_xlabel(f"{axis_name(axis)} (log scale)" if is_log else axis_name(axis))


def _diverging(sweep: Sweep) -> list[str]:
    """The variants of which any run diverged."""
    return [v for v in sweep.variants if any(c.variant == v and c.state == "diverged" for c in sweep.cells)]


def _make_room_above(axes: Axes, share: float) -> None:
    """Leaves the upper share of a plot without data."""
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(np.array(axes.get_ylim()))
    axes.set_ylim(*scale.inverted().transform(np.array([low, low + (high - low) / (1.0 - share)])))


def _readable(values: list[float], is_log: bool) -> list[float]:
    """Leaves out values of an axis whose labels would run into the one before."""
    places = np.log(values) if is_log else np.array(values)
    smallest = (places[-1] - places[0]) / 7
    kept = [0]
    for index in range(1, len(values)):
        if places[index] - places[kept[-1]] >= smallest:
            kept.append(index)
    return [values[index] for index in kept]


def _beside(values: list[float], place: int, offset: float, is_log: bool) -> float:
    """Moves a point a little to the side, so that variants of equal value do not hide each other."""
    places = np.log(values) if is_log else np.array(values)
    moved = places[place] + 0.06 * offset * np.diff(places).min()
    return float(np.exp(moved)) if is_log else float(moved)


def _mark_diverged(axes: Axes, x: float, count: int, row: int, look: style.Style) -> None:
    """Puts the variant's marker, crossed out, at the upper edge: a run that diverged has no value to be drawn at."""
    height = 1.0 - (row + 0.5) * _CROSS_HEIGHT
    across = axes.get_xaxis_transform()
    looks: dict[str, Any] = {"ls": "", "transform": across, "clip_on": False, "mec": look.color}
    axes.plot([x], [height], marker=look.marker, ms=8, mfc="white", mew=0.8, **looks)
    axes.plot([x], [height], marker="x", ms=5, mew=1.4, **looks)
    axes.annotate(
        str(count),
        (x, height),
        xycoords=across,
        xytext=(6, -3),
        textcoords="offset points",
        fontsize=7,
        color=look.color,
    )


def _legend_of_variants(figure: Figure, variants: Sequence[str], has_diverged: bool = False) -> None:
    handles = [style.handle(style.style(index), variant) for index, variant in enumerate(variants)]
    handles.append(Line2D([], [], ls="", marker="o", ms=3, mfc="white", mec="black", label="one run"))
    if has_diverged:
        handles.append(Line2D([], [], ls="", marker="x", ms=5, mew=1.4, color="black", label="number diverged"))
    figure.legend(handles=handles, loc="outside right upper", handlelength=3.2, alignment="left")


def difference_figure(comparisons: Sequence[Comparison]) -> bytes | None:
    """Draws the paired differences of one measure with their intervals, one plot for each pair of variants.

    Args:
        comparisons: Of one measure.

    Returns:
        The figure as PNG; None where there is no pair at all.
    """
    found = [item for item in comparisons if item.difference.n > 0]
    if not found:
        return None
    pairs = list(dict.fromkeys((item.first, item.second) for item in found))
    of_pair = {pair: [item for item in found if (item.first, item.second) == pair] for pair in pairs}
    heights = [0.5 + 0.2 * len(items) for items in of_pair.values()]
    measure = found[0].measure
    with style.drawing():
        figure = style.new_figure(sum(heights) + 0.35 * len(pairs) + 0.6)
        grid = figure.subplots(len(pairs), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, ((first, second), items) in zip(grid, of_pair.items(), strict=True):
            _draw_differences(axes, items)
            axes.set_title(style.label(f"{first} - {second}", 80))
            axes.tick_params(axis="x", labelbottom=True)
        grid[-1].set_xlabel(f"paired difference of {measure.name} ({measure.unit}); left of 0: the first is lower")
        figure.legend(
            handles=[
                Line2D([], [], marker="o", color="black", label=style.label("supported after Holm's adjustment", 20)),
                Line2D([], [], marker="o", mfc="white", color="black", label=style.label("not supported", 20)),
                Line2D(
                    [], [], marker="x", ls="", color="black", label=style.label(f"fewer than {MIN_PAIRS} pairs", 20)
                ),
            ],
            loc="outside right upper",
            title="95 % intervals",
            alignment="left",
        )
        return style.as_png(figure)


def _draw_differences(axes: Axes, items: Sequence[Comparison]) -> None:
    for height, item in enumerate(reversed(items)):
        difference = item.difference
        if difference.n < MIN_PAIRS:
            axes.plot([difference.value], [height], marker="x", color="black", ls="")
        else:
            axes.plot([difference.low, difference.high], [height] * 2, color="black", lw=1.3, marker="|", ms=6)
            face = "black" if item.is_supported else "white"
            axes.plot([difference.value], [height], marker="o", color="black", mfc=face, ls="", ms=5.5)
    axes.axvline(0.0, color="0.35", lw=1.0, ls="--", zorder=0.5)
    names = [f"{item.setting}  (n = {item.difference.n})" for item in reversed(items)]
    axes.set_yticks(range(len(items)), [style.label(name, 60) for name in names])
    axes.set_ylim(-0.6, len(items) - 0.4)
    axes.grid(axis="y", visible=False)


def scatter_figure(sweep: Sweep, seen: Observations, variants: Sequence[str]) -> bytes | None:
    """Draws the last values of all runs against each other: the marker is the variant, the shade the learning rate.

    Args:
        sweep: The sweep.
        seen: The last values.
        variants: The variant of each observation.

    Returns:
        The figure as PNG; None where no two of the values were measured together.
    """
    pairs = [pair for pair in PAIRS if np.isfinite(seen.columns[pair[0]] + seen.columns[pair[1]]).any()]
    if not pairs:
        return None
    rates = np.unique(seen.rates[np.isfinite(seen.rates)])
    # From dark to light, the last one short of white: an edge shows where a marker ends.
    shades = mpl.colormaps["cividis"](np.linspace(0.05, 0.95, max(1, rates.size)))
    place = {rate: index for index, rate in enumerate(rates)}
    fills = [shades[place[rate]] if rate in place else "0.5" for rate in seen.rates]
    # Values at different rates lie far apart: of few rates each has a row of its own.
    row_of = place if 1 < rates.size <= _MAX_RATE_ROWS and np.isfinite(seen.rates).all() else {}
    rows = max(1, len(row_of))
    with style.drawing():
        figure = style.new_figure(0.4 + 2.7 * rows)
        grid = figure.subplots(rows, len(pairs), squeeze=False)
        for column, (first, second) in enumerate(pairs):
            x, y = (LOSS, VARIANCE) if (first, second) == (VARIANCE, LOSS) else (first, second)
            for number, fill in enumerate(fills):
                axes = grid[row_of.get(seen.rates[number], 0), column]
                look = style.style(sweep.variants.index(variants[number]))
                point = seen.columns[x][number], seen.columns[y][number]
                axes.plot(*point, ls="", marker=look.marker, ms=6, mfc=fill, mec="black", mew=0.6)
            for axes in grid[:, column]:
                axes.set_xlabel(f"{_axis_text(x)}\n({_UNITS[x]})")
                axes.set_ylabel(f"{_axis_text(y)}\n({_UNITS[y]})")
        for rate, row in row_of.items():
            grid[row, 0].set_title(f"learning rate {value_text(float(rate))}")
        handles = [
            Line2D(
                [],
                [],
                ls="",
                marker=style.style(index).marker,
                mfc="white",
                mec="black",
                label=style.label(variant, 18),
            )
            for index, variant in enumerate(sweep.variants)
        ]
        if rates.size > 1:
            handles += [
                Line2D([], [], ls="", marker="o", mfc=shade, mec="black", label=f"rate {value_text(float(rate))}")
                for rate, shade in zip(rates, shades, strict=True)
            ]
        figure.legend(handles=handles, loc="outside right upper", alignment="left")
        return style.as_png(figure)


def _axis_text(name: str) -> str:
    return {LOSS: "final training loss", VARIANCE: "gradient variance, embedding"}.get(name, name)
