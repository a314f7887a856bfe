"""The report of a sweep."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlra_scale.study.correlation import MIN_UNITS, Correlation
from mlra_scale.study.report import page, step_figures, sweep_figures
from mlra_scale.study.report.associations import MAX_STEPS, Association, Associations
from mlra_scale.study.report.comparisons import (
    MEASURES,
    SENSITIVITY,
    Comparison,
    are_log_spaced,
    compare,
    divergence_rows,
    learning_rates,
    sensitivities,
)
from mlra_scale.study.report.costs import costs_of, costs_section
from mlra_scale.study.report.run_record import moment, read_lines
from mlra_scale.study.report.sweep_results import DEPTH, LEARNING_RATE, Sweep, axis_name, open_sweep, value_text
from mlra_scale.study.report.written import Written, write_report
from mlra_scale.study.verdicts import (
    MIN_PAIRS,
    coefficient,
    correlation_verdict,
    interval,
    number,
    p_text,
    takes_part,
    with_error,
)

_MAX_SENTENCES = 12
_ABOUT = ("commit", "command", "hardware", "versions")


def report_sweep(path: Path, output: Path) -> Written:
    """Writes the report of a sweep's output folder.

    Args:
        path: The folder, of a sweep that has ended or is at work.
        output: The folder to write to; made if need be.

    Returns:
        What was written.
    """
    sweep = open_sweep(path)
    comparisons = compare(sweep)
    images: dict[str, bytes | None] = {}
    parts = [
        page.paragraph(_progress(sweep), "lead"),
        page.section("What was compared", *_what_was_compared(sweep)),
        page.section("What these runs support", *_statements(sweep, comparisons)),
        page.section("Curves", *_curves(sweep, images)),
        page.section("Over steps", *_over_time(sweep, images)),
        page.section("Learning-rate sensitivity", *_sensitivity(sweep)),
        page.section("Paired differences", *_differences(comparisons, images)),
        page.section("Divergence and spikes", *_divergences(sweep)),
        page.section("TEV, gradient variance and loss", *_associations(sweep, images)),
        page.section("What measuring costs", *_costs(sweep)),
        page.section("What could not be read", page.items(sweep.notes)) if sweep.notes else "",
        page.folded("All finished cells", _cells_table(sweep)) if sweep.cells else "",
    ]
    title = f"Sweep {sweep.study.get('name') or sweep.plan.get('name') or path.resolve().name}"
    return write_report(output, page.page(title, *parts), images)


def _progress(sweep: Sweep) -> str:
    counts = {state: len(sweep.in_state(state)) for state in ("done", "diverged", "failed")}
    planned = "" if sweep.planned is None else f" of {sweep.planned} planned"
    if not sweep.cells:
        return f"No cell is finished yet{planned and f' (0{planned})'}: there is nothing to compare."
    return (
        f"{len(sweep.cells)}{planned} cells finished: {counts['done']} done, {counts['diverged']} diverged, "
        f"{counts['failed']} failed."
    )


def _what_was_compared(sweep: Sweep) -> list[str]:
    axes = [(axis_name(axis), ", ".join(map(value_text, values))) for axis, values in sweep.axes.items()]
    commits = sorted({str(cell.values["commit"]) for cell in sweep.cells if cell.values.get("commit")})
    rows: list[tuple[str, Any]] = [
        ("variants", ", ".join(sweep.variants) or None),
        *axes,
        ("seeds", ", ".join(map(value_text, sweep.seeds)) or None),
        ("commits of the cells", ", ".join(commits) if len(commits) > 1 else None),
        *((name, _plain(sweep.study.get(name)) or None) for name in _ABOUT),
        *((f"{name} (UTC)", moment(sweep.study.get(name)) or None) for name in ("started", "ended")),
    ]
    text = sweep.plan.get("description")
    return [page.paragraph(text) if text else "", page.facts(rows)]


def _plain(value: Any) -> str | None:
    """A value of study.json on one line; mappings as 'name value'."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown}" for name, item in value.items() if (shown := _plain(item)))
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return None if value is None else str(value)


