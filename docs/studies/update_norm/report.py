"""What the recorded updates of several runs say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlra_scale.files import write_atomically
from mlra_scale.study.provenance import hardware, versions
from mlra_scale.study.report import style
from mlra_scale.training.record import commit

OPTIMIZERS = ("adamw", "muon", "spectron")
Runs = Sequence[tuple[str, float]]
"""Optimizer and learning rate."""


def file_of(output: Path, optimizer: str, rate: float) -> Path:
    """Returns the file with the recorded updates of a run, which is there when the run has ended."""
    return output / f"{optimizer}-lr{rate:g}" / "updates.jsonl"


def report(output: Path, runs: Runs) -> dict[str, Any]:
    """Writes update_norm.json, update_norm.md and update-norm.png; returns what the first one holds."""
    curves = {}
    for optimizer, rate in runs:
        lines = [json.loads(line) for line in file_of(output, optimizer, rate).read_text().splitlines()]
        names = [name for name in lines[0] if name != "step"]
        curves[f"{optimizer} {rate:g}"] = {name: [line[name] for line in lines] for name in names}
    result: dict[str, Any] = {
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "summary": {name: summary(curve) for name, curve in curves.items()},
        "curves": curves,
    }
    write_atomically(output / "update_norm.json", json.dumps(result) + "\n")
    write_atomically(output / "update_norm.md", as_markdown(result["summary"]))
    (output / "update-norm.png").write_bytes(figure(curves, runs))
    return result


def summary(curve: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns extremes over the steps of a run."""
    updates, eta = np.array(curve["update"]), np.array(curve["eta"])
    found = {
        "largest_update": float(updates.max()),
        "largest_update_over_eta": float((updates / eta).max()),
        "last_sigma": curve["sigma"][-1],
    }
    if "bound_share" in curve:
        found |= {
            "largest_bound_share": max(curve["bound_share"]),
            "largest_c": max(curve["c"]),
            "smallest_estimate_share": min(curve["estimate_share"]),
            "largest_rho": max(curve["rho"]),
        }
    return found


def as_markdown(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the extremes of all runs as a table."""
    names = list(dict.fromkeys(name for found in summaries.values() for name in found))
    lines = [["", *(name.replace("_", " ") for name in names)], ["---"] * (len(names) + 1)]
    for run, found in summaries.items():
        lines.append([run, *(f"{found[name]:.4g}" if name in found else "" for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@style.drawing()
def figure(curves: Mapping[str, Mapping[str, list[float]]], runs: Runs) -> bytes:
    """Draws the largest update, and its multiple of eta, over steps: a column for each rate."""
    rates = list(dict.fromkeys(rate for _, rate in runs))
    image = style.new_figure(5.6)
    grid = image.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for column, rate in enumerate(rates):
        for index, optimizer in enumerate(OPTIMIZERS):
            curve, how = curves[f"{optimizer} {rate:g}"], style.look(index)
            updates, steps = np.array(curve["update"]), np.arange(1, len(curve["update"]) + 1)
            style.curve(grid[0, column], steps, updates, how)
            style.curve(grid[1, column], steps, updates / np.array(curve["eta"]), how)
        grid[0, column].set_title(f"learning rate {rate:g}")
        grid[1, column].axhline(1.0, color="0.35", lw=1.0, ls="--", zorder=0.5)
        grid[1, column].set_xlabel("step")
        for axes in grid[:, column]:
            axes.set_yscale("log")
    grid[0, 0].set_ylabel("largest |dW|\n(log scale)")
    grid[1, 0].set_ylabel("largest |dW| / eta\n(log scale)")
    style.figure_legend(image, style.variant_handles(OPTIMIZERS), handlelength=3.2)
    return style.as_png(image)
