"""What measuring cost: the seconds that runs have recorded of it (`measuring_seconds`), beside those of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlra_scale.study.report import page
from mlra_scale.study.report.run_record import Record, at, is_number
from mlra_scale.study.verdicts import number

_NAMES = {
    "tev": "TEV",
    "gradients": "gradient statistics",
    "noise": "noise scale, with gradient statistics",
    "activations": "activation probe",
    "qk_clip": "QK-clip",
}
_WITHIN_A_STEP = ("tev", "gradients", "noise", "qk_clip")
"""These are in what `tokens_per_second` counts as a step."""


@dataclass(frozen=True)
class Costs:
    """What measuring cost in one run.

    Attributes:
        step_seconds: Median time of a training step, what was measured in it left out.
        steps: Steps that were recorded.
        seconds: By measurement, the seconds of every time.
    """

    step_seconds: float
    steps: int
    seconds: dict[str, tuple[float, ...]]


def costs_of(records: Iterable[Record]) -> Costs | None:
    """Returns what measuring cost in a run, or None where it has not recorded that.

    Args:
        records: Its record.
    """
    records = [record for record in records if is_number(record.get("step")) and record["step"] > 0]
    seconds = {name: tuple(_numbers(records, name)) for name in _NAMES}
    steps = _step_seconds(records)
    if not steps or not any(seconds.values()):
        return None
    return Costs(float(np.median(steps)), int(records[-1]["step"]), {k: v for k, v in seconds.items() if v})


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    found = [at(record, f"measuring_seconds.{name}") for record in records]
    return [float(value) for value in found if is_number(value)]


def _step_seconds(records: Sequence[Record]) -> list[float]:
    """The time of a step, without what was measured in it, from every record of the rate since the one before."""
    found = []
    since, read, measured = 0.0, 0.0, 0.0
    for record in records:
        measured += sum(seconds for name in _WITHIN_A_STEP for seconds in _numbers([record], name))
        rate, tokens, step = (record.get(name) for name in ("tokens_per_second", "consumed_tokens", "step"))
        if not (is_number(rate) and rate > 0 and is_number(tokens) and is_number(step)) or step <= since:
            continue
        found.append(((tokens - read) / rate - measured) / (step - since))
        since, read, measured = step, tokens, 0.0
    return [seconds for seconds in found if seconds > 0]


def costs_section(runs: Sequence[Costs]) -> list[str]:
    """Returns the section about one run or several: medians over them."""
    if not runs:
        return [page.paragraph("Not measured: no run has recorded it (measuring_seconds).")]
    rows = []
    once: dict[str, float] = {}
    for key, name in _NAMES.items():
        found = [run for run in runs if key in run.seconds]
        if not found:
            continue
        once[key] = float(np.median([np.median(run.seconds[key]) for run in found]))
        of_step = np.median([np.median(run.seconds[key]) / run.step_seconds for run in found])
        share = np.median([sum(run.seconds[key]) / (run.steps * run.step_seconds) for run in found])
        times = int(np.median([len(run.seconds[key]) for run in found]))
        rows.append((name, times, number(once[key], 3), f"{100 * of_step:.1f} %", f"{100 * share:.2f} %"))
    head = ("measurement", "times per run", "seconds each", "of a step, each", "of the time of all steps")
    parts = [page.table(head, rows, numbers=(1, 2, 3, 4))]
    if once.get("gradients", 0.0) > 0 and "tev" in once:
        parts.append(
            page.paragraph(f"TEV took {once['tev'] / once['gradients']:.2f} times what gradient statistics took.")
        )
    over = f" over {len(runs)} runs" if len(runs) > 1 else ""
    step = number(float(np.median([run.step_seconds for run in runs])), 3)
    note = f"Medians{over} of what rank 0 has timed; a step, what was measured in it left out, took {step} s."
    return [*parts, page.paragraph(note, "small")]
