"""The curves of a sweep over steps: how the runs of each variant got to where they ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mlra_scale.study.report import style
from mlra_scale.study.report.run_record import Extract, in_steps, is_number, named, read_lines, series_of
from mlra_scale.study.report.sweep_results import Cell, Sweep

_MAX_POINTS, _MEAN_POINTS = 150, 40
"""Longer curves of a run and of a mean are drawn as means over equal stretches of steps."""


@dataclass(frozen=True)
class Quantity:
    """What is drawn over steps.

    Attributes:
        name: In words.
        unit: The y axis's label.
        extract: What reads it from a record.
    """

    name: str
    unit: str
    extract: Extract


QUANTITIES = (
    Quantity("training loss", "loss\n(nats per token)", named("loss")),
    Quantity("TEV mean", "TEV mean\n(unit of the weights)", named("tev_mean")),
    Quantity("TEV spread", "TEV spread\n(unit of the weights)", named("tev_std")),
    Quantity(
        "gradient variance of the embedding",
        "gradient variance",
        named("gradients.kinds.embedding.gradient_variance"),
    ),
)

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class RunCurves:
    """What one run recorded over its steps.

    Attributes:
        cell: The run.
        curves: For each of QUANTITIES, (steps [T], values [T]) of the finite values.
        guarded: Steps at which the guard acted.
    """

    cell: Cell
    curves: tuple[Curve, ...]
    guarded: tuple[int, ...]


def read_curves(sweep: Sweep) -> list[RunCurves]:
    """Reads every run of a sweep; what cannot be read is no curve."""
    return [_read(cell) for cell in sweep.cells]


def _read(cell: Cell) -> RunCurves:
    records = in_steps(read_lines(cell.run / "metrics.jsonl", [], is_optional=True))
    curves = []
    for quantity in QUANTITIES:
        found = series_of(records, quantity.extract).finite
        curves.append((found.steps, found.values))
    events = read_lines(cell.run / "events.jsonl", [], is_optional=True)
    acted = [event.get("step") for event in events if str(event.get("event")).startswith("guard_")]
    return RunCurves(cell, tuple(curves), tuple(int(step) for step in acted if is_number(step)))


def step_figure(sweep: Sweep, runs: Sequence[RunCurves], index: int) -> bytes | None:
    """Draws a quantity over steps, a plot for each place on the axes: every run thin, the mean of a variant thick.

    Args:
        sweep: The sweep.
        runs: What `read_curves` returned.
        index: Which of QUANTITIES.

    Returns:
        The figure as PNG, or None where no run has two values of it.
    """
    runs = [run for run in runs if run.curves[index][0].size > 1]
    if not runs:
        return None
    settings = [s for s in sweep.settings() if any(run.cell.setting() == s for run in runs)]
    columns = min(3, len(settings)) if len(settings) > 4 else min(2, len(settings))
    rows = math.ceil(len(settings) / columns)
    values = np.concatenate([run.curves[index][1] for run in runs])
    with style.drawing():
        figure = style.new_figure(0.6 + (3.0 if columns == 1 else 2.4) * rows)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, setting in zip(grid.ravel(), settings, strict=False):
            _draw(axes, sweep.variants, [run for run in runs if run.cell.setting() == setting], index)
            axes.set_title(style.label(setting, 60) if len(settings) > 1 else "")
        for axes in grid.ravel()[len(settings) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            style.choose_scale(axes, values, QUANTITIES[index].unit)
        for axes in grid[-1]:
            axes.set_xlabel("step")
        handles = [style.handle(style.style(number), variant) for number, variant in enumerate(sweep.variants)]
        handles.append(Line2D([], [], color="black", lw=0.5, alpha=0.5, label="one run"))
        if any(run.guarded for run in runs):
            handles.append(Line2D([], [], ls="", marker="|", ms=8, color="black", label="guard acted"))
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2, alignment="left")
        return style.as_png(figure)


def _draw(axes: Axes, variants: Sequence[str], runs: Sequence[RunCurves], index: int) -> None:
    for number, variant in enumerate(variants):
        look = style.style(number)
        own = [run for run in runs if run.cell.variant == variant]
        for run in own:
            axes.plot(*thin(run.curves[index], _MAX_POINTS), color=look.color, lw=0.5, alpha=0.4)
        if own:
            style.curve(axes, *thin(mean_curve([run.curves[index] for run in own]), _MEAN_POINTS), look)
        acted = [step for run in own for step in run.guarded]
        across = axes.get_xaxis_transform()
        axes.plot(acted, [0.03] * len(acted), ls="", marker="|", ms=8, color=look.color, transform=across)


def difference_figure(sweep: Sweep, runs: Sequence[RunCurves], index: int) -> bytes | None:
    """Draws how far a quantity of each variant is from that of the first one, at the same seed and step.

    What all variants of a seed share, as the noise of their batches, is in no difference.

    Args:
        sweep: The sweep.
        runs: What `read_curves` returned.
        index: Which of QUANTITIES.

    Returns:
        The figure as PNG, or None where there is no pair.
    """
    settings = sweep.settings()
    found = {
        setting: _differences(sweep.variants, [r for r in runs if r.cell.setting() == setting], index)
        for setting in settings
    }
    settings = [setting for setting in settings if found[setting]]
    if not settings:
        return None
    columns = min(3, len(settings)) if len(settings) > 4 else min(2, len(settings))
    rows = math.ceil(len(settings) / columns)
    with style.drawing():
        figure = style.new_figure(0.6 + (3.0 if columns == 1 else 2.4) * rows)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        drawn = []
        for axes, setting in zip(grid.ravel(), settings, strict=False):
            for variant, curves in found[setting].items():
                look = style.style(sweep.variants.index(variant))
                steps, means, errors = _mean_and_error(curves)
                drawn += [means - errors, means + errors]
                axes.fill_between(steps, means - errors, means + errors, color=look.color, alpha=0.2, lw=0)
                style.curve(axes, steps, means, look)
            axes.axhline(0.0, color="0.35", lw=1.0, ls="--", zorder=0.5)
            axes.set_title(style.label(setting, 60) if len(settings) > 1 else "")
        for axes in grid.ravel()[len(settings) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            style.choose_scale(axes, np.concatenate(drawn), f"difference of\n{QUANTITIES[index].unit}", "linear")
        for axes in grid[-1]:
            axes.set_xlabel("step")
        names = [variant for variant in sweep.variants if any(variant in curves for curves in found.values())]
        handles = [
            style.handle(style.style(sweep.variants.index(name)), f"{name} - {sweep.variants[0]}") for name in names
        ]
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2, alignment="left")
        return style.as_png(figure)


def _differences(variants: Sequence[str], runs: Sequence[RunCurves], index: int) -> dict[str, list[Curve]]:
    """By variant, the thinned difference from the first variant for every seed that both have."""
    by_seed = {(run.cell.variant, run.cell.seed): run.curves[index] for run in runs if run.curves[index][0].size > 1}
    found: dict[str, list[Curve]] = {}
    for (variant, seed), (steps, values) in by_seed.items():
        base = by_seed.get((variants[0], seed))
        if variant == variants[0] or base is None:
            continue
        common = np.intersect1d(steps, base[0])
        difference = values[np.isin(steps, common)] - base[1][np.isin(base[0], common)]
        if common.size > 0:
            found.setdefault(variant, []).append((common, difference))
    return found


def _mean_and_error(curves: Sequence[Curve]) -> tuple[npt.NDArray[np.float64], ...]:
    """Steps, mean and standard error (0 of a single curve) of stretches of steps that all curves have."""
    common = mean_curve(curves)[0]
    values = [thin((common, values[np.isin(steps, common)]), _MEAN_POINTS)[1] for steps, values in curves]
    steps = thin((common, common), _MEAN_POINTS)[0]
    error = np.std(values, axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(steps.size)
    return steps, np.mean(values, axis=0), error


def thin(curve: Curve, points: int) -> Curve:
    """Returns a curve of at most so many points: means over as many values each, the last over what is left."""
    steps, values = curve
    if steps.size == 0:
        return curve
    size = math.ceil(steps.size / points)
    starts = np.arange(0, steps.size, size)
    counts = np.diff(np.append(starts, steps.size))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Returns the mean over runs at the steps that all of them have.

    Behind the end of a run that stopped early there is no mean: it would be that of the better runs.
    """
    common = curves[0][0]
    for steps, _ in curves[1:]:
        common = np.intersect1d(common, steps)
    return common, np.mean([values[np.isin(steps, common)] for steps, values in curves], axis=0)
