"""The curves of a sweep over steps: what is read, averaged and thinned."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.study_folders import Record, cell_of, write_lines

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

from mlra_scale.study.report.step_figures import (
    difference_figure,
    differences,
    mean_and_error,
    mean_curve,
    step_figure,
    thin,
)
from mlra_scale.study.report.sweep_record import LOSS_CURVE as LOSS
from mlra_scale.study.report.sweep_record import QUANTITIES, SweepRecord, read_curves, table_of


def sweep_of(folder: Path) -> SweepRecord:
    """Two variants of two runs; one run of the second was guarded, and one has recorded nothing."""
    lines = []
    for variant, shift in (("first", 0.0), ("second", 1.0)):
        for seed in (1, 2):
            name = f"{variant}-{seed}"
            run = folder / "cells" / name
            run.mkdir(parents=True)
            lines.append(cell_of(variant, {}, seed, cell=name, run=f"cells/{name}"))
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
    return SweepRecord(folder, table_of(lines, folder))


def test_what_is_read(tmp_path: Path) -> None:
    runs = {run.cell["cell"]: run for run in read_curves(sweep_of(tmp_path))}
    values = runs["first-2"].curves[LOSS.name]
    assert values.index.tolist() == [1, 2, 3, 4, 5], "without the loss that is not finite"
    assert values.tolist() == pytest.approx([2.1, 2.2, 2.3, 2.4, 2.5])
    assert runs["second-1"].guarded == [2, 4] and runs["first-1"].guarded == []
    assert all(curve.empty for curve in runs["second-2"].curves.values())


def test_figures_are_drawn_of_what_was_measured_and_of_nothing_else(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    runs = read_curves(sweep)
    drawn = {quantity.name: step_figure(sweep, runs, quantity) for quantity in QUANTITIES}
    # TEV has one value in each run, which is no curve.
    assert [name for name, image in drawn.items() if image is not None] == ["training loss"]
    unguarded = [run._replace(guarded=[]) for run in runs]
    assert step_figure(sweep, unguarded, LOSS) != drawn["training loss"], "the guard's actions are in the figure"


def test_differences_are_of_the_same_seed_and_step(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    runs = read_curves(sweep)
    found = differences(sweep.variants, runs, LOSS.name)
    (values,) = found["second"]
    assert values.index.tolist() == [1, 2, 3, 4] and values.tolist() == pytest.approx([1.0] * 4), "both have seed 1"
    means, errors = mean_and_error([values, 3 * values])
    assert means.tolist() == pytest.approx([2.0] * 4) and errors.tolist() == pytest.approx([1.0] * 4)
    assert mean_and_error([values])[1].tolist() == [0.0] * 4
    assert difference_figure(sweep, runs, LOSS) is not None
    assert difference_figure(sweep, [run for run in runs if run.cell["variant"] == "first"], LOSS) is None


def test_the_mean_is_over_common_steps() -> None:
    mean = mean_curve([pd.Series([1.0, 2.0, 3.0], [1, 2, 4]), pd.Series([4.0, 9.0, 7.0], [2, 3, 4])])
    assert mean.to_dict() == {2: 3, 4: 5}


def test_runs_of_unequal_length_have_a_mean_up_to_the_shorter_one() -> None:
    long, short = np.arange(1.0, 6251.0), np.arange(1.0, 1001.0)
    mean = thin(mean_curve([pd.Series(long, long), pd.Series(3 * short, short)]), 40)
    assert (mean.index[0], mean.index[-1], mean.size) == (13, 988, 40)
    assert mean.tolist() == pytest.approx([2 * step for step in mean.index])


def test_long_curves_are_thinned_to_means_of_intervals() -> None:
    steps = np.arange(1.0, 402.0)
    thinned = thin(pd.Series(2 * steps, steps), 150)
    assert (thinned.size, thinned.index[0], thinned.iloc[0]) == (134, 2.0, 4.0)
    assert thinned.index[-1] == 400.5, "the last is over the two that are left"
    short = pd.Series(steps[:150], steps[:150])
    assert thin(short, 150).equals(short)
    assert thin(short[:0], 150).empty
