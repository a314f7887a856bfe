"""The report of a sweep."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlra_scale.study.report import associations, comparisons, step_figures, sweep_figures, wording
from mlra_scale.study.report.associations import Association
from mlra_scale.study.report.comparisons import PairedComparison
from mlra_scale.study.report.costs import costs_of, costs_table
from mlra_scale.study.report.page import Images, without_repeats, write_report
from mlra_scale.study.report.records import number_or_nan, read_metrics, time_text
from mlra_scale.study.report.statistics import MIN_RUNS, mean_of
from mlra_scale.study.report.sweep_record import (
    DEPTH,
    LEARNING_RATE,
    MEASURES,
    SweepRecord,
    axis_name,
    open_sweep,
    value_text,
)

_ABOUT = ("commit", "command", "hardware", "versions")
_LOSSES = (*MEASURES[:2], comparisons.SENSITIVITY)


def report_sweep(path: Path, output: Path) -> list[Path]:
    """Writes the report of a sweep's output folder.

    Args:
        path: The folder; the sweep may be in progress.
        output: The folder to write to; made if necessary.

    Returns:
        The paths of the page and of its images.
    """
    sweep, images = open_sweep(path), Images()
    costs = [found for run in sweep.cells.run if (found := costs_of(read_metrics(run))) is not None]
    return write_report(
        output,
        "sweep.html",
        images,
        title=f"Sweep {sweep.study.get('name') or sweep.plan.get('name') or path.resolve().name}",
        lead=_progress(sweep),
        description=sweep.plan.get("description"),
        facts=_facts(sweep),
        **_comparisons(sweep, comparisons.compare(sweep), images),
        curves=_curves(sweep, images),
        steps=_over_steps(sweep, images),
        **_sensitivities(sweep),
        **_stability(sweep),
        **_associations(sweep, images),
        costs=costs_table(costs),
        notes=sweep.notes,
        cells=[_cell_row(cell) for cell in sweep.cells.to_dict("records")],
        min_pairs=wording.MIN_PAIRS,
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


def _comparisons(sweep: SweepRecord, found: Sequence[PairedComparison], images: Images) -> dict[str, Any]:
    counts: dict[tuple[str, str], list[PairedComparison]] = {}
    for item in found:
        counts.setdefault((item.measure.name, item.names), []).append(item)
    claimable = [item for item in found if item.is_claimable]
    return {
        "num_variants": len(sweep.variants),
        "num_comparisons": len(found),
        "num_claimable": len(claimable),
        "num_families": len({(item.measure.name, item.is_mean) for item in claimable}),
        "num_diverged": len(sweep.in_state("diverged")),
        "supported": [f"{i.names}, {i.setting}: {i.measure.name}: {i.statement}" for i in found if i.is_supported],
        "counts": without_repeats([(*names, *_verdict_counts(items)) for names, items in counts.items()]),
        "differences": [
            _differences(measure.name, [item for item in found if item.measure == measure], images)
            for measure in dict.fromkeys(item.measure for item in found)
        ],
    }


def _verdict_counts(items: Sequence[PairedComparison]) -> tuple[int, int, int, int]:
    """Returns the number of settings that are lower, higher, without a supported difference, without a claim."""
    lower = sum(item.is_supported and item.difference.value < 0 for item in items)
    higher = sum(item.is_supported and item.difference.value > 0 for item in items)
    claimable = sum(item.is_claimable for item in items)
    return lower, higher, claimable - lower - higher, len(items) - claimable


def _differences(name: str, items: Sequence[PairedComparison], images: Images) -> dict[str, Any]:
    png = images[f"differences-{file_text(name)}.png"] = sweep_figures.difference_figure(items)
    rows = [
        (
            *(
                item.names,
                item.setting,
                item.difference.n,
                wording.with_error(item.difference),
                wording.interval(item.difference),
            ),
            wording.p_text(item.adjusted_p).removeprefix("= ") if item.is_claimable else "-",
            item.statement,
        )
        for item in items
    ]
    num_claimable, is_open = sum(item.is_claimable for item in items), items[0].measure in _LOSSES
    return {"name": name, "png": png, "rows": without_repeats(rows), "num_claimable": num_claimable, "is_open": is_open}


def _curves(sweep: SweepRecord, images: Images) -> list[tuple[str, bytes]]:
    found = []
    for axis in sorted(sweep.axes, key=lambda axis: (axis != LEARNING_RATE, axis != DEPTH, axis)):
        # Over depth all measures are drawn, over other axes the losses.
        for measure in MEASURES if axis == DEPTH else MEASURES[:2]:
            png = sweep_figures.axis_figure(sweep, axis, measure)
            images[f"{file_text(axis.rpartition('.')[2])}-{file_text(measure.name)}.png"] = png
            if png is not None:
                found.append((f"{measure.name} over {axis_name(axis)}", png))
    return found


def _over_steps(sweep: SweepRecord, images: Images) -> list[tuple[str, bytes | None, bytes | None]]:
    runs, found = step_figures.read_curves(sweep), []
    for quantity in step_figures.QUANTITIES:
        name = file_text(quantity.name)
        png = images[f"steps-{name}.png"] = step_figures.step_figure(sweep, runs, quantity)
        difference = step_figures.difference_figure(sweep, runs, quantity)
        images[f"steps-difference-{name}.png"] = difference
        if png is not None or difference is not None:
            found.append((quantity.name, png, difference))
    return found


def file_text(name: str) -> str:
    """Returns a name as part of a file name."""
    return "-".join(re.findall(r"[A-Za-z0-9_]+", name.replace("'", "")))


def _sensitivities(sweep: SweepRecord) -> dict[str, Any]:
    table, rates, rows = comparisons.sensitivities(sweep), comparisons.learning_rates(sweep), []
    for setting, variant in itertools.product(sweep.settings(LEARNING_RATE), sweep.variants):
        own = table[(table.setting == setting) & (table.variant == variant)]
        if len(own):
            mean = mean_of(own[comparisons.SENSITIVITY.name].dropna())
            left_out = own.state[own.state != "done"].value_counts().sort_index(ascending=False).items()
            remarks = "; ".join(f"{count} seed(s) {why}" for why, count in left_out)
            rows.append((setting, variant, wording.with_error(mean), mean.n, remarks))
    return {
        "sensitivities": without_repeats(rows),
        "rates": [value_text(rate) for rate in rates],
        "are_log_spaced": comparisons.are_log_spaced(rates),
    }


def _stability(sweep: SweepRecord) -> dict[str, Any]:
    table = comparisons.stability_table(sweep)
    totals = table.groupby("variant")[["diverged", "outcomes"]].sum().reindex(sweep.variants)
    rows = [
        (row.variant, row.setting, f"{row.diverged} of {row.outcomes}", row.failed or "", wording.number(row.spikes, 2))
        for row in table.itertuples()
    ]
    return {"stability": rows, "divergences": list(totals.itertuples())}


def _associations(sweep: SweepRecord, images: Images) -> dict[str, Any]:
    seen, over_steps = associations.final_values(sweep), associations.values_over_steps(sweep)
    scatter = images["associations.png"] = sweep_figures.scatter_figure(sweep, seen)
    if scatter is None:
        return {"scatter": None}
    mean = associations.within_runs(over_steps)
    within = (
        f"{wording.with_error(mean)}, 95 % interval {wording.interval(mean)}, n = {mean.n} runs."
        if mean.n
        else "undefined."
    )
    return {
        "scatter": scatter,
        "num_left_out": len(sweep.cells) - len(seen),
        "max_steps": associations.MAX_STEPS,
        "final_associations": _association_rows(associations.of_finished_runs(sweep)),
        "step_associations": _association_rows(associations.within_steps(sweep, over_steps)),
        "within_runs": within,
    }


def _association_rows(found: Sequence[Association]) -> list[Sequence[object]]:
    rows = []
    for item in found:
        spearman = item.found[0]
        size = f"{spearman.runs}" if spearman.runs == spearman.n else f"{spearman.runs} ({spearman.n})"
        texts = map(wording.coefficient_text, item.found)
        rows.append(
            (f"{item.first} and {item.second}", item.fixed, size, *texts, wording.correlation_verdict(spearman))
        )
    return without_repeats(rows)


def _cell_row(cell: dict[str, Any]) -> tuple[object, ...]:
    line = cell["line"]
    keys = ("final_loss", "validation_loss", "tev_mean", "gradient_variance_embedding")
    values = (number_or_nan(line.get(key) if cell["state"] == "done" else None) for key in keys)
    diverged = line.get("diverged_at")
    error = str(line.get("error") or ("" if diverged is None else f"diverged at step {json.dumps(diverged)}"))[:300]
    return (cell["cell"], cell["state"], *(wording.number(value, 5) for value in values), line.get("steps", ""), error)
