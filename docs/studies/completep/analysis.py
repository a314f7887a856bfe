"""The best rate of each depth under both rules, and how it moves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlra_scale.files import write_atomically
from mlra_scale.study.report import style
from mlra_scale.study.report.sweep_record import DEPTH, MEASURES, SweepRecord, open_sweep

RULES = ("none", "completep")
RESAMPLES, LEVEL, BOUND = 2000, 0.95, 0.25
"""Of the bootstrap; BOUND: octaves per doubling within which a slope is called 0."""
_SEED = 2505_01618
_VALIDATION = MEASURES[1].name
Numbers = NDArray[np.float64]


class SweepError(ValueError):
    """The sweep cannot be analysed; its text says why."""


@dataclass(frozen=True)
class Curve:
    """Losses of one rule at one depth.

    Attributes:
        rates_R: log2 of the learning rates, sorted.
        losses_SR: By seed and rate; nan: diverged or missing.
    """

    rates_R: Numbers
    losses_SR: Numbers

    def best(self, seeds: NDArray[np.int64] | None = None) -> tuple[float, bool]:
        """Returns the log2 of the best rate, and whether neighbours with a loss enclose it.

        Args:
            seeds: Indices of the seeds whose mean is taken; None: each once.
        """
        chosen = self.losses_SR if seeds is None else self.losses_SR[seeds]
        return vertex(self.rates_R, chosen.mean(axis=0))


def vertex(rates_R: Numbers, losses_R: Numbers) -> tuple[float, bool]:
    """Returns where the parabola through the lowest loss and its two neighbours is lowest.

    Args:
        rates_R: Sorted, not necessarily evenly spaced.
        losses_R: nan where there is none.

    Returns:
        The place, and True; or the rate of the lowest loss and False if a neighbour is missing. nan without any loss.
    """
    if not np.isfinite(losses_R).any():
        return math.nan, False
    lowest = int(np.nanargmin(losses_R))
    if lowest in (0, len(rates_R) - 1) or not np.isfinite(losses_R[lowest - 1 : lowest + 2]).all():
        return float(rates_R[lowest]), False
    # Around the lowest point, where both neighbours are higher or equal: the curvature is not negative.
    places, heights = rates_R[lowest - 1 : lowest + 2] - rates_R[lowest], losses_R[lowest - 1 : lowest + 2]
    curvature, slope, _ = np.polyfit(places, heights, 2)
    return (float(rates_R[lowest] - slope / (2.0 * curvature)) if curvature > 0.0 else float(rates_R[lowest])), True


def slope_of(depths: Numbers, best: Numbers) -> float:
    """Returns octaves of the best rate per doubling of the depth."""
    return float(np.polyfit(np.log2(depths), best, 1)[0])


def read_curves(sweep: SweepRecord) -> dict[tuple[str, int], Curve]:
    """Returns the losses by rule and depth.

    Raises:
        SweepError: At some depth a rule has no rate with a loss of every seed, or there are fewer than two depths.
    """
    cells = sweep.cells.assign(depth=[int(axes.get(DEPTH, 0)) for axes in sweep.cells.axis_values])
    found = {}
    for (rule, depth), own in cells.groupby(["variant", "depth"]):
        table = own.drop_duplicates("cell", keep="last").pivot(index="seed", columns="rate", values=_VALIDATION)
        found[rule, depth] = Curve(np.log2(table.columns.to_numpy(np.float64)), table.to_numpy(np.float64))
    depths = sorted({depth for _, depth in found})
    missing = [
        f"{rule} at {depth} blocks"
        for rule in RULES
        for depth in depths
        if (rule, depth) not in found or not np.isfinite(found[rule, depth].losses_SR.mean(axis=0)).any()
    ]
    if missing or len(depths) < 2:
        raise SweepError(f"{sweep.path} lacks {', '.join(missing) or 'a second depth'}")
    return found


def analyse(sweep: SweepRecord) -> dict[str, Any]:
    """Returns the analysis as plain values."""
    curves = read_curves(sweep)
    depths = np.array(sorted({depth for _, depth in curves}), np.float64)
    generator = np.random.default_rng(_SEED)
    rules: dict[str, Any] = {}
    slopes: dict[str, np.ndarray] = {}
    for rule in RULES:
        of_rule = [curves[rule, int(depth)] for depth in depths]
        best = [curve.best() for curve in of_rule]
        drawn_BL = np.array(
            [
                [curve.best(generator.integers(0, len(curve.losses_SR), len(curve.losses_SR)))[0] for curve in of_rule]
                for _ in range(RESAMPLES)
            ]
        )
        slopes[rule] = np.array([slope_of(depths, row) for row in drawn_BL])
        rules[rule] = {
            "slope": slope_of(depths, np.array([place for place, _ in best])),
            "slope_interval": interval(slopes[rule]),
            "depths": {
                str(int(depth)): {
                    "best_rate": 2.0**place,
                    "is_enclosed": is_enclosed,
                    "octaves_interval": [end - place for end in interval(drawn_BL[:, column])],
                    "loss": float(np.nanmin(curve.losses_SR.mean(axis=0))),
                    "rates": (2.0**curve.rates_R).tolist(),
                    "losses": [None if math.isnan(x) else float(x) for x in curve.losses_SR.mean(axis=0)],
                }
                for column, (depth, (place, is_enclosed), curve) in enumerate(zip(depths, best, of_rule, strict=True))
            },
        }
    difference = interval(slopes["completep"] - slopes["none"])
    verdicts = {
        "C1": side(*rules["none"]["slope_interval"], above=False),
        "C2": side(*difference, above=True),
        "C3": within(*rules["completep"]["slope_interval"]),
    }
    return {"study": sweep.study, "rules": rules, "difference_interval": difference, "verdicts": verdicts}


def interval(values: Numbers) -> tuple[float, float]:
    """Returns the percentile interval of resampled values."""
    low, high = np.quantile(values, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return float(low), float(high)


def side(low: float, high: float, *, above: bool) -> str:
    """Returns whether an interval supports a number above 0, or below it."""
    if low > 0.0 or high < 0.0:
        return "supported" if (low > 0.0) == above else "refuted"
    return "undecided"


def within(low: float, high: float) -> str:
    """Returns whether an interval supports a number within BOUND of 0."""
    if -low < BOUND and high < BOUND:
        return "supported"
    return "refuted" if low > BOUND or -high > BOUND else "undecided"


def report(folder: Path, output: Path) -> dict[str, Any]:
    """Analyses a sweep and writes completep.json, completep.md and loss-over-rates.png; returns the analysis."""
    result = analyse(open_sweep(folder))
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "completep.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(output / "completep.md", as_markdown(result))
    (output / "loss-over-rates.png").write_bytes(figure(result))
    return result


def as_markdown(result: Mapping[str, Any]) -> str:
    """Returns the analysis as Markdown."""
    verdicts = ", ".join(f"{name} {verdict}" for name, verdict in result["verdicts"].items())
    lines = [f"Verdicts: {verdicts}.", ""]
    lines += ["| rule | blocks | best rate | 95 % interval, octaves | loss there |", "|---|---|---|---|---|"]
    for rule, found in result["rules"].items():
        for depth, at in found["depths"].items():
            low, high = at["octaves_interval"]
            mark = "" if at["is_enclosed"] else " (end of the sweep)"
            lines.append(
                f"| {rule} | {depth} | {at['best_rate']:.2e}{mark} | {low:+.2f} to {high:+.2f} | {at['loss']:.3f} |"
            )
    lines += ["", "| | octaves per doubling of the depth | 95 % interval |", "|---|---|---|"]
    for rule, found in result["rules"].items():
        low, high = found["slope_interval"]
        lines.append(f"| {rule} | {found['slope']:+.2f} | {low:+.2f} to {high:+.2f} |")
    low, high = result["difference_interval"]
    lines.append(f"| completep - none | | {low:+.2f} to {high:+.2f} |")
    return "\n".join([*lines, ""])


@style.drawing()
def figure(result: Mapping[str, Any]) -> bytes:
    """Draws loss over rate, a plot for each rule and a curve for each depth; a line at each best rate."""
    image, plots, leftmost = style.grid_of(list(result["rules"]), 3.0, sharey=True, sharex=True)
    losses: list[float] = []
    for axes, found in zip(plots, result["rules"].values(), strict=True):
        for index, (depth, at) in enumerate(found["depths"].items()):
            how, heights = style.look(index), [math.nan if x is None else x for x in at["losses"]]
            style.curve(axes, at["rates"], heights, how, f"{depth} blocks")
            axes.axvline(at["best_rate"], color=how["color"], ls=how["ls"], lw=0.8, alpha=0.7)
            losses += heights
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.set_xlabel("learning rate (log scale)")
    for axes in leftmost:
        style.choose_scale(axes, losses, "validation loss\n(nats per token)")
    style.legend_beside(plots[-1])
    return style.as_png(image)
