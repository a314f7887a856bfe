"""What measuring cost: the recorded seconds of each measurement (`measuring_seconds`) beside those of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mlra_scale.study.report.records import series
from mlra_scale.training.run_reader import Record

_NAMES = {
    "tev": "TEV",
    "gradients": "gradient statistics",
    "noise": "noise scale, with gradient statistics",
    "activations": "activation probe",
    "tasks": "perplexity of texts",
    "qk_clip": "QK-clip",
    "replay": "replay against corruption",
}
_WITHIN_A_STEP = ["tev", "gradients", "noise", "qk_clip", "replay"]
"""Measurements whose time `tokens_per_second` counts as part of a step."""


class Costs(NamedTuple):
    """Median seconds of a step without its measurements, number of steps, seconds of every measurement by name."""

    step_seconds: float
    steps: int
    seconds: dict[str, pd.Series]


def costs_of(records: Sequence[Record]) -> Costs | None:
    """Returns what measuring cost in a run, or None if the run has not recorded it."""
    records = [record for record in records if record["step"] > 0]
    seconds = {name: series(records, f"measuring_seconds.{name}").dropna() for name in _NAMES}
    rates = {name: series(records, name) for name in ("tokens_per_second", "consumed_tokens")}
    table = pd.DataFrame({**seconds, **rates})
    table["measured"] = table[_WITHIN_A_STEP].sum(axis=1).cumsum()
    # Each recorded rate is the mean since the one before it.
    rated = table[(table.tokens_per_second > 0) & table.consumed_tokens.notna()]
    steps, tokens, measured = (np.diff(of, prepend=0.0) for of in (rated.index, rated.consumed_tokens, rated.measured))
    step_seconds = (tokens / rated.tokens_per_second.to_numpy() - measured) / steps
    step_seconds = step_seconds[step_seconds > 0]
    if step_seconds.size == 0 or all(values.empty for values in seconds.values()):
        return None
    taken = {name: values for name, values in seconds.items() if not values.empty}
    return Costs(float(np.median(step_seconds)), int(records[-1]["step"]), taken)


def costs_table(runs: Sequence[Costs]) -> dict[str, Any] | None:
    """Returns the variables of the template's section: medians over runs; None without any."""
    if not runs:
        return None
    rows, once = [], {}
    for key, name in _NAMES.items():
        found = pd.DataFrame(
            (s.size, s.median(), s.median() / run.step_seconds, s.sum() / (run.steps * run.step_seconds))
            for run in runs
            if (s := run.seconds.get(key)) is not None
        )
        if not found.empty:
            times, once[key], of_step, share = found.median()
            rows.append((name, int(times), once[key], of_step, share))
    return {
        "rows": rows,
        "ratio": once["tev"] / once["gradients"] if once.get("gradients", 0.0) > 0 and "tev" in once else None,
        "num_runs": len(runs),
        "step_seconds": float(np.median([run.step_seconds for run in runs])),
    }
