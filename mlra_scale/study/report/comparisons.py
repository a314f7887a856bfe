"""Paired comparisons between the variants of a sweep, and stability over learning rates."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mlra_scale.study.report.statistics import LEVEL, Mean, holm, learning_rate_sensitivity, mean_of
from mlra_scale.study.report.sweep_record import FINAL_LOSS, LEARNING_RATE, MEASURES, Measure, SweepRecord, setting_text
from mlra_scale.study.report.wording import interval, number, p_text, to_error_digits, with_error
from mlra_scale.training.run_reader import is_number

MIN_PAIRS = 3
"""With fewer pairs no claim is made."""
SENSITIVITY = Measure("learning-rate sensitivity", "nats per token", "")


@dataclass(frozen=True)
class PairedComparison:
    """The difference of two variants, first - second, between runs of the same seed and setting.

    Attributes:
        measure: What was compared.
        first, second: The variants; the second is subtracted.
        setting: The setting.
        difference: The mean difference over seeds.
        left_out: Why pairs are missing, with their number.
        is_mean: Whether it is the mean over settings.
        adjusted_p: p-value, adjusted by Holm's method over the claimable comparisons of its family; nan for others.
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
        """Whether a claim can be made; only such differences count as comparisons."""
        return self.difference.n >= MIN_PAIRS and self.difference.has_spread

    @property
    def is_supported(self) -> bool:
        """Whether a difference is claimed: its interval excludes 0, and its adjusted p-value is below 1 - LEVEL."""
        return self.is_claimable and self.difference.excludes_zero and self.adjusted_p < 1.0 - LEVEL

    @property
    def sign(self) -> int:
        """-1 if the first variant is lower, else 1."""
        return -1 if self.difference.value < 0 else 1

    @property
    def family(self) -> tuple[str, bool]:
        """What its p-value is adjusted for: the comparisons of one measure, means over settings apart."""
        return self.measure.name, self.is_mean

    @property
    def names(self) -> str:
        """The two variants."""
        return f"{self.first} - {self.second}"

    @property
    def statement(self) -> str:
        """A sentence about what it supports, and what is missing."""
        missing = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self._verdict()}{missing}."

    def _verdict(self) -> str:
        difference, n, shown = self.difference, self.difference.n, with_error(self.difference)
        ends = f"{100 * LEVEL:.0f} % interval {interval(difference)}"
        if n == 0:
            return "no pair is finished, so no claim is made"
        if n < MIN_PAIRS:
            return f"no claim is made with fewer than {MIN_PAIRS} pairs: {shown}, n = {n}"
        if not difference.has_spread:
            same = "0" if difference.value == 0.0 else number(difference.value)
            return f"no claim is made: the difference is {same} in each of the {n} pairs, so its error is unknown"
        if not difference.excludes_zero:
            return f"no difference is supported: {shown} ({ends}), n = {n}"
        count = f"{self.num_adjusted} comparison{'s' * (self.num_adjusted != 1)}"
        adjusted = f"Holm-adjusted p {p_text(self.adjusted_p)} over {count}"
        if not self.is_supported:
            alone = "excludes 0 when taken alone"
            return f"no difference is supported: {shown} ({ends}) {alone}, but {adjusted}, n = {n}"
        size = " +- ".join(to_error_digits(abs(difference.value), difference.error, error=difference.error))
        return f"{'lower' if self.sign < 0 else 'higher'} by {size}; the {ends} excludes 0, {adjusted}, n = {n}"


def compare(sweep: SweepRecord) -> list[PairedComparison]:
    """Compares every two variants in every setting by every measure that was recorded, measure by measure."""
    pairs = [(later, earlier) for earlier, later in itertools.combinations(sweep.variants, 2)]
    tables = [(measure, sweep.cells, sweep.settings()) for measure in MEASURES]
    tables.append((SENSITIVITY, sensitivities(sweep), sweep.settings(LEARNING_RATE)))
    found: list[PairedComparison] = []
    for measure, cells, settings in tables:
        if cells[measure.name].notna().any():
            found += _adjusted([item for pair in pairs for item in _compare(measure, cells, settings, *pair)])
    return found


