"""The figures of a sweep over steps: the runs of each variant, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mlra_scale.study.report import style
from mlra_scale.study.report.sweep_record import CellCurves, Quantity, SweepRecord

_MAX_POINTS, _MEAN_POINTS = 150, 40
"""Longer curves of a run and of a mean are drawn as means over intervals of steps."""


@style.drawing()
def step_figure(sweep: SweepRecord, runs: Sequence[CellCurves], quantity: Quantity) -> bytes | None:
    """Draws a quantity, a plot for each setting: every run thin, means of variants thick; None: no two values."""
    runs = [run for run in runs if run.curves[quantity.name].size > 1]
    if not runs:
        return None
    present = {run.cell["setting"] for run in runs}
    settings = [setting for setting in sweep.settings() if setting in present]
    figure, plots, leftmost = style.grid_of(settings, 2.4, sharex=True, sharey=True)
    for axes, setting in zip(plots, settings, strict=True):
        for index, variant in enumerate(sweep.variants):
            own = [run for run in runs if (run.cell["setting"], run.cell["variant"]) == (setting, variant)]
            curves, color = [run.curves[quantity.name] for run in own], style.look(index)["color"]
            for values in curves:
                axes.plot(thin(values, _MAX_POINTS), color=color, lw=0.5, alpha=0.4)
            if curves:
                mean = thin(mean_curve(curves), _MEAN_POINTS)
                style.curve(axes, mean.index, mean, style.look(index))
            guarded = [step for run in own for step in run.guarded]
            foot = {"transform": axes.get_xaxis_transform(), "color": color}
            axes.plot(guarded, [0.03] * len(guarded), ls="", marker="|", ms=8, **foot)
        axes.set_xlabel("step")
    for axes in leftmost:
        style.choose_scale(axes, pd.concat([run.curves[quantity.name] for run in runs]), quantity.unit)
    handles = [*style.variant_handles(sweep.variants), style.handle("one run", color="black", lw=0.5, alpha=0.5)]
    if any(run.guarded for run in runs):
        handles.append(style.handle("guard acted", ls="", marker="|", ms=8, color="black"))
    style.figure_legend(figure, handles, handlelength=3.2)
    return style.as_png(figure)


@style.drawing()
def difference_figure(sweep: SweepRecord, runs: Sequence[CellCurves], quantity: Quantity) -> bytes | None:
    """Draws the difference of each variant from the first one at the same seed and step; None: no pair.

    The noise that all variants of a seed share, such as that of their batches, is not in it.
    """
    by_setting = {
        setting: differences(sweep.variants, [run for run in runs if run.cell["setting"] == setting], quantity.name)
        for setting in sweep.settings()
    }
    found = {setting: curves for setting, curves in by_setting.items() if curves}
    if not found:
        return None
    figure, plots, leftmost = style.grid_of(list(found), 2.4, sharex=True, sharey=True)
    drawn = []
    for axes, of_variant in zip(plots, found.values(), strict=True):
        for variant, curves in of_variant.items():
            look, (mean, error) = style.look(sweep.variants.index(variant)), mean_and_error(curves)
            drawn += [mean - error, mean + error]
            axes.fill_between(mean.index, mean - error, mean + error, color=look["color"], alpha=0.2, lw=0)
            style.curve(axes, mean.index, mean, look)
        axes.axhline(0.0, color="0.35", lw=1.0, ls="--", zorder=0.5)
        axes.set_xlabel("step")
    for axes in leftmost:
        style.choose_scale(axes, pd.concat(drawn), f"difference of\n{quantity.unit}", "linear")
    handles = [
        style.handle(style.label(f"{variant} - {sweep.variants[0]}"), **style.look(index))
        for index, variant in enumerate(sweep.variants)
        if any(variant in curves for curves in found.values())
    ]
    style.figure_legend(figure, handles, handlelength=3.2)
    return style.as_png(figure)


def differences(variants: Sequence[str], runs: Sequence[CellCurves], name: str) -> dict[str, list[pd.Series]]:
    """Returns, by variant, the differences from the first one at common steps, one for every seed that both have."""
    curves = {(run.cell["variant"], run.cell["seed"]): run.curves[name] for run in runs}
    found: dict[str, list[pd.Series]] = {}
    for (variant, seed), values in curves.items():
        base = curves.get((variants[0], seed))
        if variant == variants[0] or base is None or min(values.size, base.size) < 2:
            continue
        if (difference := (values - base).dropna()).size:
            found.setdefault(variant, []).append(difference)
    return found


def mean_and_error(curves: Sequence[pd.Series]) -> tuple[pd.Series, pd.Series]:
    """Returns mean and standard error (0 of a single curve) over curves, at intervals of steps that all have."""
    common = pd.concat(curves, axis=1, join="inner")
    thinned = pd.concat([thin(common[column], _MEAN_POINTS) for column in common], axis=1)
    return thinned.mean(axis=1), thinned.sem(axis=1).fillna(0.0)


def mean_curve(curves: Sequence[pd.Series]) -> pd.Series:
    """Returns the mean over runs at the steps that all of them have.

    After the end of a run that stopped early there is no mean: it would be the mean of the better runs.
    """
    return pd.concat(curves, axis=1, join="inner").mean(axis=1)


def thin(curve: pd.Series, points: int) -> pd.Series:
    """Returns a curve of at most so many points: means of steps and values over intervals, the last one shorter."""
    interval = np.arange(curve.size) // max(1, -(-curve.size // points))
    means = pd.DataFrame({"step": curve.index, "value": curve.to_numpy()}).groupby(interval).mean()
    return means.set_index("step").value
