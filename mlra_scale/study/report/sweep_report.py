"""The report of a sweep."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlra_scale.study.report import associations, comparisons, step_figures, sweep_figures
from mlra_scale.study.report.comparisons import PairedComparison
from mlra_scale.study.report.costs import costs_table
from mlra_scale.study.report.page import Images, write_report
from mlra_scale.study.report.records import time_text
from mlra_scale.study.report.statistics import MIN_RUNS, Mean, mean_of
from mlra_scale.study.report.sweep_record import (
    DEPTH,
    LEARNING_RATE,
    MEASURES,
    QUANTITIES,
    CellCurves,
    Measure,
    SweepRecord,
    axis_name,
    open_sweep,
    read_curves,
    value_text,
)

_ABOUT = ("commit", "command", "hardware", "versions")
_LOSSES = (*MEASURES[:2], comparisons.SENSITIVITY)


def report_sweep(path: Path, output: Path) -> list[Path]:
    """Writes the report of a sweep, which may be in progress, to a folder; returns the paths of page and images."""
    sweep, images = open_sweep(path), Images()
    runs = read_curves(sweep)
    found, rates = comparisons.compare(sweep), comparisons.learning_rates(sweep)
    by_pair: dict[tuple[str, str], list[PairedComparison]] = {}
    for item in found:
        by_pair.setdefault((item.measure.name, item.names), []).append(item)
    differences = list(_differences(found, images))
    curves, steps = list(_curves(sweep, images)), list(_over_steps(sweep, runs, images))
    stability = comparisons.stability_table(sweep)
    final, over_steps = associations.final_values(sweep), associations.values_over_steps(runs)
    images["associations.png"] = sweep_figures.scatter_figure(sweep, final)
    return write_report(
        output,
        "sweep.html",
        images,
        title=f"Sweep {sweep.study.get('name') or sweep.plan.get('name') or path.resolve().name}",
        lead=_progress(sweep),
        sweep=sweep,
        description=sweep.plan.get("description"),
        facts=_facts(sweep),
        found=found,
        pairs_of_variants=by_pair,
        differences=differences,
        losses=_LOSSES,
        curves=curves,
        steps=steps,
        sensitivities=list(_sensitivities(sweep)),
        rates=rates,
        are_log_spaced=comparisons.are_log_spaced(rates),
        stability=stability,
        divergences=stability.groupby("variant")[["diverged", "outcomes"]].sum().reindex(sweep.variants).itertuples(),
        scatter=images["associations.png"],
        final=final,
        max_steps=associations.MAX_STEPS,
        final_associations=associations.of_finished_runs(sweep),
        step_associations=associations.within_steps(sweep, over_steps),
        within_runs=associations.within_runs(over_steps),
        costs=costs_table([run.costs for run in runs if run.costs is not None]),
        notes=sweep.notes,
        min_pairs=comparisons.MIN_PAIRS,
        min_runs=MIN_RUNS,
    )


def _progress(sweep: SweepRecord) -> str:
    counts = ", ".join(f"{len(sweep.in_state(state))} {state}" for state in ("done", "diverged", "failed"))
    planned = "" if sweep.num_planned is None else f" of {sweep.num_planned} planned"
    if sweep.cells.empty:
        return f"No cell is finished yet{planned and f' (0{planned})'}: there is nothing to compare."
    return f"{len(sweep.cells)}{planned} cells finished: {counts}."


def _facts(sweep: SweepRecord) -> list[tuple[str, Any]]:
    commits = sorted({str(line["commit"]) for line in sweep.cells.line if line.get("commit")})
    return [
        ("variants", ", ".join(sweep.variants) or None),
        *((axis_name(axis), ", ".join(map(value_text, values))) for axis, values in sweep.axes.items()),
        ("seeds", ", ".join(sweep.seeds) or None),
        ("commits of the cells", ", ".join(commits) if len(commits) > 1 else None),
        *((name, _on_one_line(sweep.study.get(name)) or None) for name in _ABOUT),
        *((f"{name} (UTC)", time_text(sweep.study.get(name)) or None) for name in ("started", "ended")),
    ]


def _on_one_line(value: Any) -> str:
    """Returns a value of study.json on one line; mappings as 'name value'."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, item in value.items() if (text := _on_one_line(item)))
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "" if value is None else str(value)


def _differences(
    found: Sequence[PairedComparison], images: Images
) -> Iterator[tuple[Measure, bytes | None, list[PairedComparison]]]:
    """Yields every measure with its figure and its comparisons."""
    for measure in dict.fromkeys(item.measure for item in found):
        items = [item for item in found if item.measure == measure]
        png = images[f"differences-{file_text(measure.name)}.png"] = sweep_figures.difference_figure(items)
        yield measure, png, items


def _curves(sweep: SweepRecord, images: Images) -> Iterator[tuple[str, bytes]]:
    for axis in sorted(sweep.axes, key=lambda axis: (axis != LEARNING_RATE, axis != DEPTH, axis)):
        # Over depth all measures are drawn, over other axes the losses.
        for measure in MEASURES if axis == DEPTH else MEASURES[:2]:
            png = sweep_figures.axis_figure(sweep, axis, measure)
            images[f"{file_text(axis.rpartition('.')[2])}-{file_text(measure.name)}.png"] = png
            if png is not None:
                yield f"{measure.name} over {axis_name(axis)}", png


def _over_steps(
    sweep: SweepRecord, runs: Sequence[CellCurves], images: Images
) -> Iterator[tuple[str, bytes | None, bytes | None]]:
    for quantity in QUANTITIES:
        name = file_text(quantity.name)
        png = images[f"steps-{name}.png"] = step_figures.step_figure(sweep, runs, quantity)
        difference = step_figures.difference_figure(sweep, runs, quantity)
        images[f"steps-difference-{name}.png"] = difference
        if png is not None or difference is not None:
            yield quantity.name, png, difference


def file_text(name: str) -> str:
    """Returns a name as part of a file name."""
    return "-".join(re.findall(r"[A-Za-z0-9_]+", name.replace("'", "")))


def _sensitivities(sweep: SweepRecord) -> Iterator[tuple[str, str, Mean, str]]:
    """Yields setting, variant, the mean over seeds, and why seeds are left out."""
    table = comparisons.sensitivities(sweep)
    for setting, variant in itertools.product(sweep.settings(LEARNING_RATE), sweep.variants):
        own = table[(table.setting == setting) & (table.variant == variant)]
        if len(own):
            left_out = own.state[own.state != "done"].value_counts().sort_index(ascending=False).items()
            remarks = "; ".join(f"{count} seed(s) {why}" for why, count in left_out)
            yield setting, variant, mean_of(own[comparisons.SENSITIVITY.name].dropna()), remarks
