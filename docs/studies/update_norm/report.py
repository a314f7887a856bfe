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
LARGEST_C = 1.21
"""Bound of the singular values of an orthogonalised momentum, for optim.newton_schulz_* by default: those in [0, 1] end
at 1.2024 at most; bf16 arithmetic was seen to add up to 0.004."""
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
    """Draws |dW|, |dW| / eta, and Spectron's c and bound share over steps: a column for each rate."""
    rates = list(dict.fromkeys(rate for _, rate in runs))
    image, at_1, at_C = style.new_figure(7.6), {"color": "0.35", "ls": "--"}, {"color": "0.35", "ls": ":"}
    grid = image.subplots(3, len(rates), sharex=True, sharey="row", squeeze=False)
    for column, rate in enumerate(rates):
        for index, optimizer in enumerate(OPTIMIZERS):
            curve, how = curves[f"{optimizer} {rate:g}"], style.look(index)
            updates, steps = np.array(curve["update"]), np.arange(1, len(curve["update"]) + 1)
            style.curve(grid[0, column], steps, updates, how)
            style.curve(grid[1, column], steps, updates / np.array(curve["eta"]), how)
            for offset, name in enumerate(_SPECTRONS, start=len(OPTIMIZERS)):
                if name in curve:
                    style.curve(grid[2, column], steps, curve[name], style.look(offset))
        grid[0, column].set_title(f"learning rate {rate:g}")
        grid[2, column].set_xlabel("step")
        for row in (1, 2):
            for height, how in ((1.0, at_1), (LARGEST_C, at_C)):
                grid[row, column].axhline(height, lw=1.0, zorder=0.5, **how)
            grid[row - 1, column].set_yscale("log")
    for axes, label in zip(
        grid[:, 0], ("largest |dW|\n(log scale)", "largest |dW| / eta\n(log scale)", "c, bound share"), strict=True
    ):
        axes.set_ylabel(label)
    handles = [
        *style.variant_handles([*OPTIMIZERS, *_SPECTRONS.values()]),
        style.handle(style.label("1: eta, the paper's bound for Spectron; the bound of the share"), **at_1),
        style.handle(
            style.label(f"{LARGEST_C}: C; |dW| / eta of an orthogonalised dense matrix, and c, stay below"), **at_C
        ),
    ]
    style.figure_legend(image, handles, handlelength=3.2)
    return style.as_png(image)


_SPECTRONS = {"c": "spectron: c", "bound_share": "spectron: bound share"}