def _statements(sweep: Sweep, comparisons: Sequence[Comparison]) -> list[str]:
    if len(sweep.variants) < 2:
        return [page.paragraph("There are no two variants with finished cells: nothing was compared.")]
    num_claimable = sum(takes_part(item.difference) for item in comparisons)
    supported = [item for item in comparisons if item.is_supported]
    how = (
        f"Number of comparisons made: {len(comparisons)}, of two variants each, over all settings and measures. "
        f"{num_claimable} of them have {MIN_PAIRS} pairs of equal seed or more; with fewer no claim is made."
    )
    summary = (
        f"A difference is supported in {len(supported)} of them, after Holm's adjustment for the number of comparisons "
        "of the same measure (means over settings and single settings are adjusted each among themselves)."
        if supported
        else "No difference between variants is supported by these runs."
    )
    sentences = page.items([f"{item.title}: {item.statement}" for item in supported])
    if len(supported) > _MAX_SENTENCES:
        sentences = page.folded("Every supported difference, with its error", sentences)
    num_diverged = len(sweep.in_state("diverged"))
    warning = (
        f"{num_diverged} run(s) diverged and have no final value: their pairs are left out, so that a variant that "
        "diverges often is judged by its better runs. Read the differences together with the divergences."
    )
    return [
        page.paragraph(how),
        page.paragraph(summary),
        _counts(comparisons),
        sentences,
        page.paragraph(_by_chance(comparisons), "small") if num_claimable else "",
        page.paragraph(warning, "small") if num_diverged else "",
    ]


def _by_chance(comparisons: Sequence[Comparison]) -> str:
    families = {(item.measure.name, item.is_mean) for item in comparisons if takes_part(item.difference)}
    return (
        f"The comparisons fall into {len(families)} families, of one measure each. Where nothing differs at all, a "
        f"family names a difference in one page of 20, and a page with {len(families)} of them in up to "
        f"{min(100, 5 * len(families))} of 100: a single supported difference among many measures is weak evidence."
    )


def _counts(comparisons: Sequence[Comparison]) -> str:
    """How many settings say what, for every measure and pair of variants."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for item in comparisons:
        groups.setdefault((item.measure.name, f"{item.first} - {item.second}"), []).append(item)
    rows = []
    for (measure, pair), items in groups.items():
        claimable = [item for item in items if takes_part(item.difference)]
        lower = sum(item.is_supported and item.difference.value < 0 for item in claimable)
        higher = sum(item.is_supported and item.difference.value > 0 for item in claimable)
        rows.append((measure, pair, lower, higher, len(claimable) - lower - higher, len(items) - len(claimable)))
    head = ("measure", "comparison", "lower", "higher", "no difference supported", "no claim")
    note = "In how many settings the first of two variants is lower or higher than the second:"
    return page.paragraph(note, "small") + page.table(head, page.without_repeats(rows), numbers=(2, 3, 4, 5))


def _curves(sweep: Sweep, images: dict[str, bytes | None]) -> list[str]:
    caption = (
        "Means over seeds with standard errors, and every run as a small open marker. A crossed-out marker at the "
        "upper edge counts the runs that diverged there, which have no value. Variants are set apart sideways."
    )
    parts = []
    for axis in sorted(sweep.axes, key=lambda axis: (axis != LEARNING_RATE, axis != DEPTH, axis)):
        # Of what is measured at many depths, everything is looked at; elsewhere the losses come first.
        for measure in MEASURES if axis == DEPTH else MEASURES[:2]:
            image = sweep_figures.axis_figure(sweep, axis, measure)
            images[f"{file_text(axis.rpartition('.')[2])}-{file_text(measure.name)}.png"] = image
            if image is not None:
                title = f"{measure.name} over {axis_name(axis)}"
                alternative = f"{title} by variant; the numbers are in the tables below."
                parts += [page.heading(title), page.image(image, alternative, caption)]
                caption = "As above."
    return parts or [page.paragraph("No curve can be drawn: no axis has two values with a finished cell.")]


def _over_time(sweep: Sweep, images: dict[str, bytes | None]) -> list[str]:
    runs = step_figures.read_curves(sweep)
    caption = (
        "Thin: every run. Thick: the mean over the runs of a variant, at the steps that all of them have. Long curves "
        "are means over equal stretches of steps."
    )
    parts = []
    for quantity in step_figures.QUANTITIES:
        image = images[f"steps-{file_text(quantity.name)}.png"] = step_figures.step_figure(sweep, runs, quantity)
        if image is not None:
            shown = page.image(image, f"{quantity.name} over steps by variant.", caption)
            parts += [page.heading(f"{quantity.name} over steps"), shown]
            caption = "As above."
        apart = step_figures.difference_figure(sweep, runs, quantity)
        images[f"steps-difference-{file_text(quantity.name)}.png"] = apart
        if apart is not None:
            told = (
                f"Paired differences of {quantity.name}: means over seeds and stretches of steps, with standard errors."
            )
            parts.append(page.image(apart, told, told))
    return parts or [page.paragraph("No curve can be drawn: no run has recorded two steps.")]


def file_text(name: str) -> str:
    """Returns a name as part of a file's name."""
    return "-".join(re.findall(r"[A-Za-z0-9_]+", name.replace("'", "")))


