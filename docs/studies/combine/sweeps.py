"""The second and third sweep, made from the screening: each arm at its own best rate, by the rule of README.md."""

from __future__ import annotations

import math
from pathlib import Path

from docs.studies.combine.protocol import ARMS, DEPTHS, RATES, RATES_DEPTH, SEEDS
from mlra_scale.files import write_atomically
from mlra_scale.study.grid import Study, load_study
from mlra_scale.study.report.sweep_record import DEPTH, LEARNING_RATE, MEASURES, SweepRecord, open_sweep

NAMES = ("rates", "depths")
VALIDATION = MEASURES[1].name


class SweepError(ValueError):
    """A sweep cannot be made or read; its text says why."""


def best_rates(screening: SweepRecord) -> dict[str, float]:
    """Returns the rate with the lowest validation loss of every arm, the lower one of equal losses.

    A run that diverged counts as infinitely high.

    Raises:
        SweepError: A run of a named arm is missing or failed, or all runs of an arm diverged.
    """
    found, problems = {}, []
    planned = screening.plan.get("axes") or screening.axes  # of a sweep in progress, rates may have no result yet
    rates = planned.get(LEARNING_RATE, [])
    for arm in dict.fromkeys([*ARMS, *screening.variants]):
        cells = screening.cells[screening.cells.variant == arm]
        losses = {
            float(rate): math.inf if state == "diverged" else loss
            for rate, state, loss in zip(cells.rate, cells.state, cells[VALIDATION], strict=True)
            if state == "diverged" or math.isfinite(loss)
        }
        if arm in ARMS and len(losses) < max(2, len(rates)):
            problems.append(f"{arm}: {len(losses)} of {len(rates)} rates have a result")
        elif losses and min(losses.values()) < math.inf:
            found[arm] = min(losses, key=lambda rate: (losses[rate], rate))
        elif arm in ARMS:
            problems.append(f"{arm}: every rate diverged")
    if problems:
        raise SweepError(f"{screening.path} names no rates yet: {'; '.join(problems)}")
    return found


def choose(folder: Path) -> dict[str, Path]:
    """Writes the studies of the second and third sweep into the folder of the screening.

    Returns:
        Their files by the names of the sweeps.

    Raises:
        SweepError: The screening is not complete.
    """
    file = folder / "sweep.yaml"
    if not file.exists():
        raise SweepError(f"{folder} holds no sweep; run tools/sweep.py docs/studies/combine.yaml first")
    screening, best = load_study(file), best_rates(open_sweep(folder))
    written = {}
    for name, study in zip(NAMES, sweeps_of(screening, best), strict=True):
        written[name] = folder / f"{name}.yaml"
        write_atomically(written[name], study.to_yaml())
    return written


def sweeps_of(screening: Study, best: dict[str, float]) -> tuple[Study, Study]:
    """Returns the second sweep, all rates at one depth, and the third, the best rate at other depths."""
    arms = {arm: screening.variants[arm] for arm in ARMS}
    seeds = {"seeds": SEEDS, "description": ""}
    rates = {"name": "combine-rates", "variants": arms, "axes": {DEPTH: [RATES_DEPTH], LEARNING_RATE: [*RATES]}}
    at_best = {arm: {**fields, LEARNING_RATE: best[arm]} for arm, fields in arms.items()}
    depths = {"name": "combine-depths", "variants": at_best, "axes": {DEPTH: [*DEPTHS]}}
    return screening.model_copy(update={**rates, **seeds}), screening.model_copy(update={**depths, **seeds})
