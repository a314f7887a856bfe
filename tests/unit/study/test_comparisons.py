"""Pairs of a sweep with known effects: what is compared, what is left out, what is named."""

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="needs scipy (the extra report)")

from mlra_scale.study.report import associations
from mlra_scale.study.report.associations import TEV, VARIANCE
from mlra_scale.study.report.comparisons import (
    SENSITIVITY,
    PairedComparison,
    are_log_spaced,
    compare,
    sensitivities,
    stability_table,
)
from mlra_scale.study.report.sweep_record import SweepRecord, open_sweep, read_curves, table_of
from tests.support.study_folders import Record, cell_of, write_lines, write_sweep


def sweep_of(lines: list[Record]) -> SweepRecord:
    return SweepRecord(Path("sweep"), table_of(lines, Path("sweep")))


def of_loss(found: list[PairedComparison]) -> list[PairedComparison]:
    return [item for item in found if item.measure.name == "final training loss"]


def losses(variant: str, values: list[float | None], axes: Record | None = None, **more: Any) -> list[Record]:
    """Cells of seeds 1, 2, ..., without one where the value is None."""
    made = [(seed, value) for seed, value in enumerate(values, start=1) if value is not None]
    return [cell_of(variant, axes or {}, seed, final_loss=value, **more) for seed, value in made]


def test_pairs_have_the_same_seed_whatever_the_order() -> None:
    sweep = sweep_of([*losses("a", [1.0, 2.0, 4.0]), *reversed(losses("b", [1.5, 2.0, 5.5]))])
    (found,) = of_loss(compare(sweep))
    assert (found.first, found.second, found.setting) == ("b", "a", "the one setting")
    assert (found.difference.n, found.difference.value) == (3, pytest.approx(2.0 / 3))
    assert found.left_out == ()


def test_pairs_that_are_not_whole_are_counted_with_their_reason() -> None:
    lines = [*losses("a", [1.0, 2.0, 3.0, 4.0]), *losses("b", [1.1, None, 3.2])]
    lines += [cell_of("b", {}, 4, state="diverged", final_loss=None), cell_of("b", {}, 5, state="failed")]
    lines += losses("a", [None] * 4 + [5.0]) + losses("a", [None] * 5 + [6.0])
    lines += [cell_of("b", {}, 6, final_loss=None)]
    (found,) = of_loss(compare(sweep_of(lines)))
    assert found.difference.n == 2
    assert found.left_out == (
        "1 pair (b diverged)",
        "1 pair (b failed)",
        "1 pair (b not finished)",
        "1 pair (final training loss not measured)",
    )
    assert "no claim is made with fewer than 3 pairs" in found.statement and "b diverged" in found.statement


def test_settings_are_compared_apart_and_then_as_one_mean_per_seed() -> None:
    lines = []
    for depth, effects in ((24, [-0.1, -0.2, -0.3]), (48, [0.1, 0.0, 0.2])):
        axes = {"model.num_layers": depth}
        lines += losses("a", [5.0, 6.0, 7.0], axes)
        lines += losses("b", [loss + effect for loss, effect in zip((5.0, 6.0, 7.0), effects, strict=True)], axes)
    found = of_loss(compare(sweep_of(lines)))
    assert [item.setting for item in found] == [
        "depth (blocks) 24",
        "depth (blocks) 48",
        "mean over 2 of 2 settings, per seed",
    ]
    assert [item.difference.value for item in found] == pytest.approx([-0.2, 0.1, -0.05])
    # Per seed: 0.0, -0.1, -0.05: three units, not six.
    assert found[2].difference.n == 3
    assert found[2].difference.error == pytest.approx(0.05 / math.sqrt(3))


def test_the_mean_over_settings_leaves_out_those_that_lack_a_seed() -> None:
    lines = []
    for depth in (12, 24, 48):
        lines += losses("a", [5.0, 6.0, 7.0], {"model.num_layers": depth})
        lines += losses("b", [5.1, 6.2, None if depth == 48 else 7.3], {"model.num_layers": depth})
    found = of_loss(compare(sweep_of(lines)))[-1]
    assert found.setting == "mean over 2 of 3 settings, per seed"
    assert found.left_out == ("1 setting without a pair of every seed",)


def test_every_measure_is_a_family_of_its_own(tmp_path: Path) -> None:
    sweep = open_sweep(write_sweep(tmp_path / "s", {"a": 0.0, "b": -0.1, "c": 0.0}, record_steps=0))
    found = compare(sweep)
    for name in {item.measure.name for item in found}:
        items = [item for item in found if item.measure.name == name]
        # 3 pairs of variants in 8 settings, and 3 means over them; the sensitivity has 2 settings.
        expected = {False: 6} if name == SENSITIVITY.name else {False: 24, True: 3}
        assert {item.is_mean: item.num_adjusted for item in items} == expected
        assert all(item.adjusted_p >= item.difference.p for item in items)


