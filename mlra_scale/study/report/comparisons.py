"""What is compared between the variants of a sweep, pair by pair of equal seed and equal place on the axes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlra_scale.study.report.run_record import is_number
from mlra_scale.study.report.sweep_results import LEARNING_RATE, Cell, Sweep, value_text
from mlra_scale.study.statistics import Mean, holm, learning_rate_sensitivity, mean_of
from mlra_scale.study.verdicts import is_supported, takes_part, verdict


@dataclass(frozen=True)
class Measure:
    """What is compared.

    Attributes:
        name: In words.
        unit: Its unit.
        of: What reads it from a cell; nan where it is not there.
    """

    name: str
    unit: str
    of: Callable[[Cell], float]


def _log10(name: str) -> Callable[[Cell], float]:
    def of(cell: Cell) -> float:
        value = cell.value(name)
        return math.log10(value) if value > 0 else math.nan

    return of


MEASURES = (
    Measure("final training loss", "nats per token", lambda cell: cell.value("final_loss")),
    Measure("validation loss", "nats per token", lambda cell: cell.value("validation_loss")),
    Measure("TEV mean", "unit of the weights", lambda cell: cell.value("tev_mean")),
    Measure("TEV spread", "unit of the weights", lambda cell: cell.value("tev_std")),
    Measure("log10 of the embedding's gradient variance", "decades", _log10("gradient_variance_embedding")),
    Measure("log10 of shallow blocks' gradient variance", "decades", _log10("gradient_variance_shallow")),
    Measure("log10 of the last block's residual variance", "decades", _log10("residual_variance")),
)
SENSITIVITY = Measure("learning-rate sensitivity", "nats per token", lambda cell: math.nan)


@dataclass(frozen=True)
class Comparison:
    """One paired comparison: first - second.

    Attributes:
        measure: What was compared.
        first: A variant.
        second: The one that is taken from it.
        setting: The place on the axes.
        difference: The mean difference over seeds.
        left_out: Why pairs are missing, with their number.
        is_mean: Whether it is the mean over settings.
        adjusted_p: Holm-adjusted over its family: the comparisons of the same measure that can be claimed, means over
            settings apart from single settings; nan for others.
        family: How many these are.
    """

    measure: Measure
    first: str
    second: str
    setting: str
    difference: Mean
    left_out: tuple[str, ...]
    is_mean: bool = False
    adjusted_p: float = math.nan
    family: int = 0

    @property
    def is_supported(self) -> bool:
        """Whether a difference may be named."""
        return is_supported(self.difference, self.adjusted_p)

    @property
    def statement(self) -> str:
        """What it supports, with what is missing."""
        missing = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{verdict(self.difference, self.adjusted_p, self.family)}{missing}."

    @property
    def title(self) -> str:
        """What was compared."""
        return f"{self.first} - {self.second}, {self.setting}: {self.measure.name}"


def compare(sweep: Sweep) -> list[Comparison]:
    """Compares every two variants in every setting and every measure that there is.

    Args:
        sweep: The sweep.

    Returns:
        The comparisons, measure by measure; p-values are adjusted for their number (`_adjusted`).
    """
    pairs = [(later, earlier) for earlier, later in itertools.combinations(sweep.variants, 2)]
    found: list[Comparison] = []
    for measure in MEASURES:
        if any(math.isfinite(measure.of(cell)) for cell in sweep.cells):
            found += _adjusted([item for pair in pairs for item in _compare(sweep, measure, *pair)])
    return found + _adjusted(_compare_sensitivities(sweep, pairs))


def _compare(sweep: Sweep, measure: Measure, first: str, second: str) -> list[Comparison]:
    """Compares two variants in every setting, and in the mean over settings where there are several."""
    found, by_setting = [], {}
    for setting in sweep.settings():
        pairs, missing = _pairs(sweep, measure, first, second, setting)
        by_setting[setting] = pairs
        difference = mean_of(list(pairs.values()))
        left_out = tuple(f"{count} pair{'s' * (count != 1)} ({why})" for why, count in sorted(missing.items()))
        found.append(Comparison(measure, first, second, setting, difference, left_out))
    # Runs of one seed are no independent units: a seed's differences are averaged first, over the same settings.
    seeds = sorted({seed for pairs in by_setting.values() for seed in pairs})
    whole = [pairs for pairs in by_setting.values() if len(pairs) == len(seeds)]
    if seeds and len(whole) > 1:
        setting = f"mean over {len(whole)} of {len(by_setting)} settings, per seed"
        difference = mean_of([sum(pairs[seed] for pairs in whole) / len(whole) for seed in seeds])
        few = len(by_setting) - len(whole)
        left_out = (f"{few} setting{'s' * (few != 1)} without a pair of every seed",) if few else ()
        found.append(Comparison(measure, first, second, setting, difference, left_out, is_mean=True))
    return found


def _pairs(
    sweep: Sweep, measure: Measure, first: str, second: str, setting: str
) -> tuple[dict[str, float], Counter[str]]:
    """Returns first - second by seed, and why pairs are missing."""
    by_seed: dict[str, dict[str, Cell]] = {}
    for cell in sweep.cells:
        if cell.variant in (first, second) and cell.setting() == setting:
            by_seed.setdefault(value_text(cell.seed), {})[cell.variant] = cell
    pairs, missing = {}, Counter[str]()
    for seed, cells in by_seed.items():
        values = [measure.of(cells[name]) if name in cells else math.nan for name in (first, second)]
        if all(map(math.isfinite, values)):
            pairs[seed] = values[0] - values[1]
        else:
            missing[_why_missing(cells, first, second, measure)] += 1
    return pairs, missing


def _why_missing(cells: dict[str, Cell], first: str, second: str, measure: Measure) -> str:
    absent = [name for name in (first, second) if name not in cells]
    if absent:
        return f"{' and '.join(absent)} not finished"
    bad = [f"{name} {cells[name].state}" for name in (first, second) if cells[name].state != "done"]
    return " and ".join(bad) or f"{measure.name} not measured"


def _adjusted(items: list[Comparison]) -> list[Comparison]:
    """Adjusts for the number of comparisons: few means over settings do not pay for many single settings."""
    adjusted: dict[int, Comparison] = {}
    for is_mean in (False, True):
        family = [index for index, item in enumerate(items) if item.is_mean == is_mean and takes_part(item.difference)]
        for index, p in zip(family, holm([items[index].difference.p for index in family]), strict=True):
            adjusted[index] = replace(items[index], adjusted_p=p, family=len(family))
    return [adjusted.get(index, item) for index, item in enumerate(items)]


@dataclass(frozen=True)
class Sensitivity:
    """The learning-rate sensitivity of one variant at one place on the other axes.

    Attributes:
        variant: The variant.
        setting: The place.
        by_seed: The number of each seed that has all learning rates.
        num_incomplete: Seeds that lack a run.
        num_undefined: Seeds whose every run ended no lower than it began.
    """

    variant: str
    setting: str
    by_seed: dict[str, float]
    num_incomplete: int
    num_undefined: int

    @property
    def mean(self) -> Mean:
        """Over seeds."""
        return mean_of(list(self.by_seed.values()))


def learning_rates(sweep: Sweep) -> list[float]:
    """Returns the learning rates that were swept, in rising order; [] where there is only one."""
    rates = [float(value) for value in sweep.axes.get(LEARNING_RATE, []) if is_number(value)]
    return sorted(rates) if len(rates) > 1 else []


def are_log_spaced(rates: Sequence[float]) -> bool:
    """Returns whether the learning rates are evenly spaced in their logarithm, to 15 % (1, 3, 10 are)."""
    steps = np.diff(np.log(rates))
    return bool(steps.size == 0 or steps.max() <= 1.15 * steps.min())


def sensitivities(sweep: Sweep) -> list[Sensitivity]:
    """Returns the learning-rate sensitivity of every variant and setting; [] where one rate was run."""
    rates = learning_rates(sweep)
    if not rates:
        return []
    found = []
    for setting in sweep.settings(LEARNING_RATE):
        for variant in sweep.variants:
            cells = [c for c in sweep.cells if c.variant == variant and c.setting(LEARNING_RATE) == setting]
            if cells:
                found.append(_sensitivity(variant, setting, cells, rates))
    return found


def _sensitivity(variant: str, setting: str, cells: list[Cell], rates: list[float]) -> Sensitivity:
    by_seed: dict[str, float] = {}
    num_incomplete = num_undefined = 0
    for seed in sorted({value_text(cell.seed) for cell in cells}):
        of_rate = {c.axes.get(LEARNING_RATE): c for c in cells if value_text(c.seed) == seed and c.has_outcome}
        runs = [of_rate[rate] for rate in rates if rate in of_rate and math.isfinite(of_rate[rate].initial_loss)]
        if len(runs) < len(rates):
            num_incomplete += 1
            continue
        value = learning_rate_sensitivity([c.value("final_loss") for c in runs], [c.initial_loss for c in runs])
        if math.isnan(value):
            num_undefined += 1
        else:
            by_seed[seed] = value
    return Sensitivity(variant, setting, by_seed, num_incomplete, num_undefined)


def _compare_sensitivities(sweep: Sweep, pairs: list[tuple[str, str]]) -> list[Comparison]:
    by_place = {(item.variant, item.setting): item for item in sensitivities(sweep)}
    found = []
    for first, second in pairs:
        for setting in sweep.settings(LEARNING_RATE):
            one, other = by_place.get((first, setting)), by_place.get((second, setting))
            if one is None or other is None:
                continue
            seeds = sorted(one.by_seed.keys() & other.by_seed.keys())
            difference = mean_of([one.by_seed[seed] - other.by_seed[seed] for seed in seeds])
            num_seeds = max(len(item.by_seed) + item.num_incomplete + item.num_undefined for item in (one, other))
            missing = num_seeds - len(seeds)
            reasons = {
                "a learning rate is missing": any(item.num_incomplete for item in (one, other)),
                "no rate got below the first loss": any(item.num_undefined for item in (one, other)),
            }
            why = " or ".join(reason for reason, holds in reasons.items() if holds) or "not in both"
            left_out = (f"{missing} seed{'s' * (missing != 1)} ({why})",) if missing else ()
            found.append(Comparison(SENSITIVITY, first, second, setting, difference, left_out))
    return found


def divergence_rows(sweep: Sweep) -> list[tuple[str, str, int, int, int, float]]:
    """Returns (variant, setting, runs with an outcome, diverged, failed, mean spikes of the others) per place."""
    rows = []
    for setting in sweep.settings():
        for variant in sweep.variants:
            cells = [cell for cell in sweep.cells if cell.variant == variant and cell.setting() == setting]
            if not cells:
                continue
            spikes = [value for cell in cells if math.isfinite(value := cell.value("spikes"))]
            states = Counter(cell.state for cell in cells)
            num_outcomes = sum(cell.has_outcome for cell in cells)
            mean = sum(spikes) / len(spikes) if spikes else math.nan
            rows.append((variant, setting, num_outcomes, states["diverged"], states["failed"], mean))
    return rows
