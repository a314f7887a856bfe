"""The best rate over depth: planted optima are found, and ends of the sweep are not taken for optima."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")

from docs.studies.completep.__main__ import main
from docs.studies.completep.analysis import Best, Curve, interval, report, side, slope_weights, within
from mlra_scale.study.grid import cells_of, load_study

STUDY = Path(__file__).resolve().parents[3] / "docs" / "studies" / "completep.yaml"
RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
DEPTHS = (12, 24, 48, 96)


def write(folder: Path, optimum: Callable[[str, int], float], noise: float = 0.005) -> Path:
    """Losses rise by the square of the octaves from an optimum, given as log2 of a rate."""
    generator, lines = np.random.default_rng(0), []
    for rule in ("none", "completep"):
        for depth in DEPTHS:
            for seed in (11, 12, 13):
                for rate in RATES:
                    loss = 6.0 + 0.05 * (math.log2(rate) - optimum(rule, depth)) ** 2 + 0.03 * seed
                    loss += noise * float(generator.standard_normal())
                    axes = {"model.num_layers": depth, "optim.lr": rate}
                    cell = {"cell": f"{rule}-{depth}-{rate}-{seed}", "variant": rule, "axes": axes, "seed": seed}
                    lines.append({**cell, "state": "done", "validation_loss": loss})
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def falling(rule: str, depth: int) -> float:
    """Half an octave down per doubling without CompleteP, from 2**-7 at 12 blocks."""
    return -7.0 - (0.5 * math.log2(depth / 12) if rule == "none" else 0.0)


def test_the_study_has_the_rates_and_depths_that_are_analysed() -> None:
    cells = cells_of(load_study(STUDY))
    assert sorted({cell.config.optim.lr for cell in cells}) == RATES and len(cells) == 2 * 4 * 7 * 3
    assert {cell.config.model.num_layers for cell in cells} == set(DEPTHS)
    factors = {
        cell.config.model.num_layers: cell.config.model.branch_factor for cell in cells if cell.variant != "none"
    }
    assert factors == {depth: 12 / depth for depth in DEPTHS}
    assert {cell.config.model.branch_factor for cell in cells if cell.variant == "none"} == {1.0}


def best_of(*losses: float, places: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.5, 1.0)) -> Best:
    return Curve(np.array(places), np.array([losses])).best()


def test_the_vertex_of_a_parabola_is_found_and_an_end_is_none() -> None:
    places = np.array([-3.0, -2.0, -1.0, 0.5, 1.0])
    for vertex in (-1.2, 0.2):
        found = best_of(*(2.0 + 0.7 * (places - vertex) ** 2))
        assert (found.place, found.is_enclosed) == (pytest.approx(vertex), True)
    for losses, place in (
        (2.0 + 0.7 * (places + 4.0) ** 2, -3.0),
        ((2.0, 1.0, math.nan, 3.0, 4.0), -2.0),
        (np.ones(5), -3.0),
        ((2.0, 2.0 - 1e-9, 2.0, 1.0, math.nan), 0.5),
    ):
        found = best_of(*losses)
        assert (found.place, found.is_enclosed) == (place, False) and math.isnan(found.variance)
    assert slope_weights(np.array([12.0, 24.0, 48.0])) @ [3.0, 2.5, 2.0] == pytest.approx(-0.5)


def test_the_variance_is_that_of_the_delta_method_and_a_shift_of_a_seed_is_none() -> None:
    places, generator = np.arange(-3.0, 4.0), np.random.default_rng(1)
    losses = 0.05 * (places - 0.3) ** 2 + 1e-4 * generator.standard_normal((3, 7))
    curve, step = Curve(places, losses), 1e-7
    gradient = [Curve(places, losses + step * row).best().place for row in np.eye(7)]
    changes = losses @ ((np.array(gradient) - curve.best().place) / step)
    assert curve.best().variance == pytest.approx(changes.var(ddof=1) / 3, rel=1e-3)
    shifted = Curve(places, losses + np.array([[0.0], [0.1], [5.0]])).best()
    assert shifted.variance == pytest.approx(curve.best().variance, rel=1e-6)


def test_intervals_of_slopes_hold_what_they_say() -> None:
    """Of the true slopes 95 % lie in their intervals, for three seeds; of resampled ones it was 82 %."""
    generator, places, optima = np.random.default_rng(2), np.arange(-11.0, -4.0), np.array([-7.2, -7.7, -8.2, -8.7])
    weights, hits, count = slope_weights(np.array(DEPTHS, np.float64)), 0, 1000
    noise_NLSR = 0.01 * generator.standard_normal((count, 4, 3, 7))
    for losses_LSR in 0.05 * (places - optima[:, None, None]) ** 2 + noise_NLSR:
        ends = interval(weights, [Curve(places, losses_SR).best() for losses_SR in losses_LSR])
        hits += ends is not None and ends[0] < -0.5 < ends[1]
    assert 0.92 < hits / count < 0.98


def test_verdicts_follow_the_intervals() -> None:
    assert (side((0.1, 0.2), above=True), side((0.1, 0.2), above=False)) == ("supported", "refuted")
    assert (side((-0.2, -0.1), above=False), side((-0.1, 0.1), above=False)) == ("supported", "undecided")
    assert [within(ends) for ends in ((-0.2, 0.2), (0.3, 0.4), (-0.4, -0.3), (0.2, 0.3), None)] == [
        *("supported", "refuted", "refuted", "undecided", "undecided")
    ]


def test_a_planted_shift_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "sweep", falling)
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "completep.json").read_text())
    assert result["verdicts"] == {"C1": "supported", "C2": "supported", "C3": "supported"}
    assert result["rules"]["none"]["slope"] == pytest.approx(-0.5, abs=0.05)
    low, high = result["rules"]["none"]["slope_interval"]
    assert low < -0.45 and high > -0.55 and high - low < 0.3
    assert result["difference_interval"][0] > 0.3
    for rule in ("none", "completep"):
        for depth in DEPTHS:
            found = result["rules"][rule]["depths"][str(depth)]
            assert (
                math.log2(found["best_rate"]) == pytest.approx(falling(rule, depth), abs=0.15) and found["is_enclosed"]
            )
    text = capsys.readouterr().out
    assert text.startswith("Verdicts: C1 supported, C2 supported, C3 supported.") and "| none | 96 |" in text
    assert (tmp_path / "out" / "loss-over-rates.png").read_bytes()[1:4] == b"PNG"


def test_without_a_shift_none_is_reported(tmp_path: Path) -> None:
    found = report(write(tmp_path / "sweep", lambda rule, depth: -8.0, noise=0.02), tmp_path)["verdicts"]
    assert found["C1"] == "undecided" and found["C2"] == "undecided"


def test_nothing_is_concluded_from_an_optimum_at_the_end_of_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four depths whose best rate is the lowest one have a slope of 0, which says nothing."""
    folder = write(tmp_path / "sweep", lambda rule, depth: -14.0 if rule == "completep" else falling(rule, depth))
    result = report(folder, tmp_path)
    assert result["rules"]["completep"]["slope"] == pytest.approx(0.0, abs=1e-9)
    assert result["rules"]["completep"]["slope_interval"] is result["difference_interval"] is None
    assert result["verdicts"] == {"C1": "supported", "C2": "undecided", "C3": "undecided"}
    assert main([str(folder)]) == 0
    assert "| completep | 12 | 5.00e-04 (not enclosed) | - | 0 of 3 |" in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 2 and "lacks" in capsys.readouterr().err


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    folder = write(tmp_path / "sweep", falling)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["seed"] == 11))
    result = report(folder, tmp_path)
    assert set(result["verdicts"].values()) == {"undecided"} and result["difference_interval"] is None