def _sensitivity(sweep: Sweep) -> list[str]:
    rates, found = learning_rates(sweep), sensitivities(sweep)
    if not found:
        return [page.paragraph("Not measured: the finished cells have one learning rate.")]
    rows = []
    for item in found:
        remarks = {
            "without all learning rates": item.num_incomplete,
            "undefined: no run got below its first loss": item.num_undefined,
        }
        left_out = "; ".join(f"{count} seed(s) {why}" for why, count in remarks.items() if count)
        rows.append((item.setting, item.variant, with_error(item.mean), item.mean.n, left_out))
    text = (
        f"Mean over the learning rates {', '.join(map(value_text, rates))} of min(final training loss, loss at "
        "initialization) - best loss, per seed; then mean and standard error over seeds (Wortsman et al. 2023, arXiv "
        "2309.14322). A run that diverged counts as its loss at initialization. 0: any of these rates will do."
    )
    uneven = "The rates are not evenly spaced in their logarithm: the mean is over those that were run."
    return [
        page.paragraph(text, "small"),
        "" if are_log_spaced(rates) else page.paragraph(uneven, "small"),
        page.table(
            ("setting", "variant", "sensitivity (nats per token)", "n", "left out"),
            page.without_repeats(rows),
            numbers=(2, 3),
        ),
    ]


def _differences(comparisons: Sequence[Comparison], images: dict[str, bytes | None]) -> list[str]:
    if not comparisons:
        return [page.paragraph("Nothing to compare.")]
    text = (
        "Differences of two variants with the same seed and the same place on all axes: mean, standard error, and the "
        "95 % interval of Student's t over the pairs. p is adjusted by Holm's method for the number of comparisons of "
        f"the same measure that have at least {MIN_PAIRS} pairs, means over settings apart from single settings."
    )
    parts = [page.paragraph(text, "small")]
    for measure in dict.fromkeys(item.measure for item in comparisons):
        items = [item for item in comparisons if item.measure == measure]
        image = images[f"differences-{file_text(measure.name)}.png"] = sweep_figures.difference_figure(items)
        num_claimable = sum(takes_part(item.difference) for item in items)
        caption = f"Paired differences of {measure.name}: the point is the mean, the line its 95 % interval."
        head = ("comparison", "setting", "n", "difference", "95 % interval", "p (Holm)", "what is supported")
        rows = page.without_repeats([_difference_row(item) for item in items])
        table = page.folded("The numbers", page.table(head, rows, numbers=(2, 3), whole=(4,)))
        shown = (
            "" if image is None else page.image(image, f"{caption} The numbers are in the table that follows.", caption)
        )
        title = f"{measure.name}: {num_claimable} of {len(items)} comparisons have enough pairs"
        # Of a sweep the losses are looked at first; the others are there on request.
        is_first = measure in (*MEASURES[:2], SENSITIVITY)
        parts += [page.heading(title), shown, table] if is_first else [page.folded(title, shown, table)]
    return parts


def _difference_row(item: Comparison) -> tuple[object, ...]:
    found = item.difference
    # The statement holds numbers that stand in the other columns; for a reader it is the whole of it in words.
    p = p_text(item.adjusted_p).removeprefix("= ") if takes_part(found) else "-"
    names = f"{item.first} - {item.second}"
    return (names, item.setting, found.n, with_error(found), interval(found), p, item.statement)


def _divergences(sweep: Sweep) -> list[str]:
    rows = [
        (variant, setting, f"{diverged} of {runs}", failed or "", number(spikes, 2))
        for variant, setting, runs, diverged, failed, spikes in divergence_rows(sweep)
    ]
    if not rows:
        return [page.paragraph("No cell is finished.")]
    totals = [
        (variant, sum(cell.state == "diverged" for cell in cells), sum(cell.has_outcome for cell in cells))
        for variant in sweep.variants
        for cells in [[cell for cell in sweep.cells if cell.variant == variant]]
    ]
    summary = "; ".join(f"{variant}: {diverged} of {runs} runs diverged" for variant, diverged, runs in totals)
    head = ("variant", "setting", "diverged", "failed", "spikes per run")
    note = "Failed runs ended for other reasons and count neither way. Spikes are those of runs that ended well."
    table = page.table(head, rows, numbers=(2, 3, 4))
    return [page.paragraph(f"{summary}."), page.paragraph(note, "small"), page.folded("By setting", table)]