def _compare(
    measure: Measure, cells: pd.DataFrame, settings: Sequence[str], first: str, second: str
) -> list[PairedComparison]:
    """Compares two variants in every setting, and in the mean over settings if there are several."""
    sides = {
        name: cells[cells.variant == name]
        .drop_duplicates(["setting", "seed"], keep="last")
        .set_index(["setting", "seed"])[["state", measure.name]]
        .set_axis(["state", "value"], axis=1)
        for name in (first, second)
    }
    pairs = pd.concat(sides, axis=1)
    difference = pairs[first].value - pairs[second].value
    states = pairs.xs("state", axis=1, level=1)
    missing = {key: _why_missing(states.loc[key], measure) for key in difference.index[difference.isna()]}
    found = []
    for setting in settings:
        mean = mean_of(difference[difference.index.get_level_values("setting") == setting].dropna())
        counts = sorted(Counter(why for (where, _), why in missing.items() if where == setting).items())
        left_out = tuple(f"{_plural(count, 'pair')} ({why})" for why, count in counts)
        found.append(PairedComparison(measure, first, second, setting, mean, left_out))
    # Runs of one seed are not independent: their differences are averaged first, over settings that all seeds have.
    by_seed = difference.unstack("setting").dropna(how="all")
    complete = by_seed.dropna(axis=1)
    if measure is not SENSITIVITY and len(by_seed) > 0 and complete.shape[1] > 1:
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


def learning_rates(sweep: SweepRecord) -> list[float]:
    """Returns the learning rates of the sweep, sorted; [] if there is only one."""
    rates = sorted(float(value) for value in sweep.axes.get(LEARNING_RATE, []) if is_number(value))
    return rates if len(rates) > 1 else []


def are_log_spaced(rates: Sequence[float]) -> bool:
    """Returns whether learning rates are evenly spaced in their logarithm, to 15 % (1, 3, 10 are)."""
    steps = np.diff(np.log(rates))
    return bool(steps.size == 0 or steps.max() <= 1.15 * steps.min())


def sensitivities(sweep: SweepRecord, loss: str = FINAL_LOSS) -> pd.DataFrame:
    """Returns the learning-rate sensitivity by setting of the other axes, variant and seed.

    Args:
        sweep: The sweep.
        loss: Column of its cells with the loss of a run; Wortsman et al. 2023, section 2.2, take the validation loss.

    Returns:
        A table whose column `state` says done, or why there is no value; no rows if there is one learning rate.
    """
    rates, rows = learning_rates(sweep), []
    cells = sweep.cells.assign(setting=[setting_text(axes, LEARNING_RATE) for axes in sweep.cells.axis_values])
    for key, own in cells.groupby(["setting", "variant", "seed"]) if rates else ():
        runs = own[has_outcome(own) & own.initial_loss.notna() & own.rate.notna()].drop_duplicates("rate", keep="last")
        value, state = learning_rate_sensitivity(runs[loss], runs.initial_loss), "done"
        if len(runs) < len(rates):
            value, state = math.nan, "without all learning rates"
        elif math.isnan(value):
            state = "undefined: no run ended below its initial loss"
        rows.append((*key, value, state))
    return pd.DataFrame(rows, columns=["setting", "variant", "seed", SENSITIVITY.name, "state"])


def has_outcome(cells: pd.DataFrame) -> pd.Series:
    """Returns which runs were stable or diverged; a run that failed for other reasons has no outcome."""
    return cells.state.isin(["done", "diverged"])


def stability_table(sweep: SweepRecord) -> pd.DataFrame:
    """Returns by setting and variant the numbers of runs: outcomes, diverged, failed; and mean spikes of those done."""
    cells = sweep.cells.assign(outcomes=has_outcome(sweep.cells))
    cells = cells.assign(**{state: cells.state == state for state in ("diverged", "failed")})
    table = cells.groupby(["setting", "variant"]).agg(
        {"outcomes": "sum", "diverged": "sum", "failed": "sum", "spikes": "mean"}
    )
    order = [(setting, variant) for setting in sweep.settings() for variant in sweep.variants]
    return table.reindex([key for key in order if key in table.index]).reset_index()
