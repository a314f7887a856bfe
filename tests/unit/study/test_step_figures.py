"""The curves of a sweep over steps: what is read, averaged and thinned."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.study_folders import Record, write_lines

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

from mlra_scale.study.report.step_figures import (
    QUANTITIES,
    difference_figure,
    differences,
    mean_and_error,
    mean_curve,
    read_curves,
    step_figure,
    thin,
)
from mlra_scale.study.report.sweep_results import Cell, Sweep

LOSS = QUANTITIES[0]


def sweep_of(folder: Path) -> Sweep:
    """Two variants of two runs; one run of the second was guarded, and one has recorded nothing."""
    cells = []
    for variant, shift in (("first", 0.0), ("second", 1.0)):
        for seed in (1, 2):
            name = f"{variant}-{seed}"
            run = folder / "cells" / name
            run.mkdir(parents=True)
            cells.append(Cell(name, variant, {}, seed, "done", run, {}))
            if name == "second-2":
                continue
            records: list[Record] = [{"step": step, "loss": shift + seed + 0.1 * step} for step in range(1, 4 + seed)]
            records = [{"step": 0, "tev_mean": 0.1}, *records, {"step": 9, "loss": None}]
            write_lines(run / "metrics.jsonl", records)
    events: list[Record] = [
        {"event": "start"},
        {"event": "guard_skip", "step": 2},
        {"event": "guard_rollback", "step": 4},
    ]
    write_lines(folder / "cells" / "second-1" / "events.jsonl", events)
    return Sweep(folder, cells)


def test_what_is_read(tmp_path: Path) -> None:
    runs = {run.cell.name: run for run in read_curves(sweep_of(tmp_path))}
    steps, values = runs["first-2"].curves[LOSS.name]
    assert steps.tolist() == [1, 2, 3, 4, 5], "without the loss that is no number"
    assert values == pytest.approx([2.1, 2.2, 2.3, 2.4, 2.5])
    assert runs["second-1"].guarded == (2, 4) and runs["first-1"].guarded == ()
    assert all(curve[0].size == 0 for curve in runs["second-2"].curves.values())


def test_figures_are_drawn_of_what_was_measured_and_of_nothing_else(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    runs = read_curves(sweep)
    drawn = {quantity.name: step_figure(sweep, runs, quantity) for quantity in QUANTITIES}
    # TEV has one value in each run, which is no curve.
    assert [name for name, image in drawn.items() if image is not None] == ["training loss"]
    unguarded = [type(run)(run.cell, run.curves, ()) for run in runs]
    assert step_figure(sweep, unguarded, LOSS) != drawn["training loss"], "the guard's actions are in the figure"


def test_differences_are_of_the_same_seed_and_step(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    runs = read_curves(sweep)
    found = differences(sweep.variants, runs, LOSS.name)
    ((steps, values),) = found["second"]
    assert steps.tolist() == [1, 2, 3, 4] and values == pytest.approx([1.0] * 4), "of seed 1, which both have"
    means, errors = mean_and_error([(steps, values), (steps, 3 * values)])[1:]
    assert means == pytest.approx([2.0] * 4) and errors == pytest.approx([1.0] * 4)
    assert difference_figure(sweep, runs, LOSS) is not None
    assert difference_figure(sweep, [run for run in runs if run.cell.variant == "first"], LOSS) is None


def test_the_mean_is_over_common_steps() -> None:
    one = (np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    other = (np.array([2.0, 3.0, 4.0]), np.array([4.0, 9.0, 7.0]))
    steps, values = mean_curve([one, other])
    assert steps.tolist() == [2, 4] and values.tolist() == [3, 5]


def test_runs_of_unequal_length_have_a_mean_up_to_the_shorter_one() -> None:
    long, short = np.arange(1.0, 6251.0), np.arange(1.0, 1001.0)
    steps, values = thin(mean_curve([(long, long), (short, 3 * short)]), 40)
    assert (steps[0], steps[-1], steps.size) == (13, 988, 40)
    assert values == pytest.approx(2 * steps)


def test_long_curves_are_thinned_to_means_of_stretches() -> None:
    steps = np.arange(1.0, 402.0)
    thinned_steps, thinned = thin((steps, 2 * steps), 150)
    assert thinned_steps.size == 134 and thinned_steps[0] == 2.0 and thinned[0] == 4.0
    assert thinned_steps[-1] == 400.5, "the last is over the two that are left"
    short = (steps[:150], steps[:150])
    assert thin(short, 150)[0].tolist() == short[0].tolist()