def _associations(sweep: Sweep, images: dict[str, bytes | None]) -> list[str]:
    found = Associations(sweep)
    variants = [cell.variant for cell in sweep.in_state("done")]
    image = images["associations.png"] = sweep_figures.scatter_figure(sweep, found.final, variants)
    if image is None:
        return [page.paragraph("Not measured: no run has two of TEV, gradient variance of the embedding and loss.")]
    final, steps = found.of_finished_runs(), found.within_steps()
    text = (
        "Last values of the runs that ended well: Spearman's coefficient of ranks and Pearson's of values, gradient "
        "variance as its logarithm. Intervals are 95 % percentile intervals of a bootstrap that draws whole runs. What "
        "is held fixed is taken out as the mean of its group."
    )
    many = (
        f"{2 * (len(final) + len(steps))} coefficients are shown; their intervals are not adjusted for that number, "
        "and about 1 in 20 excludes 0 by chance."
    )
    left_out = f" {found.num_left_out} cell(s) without final values are left out." if found.num_left_out else ""
    caption = "Each marker is one run: its shape is the variant, its shade the learning rate (dark is low)."
    few = page.paragraph(f"No coefficient is given: fewer than {MIN_UNITS} runs have both values.")
    return [
        page.paragraph(text + left_out, "small"),
        page.image(image, caption, caption),
        page.heading("Over runs, at their end"),
        _association_table(final) if final else few,
        page.heading("Over runs, step by step"),
        *_over_steps(found, steps),
        page.paragraph(many, "small") if final or steps else "",
    ]


def _over_steps(found: Associations, steps: Sequence[Association]) -> list[str]:
    if not steps:
        told = f"Not measured in {MIN_UNITS} runs at the same steps (needs tev.every and gradients.every)."
        return [page.paragraph(told)]
    mean = found.within_runs()
    within = (
        "Within runs, changes of TEV against changes of gradient variance from one measurement to the next (Spearman)"
    )
    within += f": {with_error(mean)}, 95 % interval {interval(mean)}, n = {mean.n} runs." if mean.n else ": undefined."
    note = (
        f"Up to {MAX_STEPS} steps of each run, each compared with other runs at the same step: what all runs share as "
        "training goes on is no association. Here the loss is that of the step."
    )
    return [page.paragraph(note, "small"), _association_table(steps), page.paragraph(within)]


def _association_table(rows: Sequence[Association]) -> str:
    def size(found: Correlation) -> str:
        return f"{found.units}" if found.units == found.n else f"{found.units} ({found.n})"

    content = [
        (
            f"{row.first} and {row.second}",
            row.fixed,
            size(row.found[0]),
            *map(coefficient, row.found),
            correlation_verdict(row.found[0]),
        )
        for row in rows
    ]
    head = ("of", "held fixed", "runs (values)", "Spearman", "Pearson", "by rank")
    return page.table(head, page.without_repeats(content), numbers=(2,), whole=(3, 4))


def _costs(sweep: Sweep) -> list[str]:
    records = (read_lines(cell.run / "metrics.jsonl", [], is_optional=True) for cell in sweep.cells)
    return costs_section([found for lines in records if (found := costs_of(lines)) is not None])


def _cells_table(sweep: Sweep) -> str:
    names = ("final_loss", "validation_loss", "tev_mean", "gradient_variance_embedding")
    rows = [
        (
            cell.name,
            cell.state,
            *(number(cell.value(name), 5) for name in names),
            cell.values.get("steps", ""),
            _error(cell.values),
        )
        for cell in sweep.cells
    ]
    head = ("cell", "state", "final loss", "validation", "TEV mean", "gradient variance", "steps", "error")
    return page.table(head, rows, numbers=(2, 3, 4, 5, 6))


def _error(values: dict[str, Any]) -> str:
    if values.get("error"):
        return str(values["error"])[:300]
    diverged = values.get("diverged_at")
    return "" if diverged is None else f"diverged at step {json.dumps(diverged)}"
