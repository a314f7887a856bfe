"""Reads the sweep of docs/studies/thousand.yaml: are all steps finite, and what do time and memory do over depth?

    python -m docs.studies.thousand runs/thousand [--output DIR]

Run in the root folder of the project; README.md says which options are in it. Writes thousand.json,
thousand.md and gradient-norms.png.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlra_scale.console import run_tool
from mlra_scale.files import write_atomically
from mlra_scale.study.report import style
from mlra_scale.study.report.records import read_steps
from mlra_scale.study.report.sweep_record import DEPTH, open_sweep
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.run_reader import is_number, value_at


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis; returns the exit code: 0, 1 if a run is not finite or not finished, 2 without any run."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.studies.thousand", description="Finite steps, time, memory and gradients of deep models."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of tools/sweep.py")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: FOLDER)")
    options = parser.parse_args(arguments)
    output, sweep = options.output or options.folder, open_sweep(options.folder)
    if sweep.cells.empty:
        print(f"thousand: error: {options.folder} holds no results of a sweep", file=sys.stderr)
        return 2
    cells = [
        {
            "variant": cell["variant"],
            "depth": cell["axis_values"][DEPTH],
            "state": cell["state"],
            **measured(cell["run"]),
        }
        for cell in sweep.cells.to_dict("records")
    ]
    missing = max(0, (sweep.num_planned or 0) - len(cells))
    result = {"study": sweep.study, "cells": cells, "missing": missing, "growth": growth(cells)}
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "thousand.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(output / "thousand.md", as_markdown(result))
    if png := figure(cells):
        (output / "gradient-norms.png").write_bytes(png)
    print((output / "thousand.md").read_text(encoding="utf-8"), end="")
    return int(missing > 0 or not all(cell["state"] == "done" and cell["is_finite"] for cell in cells))


def measured(path: Path) -> dict[str, Any]:
    """Returns what the run of a cell recorded: finite or not, seconds per step, memory, gradient norms of blocks."""
    records = [record for record in read_steps(RunDirectory(path).metrics, [], is_optional=True) if record["step"] > 0]
    losses = [record.get("loss") for record in records if "loss" in record]
    norms = [record.get("gradient_norm") for record in records if "loss" in record]
    # Steps that measured take longer; tokens_per_second is the mean since the line before.
    rates = [
        (line.get("consumed_tokens"), line.get("tokens_per_second")) for line in records if "gradients" not in line
    ]
    tokens = next((found["consumed_tokens"] / found["step"] for found in records if found.get("consumed_tokens")), 0.0)
    seconds = [tokens / rate for consumed, rate in rates if consumed and rate]
    layers = [found for record in records if (found := value_at(record, "gradients.layers.gradient_norm"))]
    first = next((index for index, record in enumerate(records) if "gradients" in record), len(records))
    return {
        "steps": len(losses),
        "is_finite": bool(losses) and all(map(is_number, [*losses, *norms])),
        "last_loss": losses[-1] if losses and is_number(losses[-1]) else None,
        "seconds_per_step": statistics.median(seconds[1:] or seconds) if seconds else None,
        # Each record has the peak since the start of the process: before the first measurement it is that of training.
        "memory_gib": _largest(record.get("memory_gib") for record in records[:first]),
        "memory_with_statistics_gib": _largest(record.get("memory_gib") for record in records),
        "gradient_norms": layers[-1] if layers else None,
    }


def _largest(values: Iterable[Any]) -> float | None:
    return max(filter(is_number, values), default=None)


def growth(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns how time and memory grow over depth, by variant: 1 is linear.

    It is the rise per block between the two deepest models over that between the two shallowest.
    """
    found: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        own = [cell for cell in cells if cell["variant"] == variant and cell["state"] == "done"]
        for quantity in _GROWING:
            points = sorted((cell["depth"], cell[quantity]) for cell in own if cell[quantity] is not None)
            if len(points) >= 3:
                depths, values = np.diff(np.array(points, np.float64), axis=0).T
                slopes = values / depths
                if slopes[0] > 0.0:
                    found.setdefault(variant, {})[quantity] = float(slopes[-1] / slopes[0])
    return found


def as_markdown(result: Mapping[str, Any]) -> str:
    """Returns a table of all cells."""
    lines = [f"| option | blocks | steps | finite | {' | '.join(_COLUMNS)} | gradient norm of blocks |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    for cell in result["cells"]:
        norms = [norm for norm in cell["gradient_norms"] or [] if norm is not None]
        spread = f"{min(norms):.2g} to {max(norms):.2g}" if norms else "-"
        numbers = [_number(cell[name], ".3f") for name in _COLUMNS.values()]
        finite = "yes" if cell["is_finite"] else "**no**"
        row = [cell["variant"], f"{cell['depth']:,}", str(cell["steps"]), finite, *numbers, spread]
        lines.append("| " + " | ".join(row) + " |")
    if result["missing"]:
        lines += ["", f"**{result['missing']} cells of the study have no result.**"]
    lines += [
        "",
        "Rise per block between the two deepest models over that between the two shallowest (1: linear):",
        "",
        f"| option | {' | '.join(_GROWING.values())} |",
        "|---" * (1 + len(_GROWING)) + "|",
    ]
    for variant, found in result["growth"].items():
        ratios = [_number(found.get(name), ".2f") for name in _GROWING]
        lines.append(f"| {variant} | {' | '.join(ratios)} |")
    return "\n".join([*lines, ""])


_CURVES = 7
"""Of a plot: looks repeat after eight."""
_COLUMNS = {
    "last loss": "last_loss",
    "s per step": "seconds_per_step",
    "GiB, rank 0": "memory_gib",
    "with statistics": "memory_with_statistics_gib",
}
_GROWING = {
    "seconds_per_step": "time",
    "memory_gib": "memory",
    "memory_with_statistics_gib": "memory with statistics",
}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


@style.drawing()
def figure(cells: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draws the gradient norm of every block of the deepest models at their last measurement."""
    deepest = max(cell["depth"] for cell in cells)
    chosen = [cell for cell in cells if cell["depth"] == deepest and cell["gradient_norms"]]
    if not chosen:
        return None
    plots = [chosen[first : first + _CURVES] for first in range(0, len(chosen), _CURVES)]
    image = style.new_figure(0.6 + 3.6 * len(plots))
    for axes, plotted in zip(
        image.subplots(len(plots), sharex=True, sharey=True, squeeze=False)[:, 0], plots, strict=True
    ):
        for index, cell in enumerate(plotted):
            values = np.array([math.nan if value is None else value for value in cell["gradient_norms"]])
            style.curve(axes, np.arange(values.size), values, style.look(index), cell["variant"])
        axes.set_yscale("log")
        axes.set_ylabel("gradient norm of the block\n(log scale)")
        style.legend_beside(axes)
    axes.set_xlabel("block")
    return style.as_png(image)


if __name__ == "__main__":
    sys.exit(run_tool(main, has_side_effects=False))
