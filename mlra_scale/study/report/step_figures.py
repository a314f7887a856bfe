"""The curves of a sweep over steps: how the runs of each variant got to where they ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        curves: By a quantity's name, (steps [T], values [T]) of the finite values.
        guarded: Steps at which the guard acted.
    """

    cell: Cell
    curves: Mapping[str, Curve]
    guarded: tuple[int, ...]


def read_curves(sweep: Sweep) -> list[RunCurves]:
    """Reads every run of a sweep; what cannot be read is no curve."""
    return [_read(cell) for cell in sweep.cells]


def _read(cell: Cell) -> RunCurves:
    records = in_steps(read_lines(cell.run / "metrics.jsonl", [], is_optional=True))
    series = {quantity.name: series_of(records, quantity.extract).finite for quantity in QUANTITIES}
    events = read_lines(cell.run / "events.jsonl", [], is_optional=True)
    acted = [event.get("step") for event in events if str(event.get("event")).startswith("guard_")]
    return RunCurves(
        cell,
        {name: (found.steps, found.values) for name, found in series.items()},
        tuple(int(step) for step in acted if is_number(step)),
    )


def step_figure(sweep: Sweep, runs: Sequence[RunCurves], quantity: Quantity) -> bytes | None:
    """Draws a quantity over steps, a plot for each place on the axes: every run thin, the mean of a variant thick.

    Args:
        sweep: The sweep.
        runs: What `read_curves` returned.
        quantity: What to draw.

    Returns:
        The figure as PNG, or None where no run has two values of it.
    """
    runs = [run for run in runs if run.curves[quantity.name][0].size > 1]
    if not runs:
        return None
    settings = [s for s in sweep.settings() if any(run.cell.setting() == s for run in runs)]
    values = np.concatenate([run.curves[quantity.name][1] for run in runs])
    with style.drawing():
        figure, plots, leftmost = style.grid_of(settings, 2.4, sharex=True, sharey=True)
        for axes, setting in zip(plots, settings, strict=True):
            _draw(axes, sweep.variants, [run for run in runs if run.cell.setting() == setting], quantity.name)
            axes.set_xlabel("step")
        for axes in leftmost:
            style.choose_scale(axes, values, quantity.unit)
        handles = [style.handle(style.style(number), variant) for number, variant in enumerate(sweep.variants)]
        handles.append(Line2D([], [], color="black", lw=0.5, alpha=0.5, label="one run"))
        if any(run.guarded for run in runs):
            handles.append(Line2D([], [], ls="", marker="|", ms=8, color="black", label="guard acted"))
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2, alignment="left")
        return style.as_png(figure)


def _draw(axes: Axes, variants: Sequence[str], runs: Sequence[RunCurves], name: str) -> None:
    for number, variant in enumerate(variants):
        look = style.style(number)
        own = [run for run in runs if run.cell.variant == variant]
        for run in own:
            axes.plot(*thin(run.curves[name], _MAX_POINTS), color=look.color, lw=0.5, alpha=0.4)
        if own:
            style.curve(axes, *thin(mean_curve([run.curves[name] for run in own]), _MEAN_POINTS), look)
        acted = [step for run in own for step in run.guarded]
        across = axes.get_xaxis_transform()
        axes.plot(acted, [0.03] * len(acted), ls="", marker="|", ms=8, color=look.color, transform=across)


def difference_figure(sweep: Sweep, runs: Sequence[RunCurves], quantity: Quantity) -> bytes | None:
    """Draws how far a quantity of each variant is from that of the first one, at the same seed and step.

    What all variants of a seed share, as the noise of their batches, is in no difference.

    Args:
        sweep: The sweep.
        runs: What `read_curves` returned.
        quantity: What to draw.

    Returns:
        The figure as PNG, or None where there is no pair.
    """
    by_setting = {
        setting: differences(sweep.variants, [r for r in runs if r.cell.setting() == setting], quantity.name)
        for setting in sweep.settings()
    }
    found = {setting: curves for setting, curves in by_setting.items() if curves}
    if not found:
        return None
    with style.drawing():
        figure, plots, leftmost = style.grid_of(list(found), 2.4, sharex=True, sharey=True)
        drawn = []
        for axes, of_variant in zip(plots, found.values(), strict=True):
            for variant, curves in of_variant.items():
                look = style.style(sweep.variants.index(variant))
                steps, means, errors = mean_and_error(curves)
                drawn += [means - errors, means + errors]
                axes.fill_between(steps, means - errors, means + errors, color=look.color, alpha=0.2, lw=0)
                style.curve(axes, steps, means, look)
            axes.axhline(0.0, color="0.35", lw=1.0, ls="--", zorder=0.5)
            axes.set_xlabel("step")
        for axes in leftmost:
            style.choose_scale(axes, np.concatenate(drawn), f"difference of\n{quantity.unit}", "linear")
        names = [variant for variant in sweep.variants if any(variant in curves for curves in found.values())]
        handles = [
            style.handle(style.style(sweep.variants.index(name)), f"{name} - {sweep.variants[0]}") for name in names
        ]
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2, alignment="left")
        return style.as_png(figure)


def differences(variants: Sequence[str], runs: Sequence[RunCurves], name: str) -> dict[str, list[Curve]]:
    """Returns, by variant, the difference from the first one at common steps, for every seed that both have.

    Args:
        variants: All of the sweep.
        runs: Those at one place on the axes.
        name: Of the quantity.
    """
    by_seed = {(run.cell.variant, run.cell.seed): run.curves[name] for run in runs if run.curves[name][0].size > 1}
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


def mean_and_error(curves: Sequence[Curve]) -> tuple[npt.NDArray[np.float64], ...]:
    """Returns steps, mean and standard error (0 of a single curve) of stretches of steps that all curves have."""
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
