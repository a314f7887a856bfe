"""Whether any signal precedes a loss spike or a divergence: the analysis that README.md fixed before any run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from docs.studies.predict.alarms import halves, sound, summarize
from docs.studies.predict.areas import comparable, interval, resampled_counts, roc_area, roc_areas
from docs.studies.predict.events import Protocol
from docs.studies.predict.runs import SweptRuns, read_runs
from docs.studies.predict.text import as_markdown
from docs.studies.predict.windows import COMPARISONS, SIGNALS, Comparison, Windows, comparison_keys, cut_windows
from mlra_scale.files import write_atomically

PRIMARY = ("tev_mean", "tev_std")
DECISIVE: tuple[Comparison, ...] = ("matched", "twins")
"""A verdict is what both say."""
RIVALS = ("shallow_gradient_variance", "gradient_norm", "loss")
_COVERAGE = 0.95
_PRIMARY_COVERAGE = 1.0 - 0.05 / len(PRIMARY)
_SEED = 2409_07787


def predict(folder: Path, output: Path, protocol: Protocol | None = None) -> dict[str, Any]:
    """Analyses a sweep and writes prediction.json and prediction.md.

    Args:
        folder: The sweep's output folder.
        output: Where to write; made if need be.
        protocol: Other numbers than the fixed ones, for tests.

    Returns:
        What prediction.json holds.

    Raises:
        PredictionError: The sweep cannot be read.
    """
    protocol = protocol or Protocol()
    result = analyse(read_runs(folder, protocol), protocol)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "prediction.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(output / "prediction.md", as_markdown(result))
    return result


def analyse(swept: SweptRuns, protocol: Protocol) -> dict[str, Any]:
    """Returns the whole analysis as plain values.

    Args:
        swept: The runs.
        protocol: The numbers.
    """
    stretches = {
        "near": (protocol.gap, protocol.horizon),
        "far": (protocol.horizon + 1, protocol.far_horizon),
    }
    comparisons = [
        {"stretch": name, "from": nearest, "to": farthest, **compare(swept, windows, comparison, protocol)}
        for name, (nearest, farthest) in stretches.items()
        for windows in [cut_windows(swept.runs, nearest, farthest, protocol)]
        for comparison in COMPARISONS
    ]
    decisive = [item for item in comparisons if item["stretch"] == "near" and item["comparison"] in DECISIVE]
    verdicts = {
        name: agreed([verdict(item["signals"][name], item["events"], protocol) for item in decisive])
        for name in PRIMARY
    }
    num_events = sum(run.event is not None for run in swept.runs)
    return {
        "study": swept.about,
        "protocol": asdict(protocol),
        "runs": {
            "analysed": len(swept.runs),
            "with_event": num_events,
            "without_event": len(swept.runs) - num_events,
            "seeds": sorted({run.seed for run in swept.runs}),
            "unstable_from_start": list(swept.unstable_from_start),
            "poisoned": swept.poisoned,
            "left_out": [asdict(item) for item in swept.left_out],
        },
        "events": [
            {"cell": run.cell, "kind": run.event.kind, "step": run.event.step, "rate": run.rates[run.event.step - 2]}
            for run in swept.runs
            if run.event is not None
        ],
        "comparisons": comparisons,
        "verdicts": verdicts,
        "claim": claim(verdicts),
    }


def compare(swept: SweptRuns, windows: Windows, comparison: Comparison, protocol: Protocol) -> dict[str, Any]:
    """Returns areas, differences and alarms of all signals in one comparison.

    Args:
        swept: The runs.
        windows: Those of one stretch.
        comparison: What is compared with what.
        protocol: The numbers.
    """
    keys = comparison_keys(swept.runs, windows, comparison)
    field = comparable(keys, windows.is_positive, windows.run)
    counts = resampled_counts(field, protocol.resamples, _SEED)
    areas = {name: roc_area(field, values) for name, values in windows.signals.items()}
    resampled = {name: roc_areas(field, values, counts) for name, values in windows.signals.items()}
    half = halves(swept.runs)
    signals: dict[str, Any] = {}
    for name in SIGNALS:
        values = windows.signals[name]
        alarms = summarize(swept.runs, windows, keys, sound(windows, values, keys, half, protocol.false_alarms))
        signals[name] = {
            "area": _number(areas[name]),
            "interval": interval(resampled[name], _COVERAGE),
            "alarms": asdict(alarms),
        }
        if comparison == "pooled":
            # Windows of the same key are all windows of a control there.
            signals[name]["alarms"]["chance"] = None
        if name in PRIMARY:
            signals[name]["primary_interval"] = interval(resampled[name], _PRIMARY_COVERAGE)
            signals[name]["differences"] = {
                rival: {
                    "difference": _number(areas[name] - areas[rival]),
                    "interval": interval(resampled[name] - resampled[rival], _COVERAGE),
                }
                for rival in RIVALS
            }
    return {
        "comparison": comparison,
        "events": len(field.event_units),
        "controls": len(field.control_units),
        "positive_windows": len(field.positive),
        "negative_windows": len(field.negative),
        "signals": signals,
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def verdict(signal: Mapping[str, Any], events: int, protocol: Protocol) -> str:
    """Says what the area of a primary signal shows.

    Args:
        signal: Of one comparison.
        events: Number of events that have a control.
        protocol: The numbers.

    Returns:
        warns, the reverse, no useful warning, or undecided.
    """
    limits = signal["primary_interval"]
    if limits is None or events < protocol.minimum_events:
        return "undecided"
    low, high = limits
    if low > 0.5:
        return "warns"
    if high < 0.5:
        return "the reverse"
    return "no useful warning" if high < protocol.useful_area else "undecided"


def agreed(verdicts: Sequence[str]) -> str:
    """Returns what the decisive comparisons all say, or undecided: one alone may see what their variants differ in."""
    return verdicts[0] if len(set(verdicts)) == 1 else "undecided"


def claim(verdicts: Mapping[str, str]) -> str:
    """Says what the verdicts mean for the claim that TEV warns: supported, refuted (at this scale) or undecided."""
    found = set(verdicts.values())
    if "warns" in found:
        return "supported"
    return "undecided" if "undecided" in found else "refuted"
