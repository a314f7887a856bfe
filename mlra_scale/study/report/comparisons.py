"""Paired comparisons between the variants of a sweep, and stability over learning rates."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from mlra_scale.study.report.records import is_number
from mlra_scale.study.report.statistics import Mean, holm, learning_rate_sensitivity, mean_of
from mlra_scale.study.report.sweep_record import FINAL_LOSS, LEARNING_RATE, MEASURES, Measure, SweepRecord, setting_text
from mlra_scale.study.report.wording import is_claimable, is_supported, verdict

SENSITIVITY = Measure("learning-rate sensitivity", "nats per token", "")


@dataclass(frozen=True)
class PairedComparison:
    """The difference of two variants, first - second, between runs of the same seed and setting.

    Attributes:
        measure: What was compared.
        first: A variant.
        second: The variant that is subtracted.
        setting: The setting.
        difference: The mean difference over seeds.
        left_out: Why pairs are missing, with their number.
        is_mean: Whether it is the mean over settings.
        adjusted_p: p-value, adjusted by Holm's method over the claimable comparisons of the same measure, means over
            settings and single settings each among themselves; nan for others.
        num_adjusted: Number of these comparisons.
    """

    measure: Measure
    first: str
    second: str
    setting: str
    difference: Mean
    left_out: tuple[str, ...]
    is_mean: bool = False
    adjusted_p: float = math.nan
    num_adjusted: int = 0

    @property
    def is_claimable(self) -> bool:
        """Whether a claim can be made."""
        return is_claimable(self.difference)

    @property
    def is_supported(self) -> bool:
        """Whether a difference is claimed."""
        return is_supported(self.difference, self.adjusted_p)

    @property
    def names(self) -> str:
        """The two variants."""
        return f"{self.first} - {self.second}"

    @property
    def statement(self) -> str:
        """What it supports, and what is missing."""
        missing = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{verdict(self.difference, self.adjusted_p, self.num_adjusted)}{missing}."


def compare(sweep: SweepRecord) -> list[PairedComparison]:
    """Compares every two variants in every setting by every measure that was recorded, measure by measure."""
    pairs = [(later, earlier) for earlier, later in itertools.combinations(sweep.variants, 2)]
    found: list[PairedComparison] = []
    for measure in MEASURES:
        if sweep.cells[measure.name].notna().any():
            found += _adjusted([item for pair in pairs for item in _compare(sweep, measure, *pair)])
    return found + _adjusted(_compare_sensitivities(sweep, pairs))


def _compare(sweep: SweepRecord, measure: Measure, first: str, second: str) -> list[PairedComparison]:
    """Compares two variants in every setting, and in the mean over settings if there are several."""
    sides = {
        name: sweep.cells[sweep.cells.variant == name]
        .drop_duplicates(["setting", "seed"], keep="last")
        .set_index(["setting", "seed"])[["state", measure.name]]
        .set_axis(["state", "value"], axis=1)
        for name in (first, second)
    }
    pairs = pd.concat(sides, axis=1)
    difference = pairs[first].value - pairs[second].value
    states = pairs.xs("state", axis=1, level=1)
    missing = {key: _why_missing(states.loc[key], measure) for key in difference.index[difference.isna()]}
    settings, found = sweep.settings(), []
    for setting in settings:
        mean = mean_of(difference[difference.index.get_level_values("setting") == setting].dropna())
        counts = sorted(Counter(why for (where, _), why in missing.items() if where == setting).items())
        left_out = tuple(f"{_plural(count, 'pair')} ({why})" for why, count in counts)
        found.append(PairedComparison(measure, first, second, setting, mean, left_out))
    # Runs of one seed are not independent: their differences are averaged first, over settings that all seeds have.
    by_seed = difference.unstack("setting").dropna(how="all")
    complete = by_seed.dropna(axis=1)
    if len(by_seed) > 0 and complete.shape[1] > 1:
        setting = f"mean over {complete.shape[1]} of {len(settings)} settings, per seed"
        few = len(settings) - complete.shape[1]
        left_out = (f"{_plural(few, 'setting')} without a pair of every seed",) if few else ()
        mean = mean_of(complete.mean(axis=1))
        found.append(PairedComparison(measure, first, second, setting, mean, left_out, is_mean=True))
    return found


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _why_missing(states: pd.Series, measure: Measure) -> str:
    """Returns why a pair is missing, from the states of its two variants; nan: the cell is not finished."""
    if absent := [name for name, state in states.items() if not isinstance(state, str)]:
        return f"{' and '.join(absent)} not finished"
    bad = [f"{name} {state}" for name, state in states.items() if state != "done"]
    return " and ".join(bad) or f"{measure.name} not measured"


def _adjusted(items: list[PairedComparison]) -> list[PairedComparison]:
    """Adjusts p-values, means over settings and single settings each among themselves."""
    result = list(items)
    for is_mean in (False, True):
        chosen = [index for index, item in enumerate(items) if item.is_mean == is_mean and item.is_claimable]
        for index, p in zip(chosen, holm([items[index].difference.p for index in chosen]), strict=True):
            result[index] = replace(items[index], adjusted_p=p, num_adjusted=len(chosen))
    return result


class Sensitivity(NamedTuple):
    """The learning-rate sensitivity of one variant in one setting of the other axes.

    Attributes:
        variant: The variant.
        setting: The setting.
        by_seed: The sensitivity of each seed that has all learning rates.
        num_incomplete: Number of seeds that lack a run.
        num_undefined: Number of seeds of which no run ended below its initial loss.
    """

    variant: str
    setting: str
    by_seed: dict[str, float]
    num_incomplete: int
    num_undefined: int

    @property
    def num_seeds(self) -> int:
        """Number of all seeds."""
        return len(self.by_seed) + self.num_incomplete + self.num_undefined


def learning_rates(sweep: SweepRecord) -> list[float]:
    """Returns the learning rates of the sweep, sorted; [] if there is only one."""
    rates = sorted(float(value) for value in sweep.axes.get(LEARNING_RATE, []) if is_number(value))
    return rates if len(rates) > 1 else []


def are_log_spaced(rates: Sequence[float]) -> bool:
    """Returns whether learning rates are evenly spaced in their logarithm, to 15 % (1, 3, 10 are)."""
    steps = np.diff(np.log(rates))
    return bool(steps.size == 0 or steps.max() <= 1.15 * steps.min())


def sensitivities(sweep: SweepRecord) -> list[Sensitivity]:
    """Returns the learning-rate sensitivity of every setting and variant; [] if there is one rate."""
    rates = learning_rates(sweep)
    if not rates:
        return []
    cells = sweep.cells.assign(setting=[setting_text(axes, LEARNING_RATE) for axes in sweep.cells.axis_values])
    groups = dict(list(cells.groupby(["setting", "variant"])))
    order = [(setting, variant) for setting in sweep.settings(LEARNING_RATE) for variant in sweep.variants]
    return [_sensitivity(*key, groups[key], rates) for key in order if key in groups]


def _sensitivity(setting: str, variant: str, cells: pd.DataFrame, rates: list[float]) -> Sensitivity:
    by_seed, num_incomplete, num_undefined = {}, 0, 0
    for seed, own in cells.groupby("seed"):
        runs = own[has_outcome(own) & own.initial_loss.notna() & own.rate.notna()].drop_duplicates("rate", keep="last")
        value = learning_rate_sensitivity(runs[FINAL_LOSS], runs.initial_loss)
        if len(runs) < len(rates):
            num_incomplete += 1
        elif math.isnan(value):
            num_undefined += 1
        else:
            by_seed[str(seed)] = value
    return Sensitivity(variant, setting, by_seed, num_incomplete, num_undefined)


def has_outcome(cells: pd.DataFrame) -> pd.Series:
    """Returns which runs were stable or diverged; a run that failed for other reasons has no outcome."""
    return cells.state.isin(["done", "diverged"])


def _compare_sensitivities(sweep: SweepRecord, pairs: list[tuple[str, str]]) -> list[PairedComparison]:
    found_of = {(item.variant, item.setting): item for item in sensitivities(sweep)}
    found = []
    for (first, second), setting in itertools.product(pairs, sweep.settings(LEARNING_RATE)):
        if (first, setting) not in found_of or (second, setting) not in found_of:
            continue
        sides = [found_of[first, setting], found_of[second, setting]]
        seeds = sorted(sides[0].by_seed.keys() & sides[1].by_seed.keys())
        difference = mean_of([sides[0].by_seed[seed] - sides[1].by_seed[seed] for seed in seeds])
        missing = max(item.num_seeds for item in sides) - len(seeds)
        reasons = {
            "a learning rate is missing": any(item.num_incomplete for item in sides),
            "no run ended below its initial loss": any(item.num_undefined for item in sides),
        }
        why = " or ".join(reason for reason, holds in reasons.items() if holds) or "not in both"
        left_out = (f"{_plural(missing, 'seed')} ({why})",) if missing else ()
        found.append(PairedComparison(SENSITIVITY, first, second, setting, difference, left_out))
    return found


def stability_table(sweep: SweepRecord) -> pd.DataFrame:
    """Returns by setting and variant the numbers of runs: outcomes, diverged, failed; and mean spikes of those done."""
    cells = sweep.cells.assign(outcomes=has_outcome(sweep.cells))
    cells = cells.assign(**{state: cells.state == state for state in ("diverged", "failed")})
    table = cells.groupby(["setting", "variant"]).agg(
        {"outcomes": "sum", "diverged": "sum", "failed": "sum", "spikes": "mean"}
    )
    order = [(setting, variant) for setting in sweep.settings() for variant in sweep.variants]
    return table.reindex([key for key in order if key in table.index]).reset_index()