def test_a_true_difference_is_named_and_a_null_is_not(tmp_path: Path) -> None:
    sweep = open_sweep(write_sweep(tmp_path / "s", {"dense": 0.0, "mlra": -0.1, "control": 0.0}, record_steps=0))
    found = of_loss(compare(sweep))
    by_pair = {pair: [i for i in found if (i.first, i.second) == pair] for pair in {(i.first, i.second) for i in found}}
    assert all(item.is_supported and item.difference.value < 0 for item in by_pair["mlra", "dense"])
    assert all(item.statement.startswith("lower by 0.10") for item in by_pair["mlra", "dense"])
    assert not any(item.is_supported for item in by_pair["control", "dense"])
    assert all("no difference is supported" in item.statement for item in by_pair["control", "dense"])
    assert all(item.statement.startswith("higher by 0.10") for item in by_pair["control", "mlra"])


def rate_lines(variant: str, by_rate: dict[float, list[float | None]], **more: Any) -> list[Record]:
    return [line for rate, values in by_rate.items() for line in losses(variant, values, {"optim.lr": rate}, **more)]


def test_learning_rate_sensitivity_is_that_of_each_seed() -> None:
    lines = rate_lines("a", {1e-3: [5.0, 5.5], 1e-2: [6.0, 5.0], 1e-1: [8.0, None]})
    lines.append(cell_of("a", {"optim.lr": 1e-1}, 2, state="diverged", final_loss=None, initial_loss=10.0))
    found = sensitivities(sweep_of(lines))
    # Seed 1: 0, 1, 3 above its best; seed 2: 0.5, 0, 10 - 5.
    assert found[SENSITIVITY.name].tolist() == pytest.approx([4 / 3, 5.5 / 3])
    assert found.seed.tolist() == ["1", "2"] and found.state.tolist() == ["done", "done"]


def test_seeds_without_all_rates_and_without_any_success_are_left_out() -> None:
    lines = rate_lines("a", {1e-3: [5.0, 5.5, 20.0], 1e-2: [6.0, None, 30.0]})
    lines += rate_lines("b", {1e-3: [5.0, 5.5, 6.0], 1e-2: [6.0, 6.0, 6.0]})
    found = sensitivities(sweep_of(lines)).set_index(["variant", "seed"])
    assert found[SENSITIVITY.name].loc["a"].dropna().to_dict() == pytest.approx({"1": 0.5})
    undefined = "undefined: no run ended below its initial loss"
    assert found.state.loc["a"].tolist() == ["done", "without all learning rates", undefined]
    comparison = compare(sweep_of(lines))[-1]
    assert (comparison.measure, comparison.difference.n) == (SENSITIVITY, 1)
    assert comparison.left_out == (f"1 pair (a {undefined})", "1 pair (a without all learning rates)")


def test_one_rate_has_no_sensitivity() -> None:
    assert sensitivities(sweep_of(rate_lines("a", {1e-3: [5.0, 5.5]}))).empty


def test_spacing_of_rates() -> None:
    assert are_log_spaced([3e-4, 1e-3, 3e-3, 1e-2]) and are_log_spaced([1e-3]) and are_log_spaced([1e-4, 1e-2])
    assert not are_log_spaced([1e-3, 2e-3, 1e-2])


def test_divergences_are_counted_among_runs_with_an_outcome() -> None:
    lines = [cell_of("a", {}, seed, spikes=seed) for seed in (1, 2)]
    lines += [cell_of("a", {}, 3, state="diverged"), cell_of("a", {}, 4, state="failed")]
    (row,) = stability_table(sweep_of(lines)).to_dict("records")
    counts = {"outcomes": 3, "diverged": 1, "failed": 1, "spikes": 1.5}
    assert row == {"variant": "a", "setting": "the one setting", **counts}


def test_associations_of_a_sweep(tmp_path: Path) -> None:
    """In these folders TEV follows the gradient variance, at every learning rate too."""
    folder = write_sweep(tmp_path / "s", {"a": 0.0, "b": 0.0}, depths=(24,), record_steps=4)
    sweep = open_sweep(folder)
    rows = {(row.first, row.second, row.fixed): row.found for row in associations.of_finished_runs(sweep)}
    for fixed in ("nothing", "learning rate", "learning rate 0.001", "every axis"):
        spearman, pearson = rows[TEV, VARIANCE, fixed]
        assert spearman.is_supported and spearman.value > 0.6 and pearson.is_supported, fixed
    assert rows[TEV, VARIANCE, "nothing"][0].runs == 40
    assert rows[TEV, VARIANCE, "learning rate 0.001"][0].runs == 10
    seen = associations.values_over_steps(read_curves(sweep))
    steps = {(row.first, row.second, row.fixed): row.found for row in associations.within_steps(sweep, seen)}
    spearman, _ = steps[TEV, VARIANCE, "step and learning rate"]
    assert spearman.is_supported and (spearman.n, spearman.runs) == (160, 40)
    spearman, _ = rows[TEV, VARIANCE, "every axis and the variant"]
    assert spearman.is_supported and spearman.value > 0.6
    # Within these runs TEV rises by the same with every step: no change of it differs from another.
    assert associations.within_runs(seen).n == 0


def test_associations_of_unfinished_sweeps(tmp_path: Path) -> None:
    write_lines(tmp_path / "results.jsonl", [cell_of("a", {}, seed, tev_mean=0.1) for seed in (1, 2)])
    sweep = open_sweep(tmp_path)
    seen = associations.values_over_steps(read_curves(sweep))
    assert associations.of_finished_runs(sweep) == [] and associations.within_steps(sweep, seen) == []
    assert associations.within_runs(seen).n == 0
