"""Reads the runs of a sweep for the question whether anything warns of their events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from docs.studies.predict.events import Numbers, Protocol, first_event
from docs.studies.predict.windows import Run
from mlra_scale.config import stored_yaml
from mlra_scale.config.json_text import printable, read_json_object
from mlra_scale.training.record import read_record
from mlra_scale.training.run_directory import RunDirectory

POISONED = "poisoned"
"""Variants whose name begins so had bad batches given to them from outside."""
_NON_FINITE = 3


class PredictionError(ValueError):
    """The sweep cannot be read; its text says why."""


@dataclass(frozen=True)
class LeftOut:
    """A cell that takes no part.

    Attributes:
        cell: Its name.
        reason: Why.
    """

    cell: str
    reason: str


@dataclass(frozen=True)
class SweptRuns:
    """What a sweep left.

    Attributes:
        runs: Those that are analysed.
        unstable_from_start: Cells whose event came too early for any window.
        poisoned: By cell, whether an event was found.
        left_out: The others.
        about: What study.json says of where the sweep ran.
    """

    runs: tuple[Run, ...]
    unstable_from_start: tuple[str, ...]
    poisoned: dict[str, bool]
    left_out: tuple[LeftOut, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


def read_runs(folder: Path, protocol: Protocol) -> SweptRuns:
    """Reads a sweep's output folder.

    Args:
        folder: It holds results.jsonl and the run directories.
        protocol: What an event is.

    Raises:
        PredictionError: There is no result, or a record lacks what the analysis needs.
    """
    try:
        return _read_runs(folder, protocol)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = str(error) if str(folder) in str(error) else f"{folder} holds what no sweep wrote: {error!r}"
        raise PredictionError(printable(reason)) from error


def _read_runs(folder: Path, protocol: Protocol) -> SweptRuns:
    results = folder / "results.jsonl"
    # A cell that was run again is there again; its last line counts.
    cells = {item["cell"]: item for item in read_record(results, "cell")}
    if not cells:
        raise PredictionError(f"{results}: no results; give the output folder of tools/sweep.py")
    runs, early, left_out = [], [], []
    poisoned: dict[str, bool] = {}
    for cell, item in cells.items():
        if item["state"] == "failed":
            left_out.append(LeftOut(cell, f"failed: {item.get('error')}"))
            continue
        run_directory = RunDirectory(folder / item["run"])
        events = read_record(run_directory.events, "event")
        if any(event["event"].startswith("guard_") for event in events):
            left_out.append(LeftOut(cell, "the guard acted"))
            continue
        run = read_run(item, run_directory, events, protocol)
        if item["variant"].startswith(POISONED):
            poisoned[cell] = run.event is not None
        elif run.event is not None and run.event.step < protocol.first_step:
            early.append(cell)
        else:
            runs.append(run)
    about = folder / "study.json"
    known = read_json_object(about) if about.is_file() else {}
    return SweptRuns(tuple(runs), tuple(early), poisoned, tuple(left_out), known)


def read_run(
    result: Mapping[str, Any], run_directory: RunDirectory, events: Sequence[Mapping[str, Any]], protocol: Protocol
) -> Run:
    """Reads one run.

    Args:
        result: Its line of results.jsonl.
        run_directory: Where it lies.
        events: Its event log.
        protocol: What an event is.

    Raises:
        PredictionError: The loss of some step was not recorded, or there is no configuration.
    """
    record = [item for item in read_record(run_directory.metrics, "step") if item["step"] > 0]
    steps = [item["step"] for item in record if "loss" in item]
    if steps != list(range(1, len(steps) + 1)) or len(steps) != len(record):
        raise PredictionError(f"{run_directory.metrics}: the loss of every step is needed: train.log_every=1")
    is_stopped = any(event["event"] == "stopped" and event.get("exit_code") == _NON_FINITE for event in events[-1:])
    # JSON has no word for infinity: a loss that is no number was written as null, and the run is over there.
    finite = next((place for place, item in enumerate(record) if item["loss"] is None), len(record))
    is_stopped, record = is_stopped or finite < len(record), record[:finite]
    losses = _column([item["loss"] for item in record])
    try:
        config = stored_yaml.parse(stored_yaml.read_text(run_directory.config))
    except ValueError as error:
        raise PredictionError(f"{run_directory.config}: {error}") from None
    return Run(
        cell=result["cell"],
        variant=result["variant"],
        seed=result["seed"],
        shape=json.dumps(config["model"], sort_keys=True),
        twin=json.dumps(_without_seeds(config), sort_keys=True),
        rates=_column([item["learning_rate"] for item in record]),
        series={
            "tev_mean": _column([item.get("tev_mean") for item in record]),
            "tev_std": _column([item.get("tev_std") for item in record]),
            "gradient_norm": _column([item.get("gradient_norm") for item in record]),
            "shallow_gradient_variance": _column([shallow_gradient_variance(item) for item in record]),
            "largest_logit": _column([item.get("activations", {}).get("max_logit") for item in record]),
            "loss": losses,
        },
        event=first_event(losses, is_stopped, protocol),
    )


def shallow_gradient_variance(item: Mapping[str, Any]) -> float | None:
    """Returns the geometric mean of the gradient variances of the embedding and of the first two blocks.

    Args:
        item: A line of the record.

    Returns:
        The mean; None where it was not measured or one of them is not positive.
    """
    gradients = item.get("gradients")
    if gradients is None:
        return None
    variances = [gradients["kinds"]["embedding"]["gradient_variance"], *gradients["layers"]["gradient_variance"][:2]]
    if any(value is None or value <= 0.0 for value in variances):
        return None
    return float(np.exp(np.mean(np.log(variances))))


def _column(values: Sequence[float | None]) -> Numbers:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _without_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in section.items() if key != "seed"} if isinstance(section, dict) else section
        for name, section in config.items()
    }
