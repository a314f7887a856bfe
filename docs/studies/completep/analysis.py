"""The best rate of each depth under both rules, and how it moves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mlra_scale.files import write_atomically
from mlra_scale.study.report import style
from mlra_scale.study.report.sweep_record import DEPTH, MEASURES, SweepRecord, open_sweep

RULES = ("none", "completep")
LEVEL, BOUND = 0.95, 0.25
"""Coverage of intervals; octaves per doubling within which a slope is called 0."""
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

    def best(self) -> Best:
        """Returns where the parabola through the lowest mean loss and its two neighbours is lowest.

        The variance is that of the delta method: the vertex is linear in small changes of the three losses, and the
        change that each seed's losses make is one of S independent values with that mean.
        """
        losses_R, num_seeds = self.losses_SR.mean(axis=0), len(self.losses_SR)
        lowest = int(np.nanargmin(losses_R))
        chosen, place = slice(lowest - 1, lowest + 2), float(self.rates_R[lowest])
        if lowest in (0, len(losses_R) - 1) or not np.isfinite(losses_R[chosen]).all():
            return Best(place, math.nan, num_seeds)
        x_3, losses_S3 = self.rates_R[chosen], self.losses_SR[:, chosen]
        slopes_S2 = np.diff(losses_S3) / np.diff(x_3)  # divided differences, the second of which is the curvature
        curvatures_S = (slopes_S2[:, 1] - slopes_S2[:, 0]) / (x_3[2] - x_3[0])
        slope, curvature = slopes_S2[:, 0].mean(), curvatures_S.mean()
        if not curvature > 0.0:  # three equal losses
            return Best(place, math.nan, num_seeds)
        shift = slope / (2.0 * curvature)
        changes_S = -slopes_S2[:, 0] / (2.0 * curvature) + shift * curvatures_S / curvature
        variance = changes_S.var(ddof=1) / num_seeds if num_seeds > 1 else math.nan
        return Best(float(x_3[:2].mean() - shift), float(variance), num_seeds, is_enclosed=True)

    def count_enclosed(self) -> int:
        """Returns the number of seeds whose own best rate is enclosed."""
        alone = [Curve(self.rates_R, own_R[None]) for own_R in self.losses_SR if np.isfinite(own_R).any()]
        return sum(curve.best().is_enclosed for curve in alone)


@dataclass(frozen=True)
class Best:
    """The best rate of a curve.

    Attributes:
        place: Its log2; the rate of the lowest loss itself unless neighbours with a higher loss enclose it.
        variance: Of the place; nan unless it is enclosed and there are two seeds.
        num_seeds: Seeds whose mean it is.
        is_enclosed: Whether the place is the vertex of a parabola.
    """

    place: float
    variance: float
    num_seeds: int
    is_enclosed: bool = False


def slope_weights(depths: Numbers) -> Numbers:
    """Returns what best rates are summed with to give octaves per doubling of the depth, by least squares."""
    doublings = np.log2(depths) - np.log2(depths).mean()
    return doublings / (doublings**2).sum()


def interval(weights: Numbers, best: Sequence[Best]) -> tuple[float, float] | None:
    """Returns the interval of Student's t of a weighted sum of best rates, whose errors are independent.

    Degrees of freedom: Satterthwaite 1946, Biometrics Bulletin 2(6). None: a rate is not enclosed, or without spread.
    """
    terms = weights**2 * np.array([one.variance for one in best])
    if not terms.sum() > 0.0:
        return None
    freedom = terms.sum() ** 2 / (terms**2 / np.array([one.num_seeds - 1.0 for one in best])).sum()
    middle = float(weights @ np.array([one.place for one in best]))
    half = float(stats.t.ppf((1.0 + LEVEL) / 2.0, freedom)) * math.sqrt(terms.sum())
    return middle - half, middle + half


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
    """Returns the analysis as plain values; an interval that cannot be given is None."""
    curves = read_curves(sweep)
    depths = np.array(sorted({depth for _, depth in curves}), np.float64)
    weights, one = slope_weights(depths), np.ones(1)
    best = {rule: [curves[rule, int(depth)].best() for depth in depths] for rule in RULES}
    rules: dict[str, Any] = {}
    for rule in RULES:
        rules[rule] = {
            "slope": float(weights @ np.array([found.place for found in best[rule]])),
            "slope_interval": interval(weights, best[rule]),
            "depths": {
                str(int(depth)): {
                    "best_rate": 2.0**found.place,
                    "is_enclosed": found.is_enclosed,
                    "enclosed_seeds": curve.count_enclosed(),
                    "seeds": found.num_seeds,
                    "octaves_interval": ends and [end - found.place for end in ends],
                    "loss": float(np.nanmin(curve.losses_SR.mean(axis=0))),
                    "rates": (2.0**curve.rates_R).tolist(),
                    "losses": [None if math.isnan(x) else float(x) for x in curve.losses_SR.mean(axis=0)],
                }
                for depth, found in zip(depths, best[rule], strict=True)
                for curve, ends in [(curves[rule, int(depth)], interval(one, [found]))]
            },
        }
    difference = interval(np.concatenate([weights, -weights]), best["completep"] + best["none"])
    verdicts = {
        "C1": side(rules["none"]["slope_interval"], above=False),
        "C2": side(difference, above=True),
        "C3": within(rules["completep"]["slope_interval"]),
    }
    return {"study": sweep.study, "rules": rules, "difference_interval": difference, "verdicts": verdicts}


def side(ends: tuple[float, float] | None, *, above: bool) -> str:
    """Returns whether an interval supports a number above 0, or below it."""
    if ends and (ends[0] > 0.0 or ends[1] < 0.0):
        return "supported" if (ends[0] > 0.0) == above else "refuted"
    return "undecided"


def within(ends: tuple[float, float] | None) -> str:
    """Returns whether an interval supports a number within BOUND of 0."""
    if ends is None:
        return "undecided"
    low, high = ends
    if low > -BOUND and high < BOUND:
        return "supported"
    return "refuted" if low > BOUND or high < -BOUND else "undecided"


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
    lines += ["| rule | blocks | best rate | 95 % interval, octaves | seeds enclosed | loss there |"]
    lines += ["|---|---|---|---|---|---|"]
    for rule, found in result["rules"].items():
        for depth, at in found["depths"].items():
            best = f"{at['best_rate']:.2e}" + ("" if at["is_enclosed"] else " (not enclosed)")
            best += f" | {_ends(at['octaves_interval'])} | {at['enclosed_seeds']} of {at['seeds']}"
            lines.append(f"| {rule} | {depth} | {best} | {at['loss']:.3f} |")
    lines += ["", "| | octaves per doubling of the depth | 95 % interval |", "|---|---|---|"]
    for rule, found in result["rules"].items():
        lines.append(f"| {rule} | {found['slope']:+.2f} | {_ends(found['slope_interval'])} |")
    slopes = [result["rules"][rule]["slope"] for rule in RULES]
    lines.append(f"| completep - none | {slopes[1] - slopes[0]:+.2f} | {_ends(result['difference_interval'])} |")
    return "\n".join([*lines, ""])


def _ends(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"


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
