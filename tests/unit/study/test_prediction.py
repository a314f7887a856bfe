"""The whole analysis on runs whose truth is known: planted warnings are found, and the protocol is not fooled."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.studies.predict.__main__ import main
from docs.studies.predict.alarms import halves
from docs.studies.predict.analysis import PRIMARY, analyse
from docs.studies.predict.areas import comparable, roc_area
from docs.studies.predict.runs import PredictionError, SweptRuns, read_runs
from docs.studies.predict.text import as_markdown
from docs.studies.predict.windows import (
    BASELINES,
    SERIES,
    Comparison,
    Run,
    change,
    comparison_keys,
    cut_windows,
    level,
)
from tests.unit.study.synthetic import QUICK, STEPS, Numbers, make_run, make_sweep, nothing, write_run

PLANTED = 18
"""Steps before the event at which a planted warning begins."""


def warning(steps: Numbers, event: int | None) -> Numbers:
    return nothing(steps, event) + (2.0 * (steps >= event - PLANTED) if event is not None else 0.0)


def of(result: dict[str, Any], comparison: str = "matched", stretch: str = "near") -> dict[str, Any]:
    return next(c for c in result["comparisons"] if (c["comparison"], c["stretch"]) == (comparison, stretch))


def area_of(swept: SweptRuns, signal: str, comparison: Comparison) -> float:
    windows = cut_windows(swept.runs, QUICK.gap, QUICK.horizon, QUICK)
    field = comparable(comparison_keys(swept.runs, windows, comparison), windows.is_positive, windows.run)
    return roc_area(field, windows.signals[signal])


def test_a_planted_warning_is_found_with_its_lead_time() -> None:
    swept = make_sweep(0, warning)
    result = analyse(swept, QUICK)
    signal = of(result)["signals"]["tev_mean"]
    # Windows end at multiples of 5, the first ones of an event's stretch before the warning begins.
    assert signal["area"] > 0.8 and signal["interval"][0] > 0.7
    assert result["verdicts"] == {"tev_mean": "warns", "tev_std": "warns"} and result["claim"] == "supported"
    expected = []
    for run in swept.runs:
        if run.event is not None:
            first = 5 * math.ceil((run.event.step - PLANTED) / 5)
            expected.append(run.event.step - first)
    assert signal["alarms"]["warned"] == signal["alarms"]["judged"] == 12
    # A few sound earlier, as a false alarm may.
    assert np.median(signal["alarms"]["lead_times"]) == np.median(expected)
    assert signal["alarms"]["chance"] < 0.5
    # What does not warn is not said to.
    assert of(result)["signals"]["gradient_norm"]["interval"][0] < 0.5
    assert signal["differences"]["gradient_norm"]["interval"][0] > 0
    # The warning begins later than the far stretch.
    assert of(result, stretch="far")["signals"]["tev_mean"]["interval"][0] < 0.5


def test_without_a_warning_none_is_reported() -> None:
    """Over seeds: the mean area is 1/2, verdicts are as rare as they should be, and alarms are as many as was asked."""
    areas, verdicts, alarms = [], [], []
    for seed in range(10):
        result = analyse(make_sweep(seed), QUICK)
        for name in PRIMARY:
            signal = of(result)["signals"][name]
            areas.append(signal["area"])
            verdicts.append(result["verdicts"][name])
            alarms.append(
                (signal["alarms"]["false_share"], signal["alarms"]["warned"] / 12, signal["alarms"]["chance"])
            )
    # One area of 12 events and their controls scatters by 0.1.
    assert abs(np.mean(areas) - 0.5) < 3 * 0.1 / math.sqrt(20)
    # 97.5 % intervals that are a little short: one in 20 is due.
    assert verdicts.count("warns") + verdicts.count("the reverse") <= 4
    false_share, warned, chance = np.mean(alarms, axis=0)
    assert 0.025 < false_share < 0.1
    # Events are warned of as often as controls: shares of 240 events, in windows that overlap.
    assert abs(warned - chance) < 0.1


def test_the_reverse_is_called_so() -> None:
    result = analyse(make_sweep(0, lambda steps, event: -warning(steps, event)), QUICK)
    assert result["verdicts"] == {"tev_mean": "the reverse", "tev_std": "the reverse"}
    assert result["claim"] == "refuted"


def late_sweep(seed: int) -> SweptRuns:
    """TEV follows the sum of the learning rates and nothing else; events come late, and mostly at the high rate."""
    generator = np.random.default_rng(seed)
    runs: list[Run] = []
    for index in range(24):
        rate, threshold = ((1e-3, 10), (3e-3, 2))[index % 2]
        event = int(generator.integers(90, STEPS - 30)) if index // 2 >= threshold else None
        run = make_run(generator, event, rate, seed=index)
        for name in ("tev_mean", "tev_std"):
            run.series[name][:] = 1.0 + np.cumsum(run.rates) + 1e-4 * generator.standard_normal(STEPS)
        runs.append(run)
    return SweptRuns(tuple(runs), (), {}, ())


def test_a_signal_that_only_follows_step_and_rate_does_not_fool_the_protocol() -> None:
    sweeps = [late_sweep(seed) for seed in range(6)]
    for signal in ("tev_mean", "tev_mean_change"):
        # One area scatters by 0.08.
        assert abs(np.mean([area_of(swept, signal, "matched") for swept in sweeps]) - 0.5) < 3 * 0.08 / math.sqrt(6)
    assert np.mean([area_of(swept, "tev_mean", "pooled") for swept in sweeps]) > 0.8
    result = analyse(sweeps[0], QUICK)
    for name in BASELINES:
        found = of(result)["signals"][name]
        assert (found["area"], found["interval"]) == (0.5, (0.5, 0.5))
        assert of(result, "pooled")["signals"][name]["area"] > 0.6


def test_a_difference_between_variants_is_seen_by_matched_and_not_by_twins() -> None:
    """Unclipped runs have a higher TEV from the start and most of the events: that is no warning in time."""
    generator = np.random.default_rng(0)
    runs = []
    for index in range(24):
        variant = ("plain", "unclipped")[index % 2]
        event = int(generator.integers(45, 120)) if (index % 2 == 1) == (index < 18) else None
        run = make_run(generator, event, 1e-3, variant, index)
        run.series["tev_mean"][:] *= 1.0 + index % 2
        runs.append(run)
    swept = SweptRuns(tuple(runs), (), {}, ())
    assert area_of(swept, "tev_mean", "matched") > 0.65
    assert abs(area_of(swept, "tev_mean", "twins") - 0.5) < 0.15
    assert analyse(swept, QUICK)["verdicts"]["tev_mean"] == "undecided", "one of the two comparisons is not enough"


def test_windows_are_cut_as_the_protocol_says() -> None:
    generator = np.random.default_rng(0)
    runs = [make_run(generator, 83), make_run(generator)]
    windows = cut_windows(runs, QUICK.gap, QUICK.horizon, QUICK)
    steps = {
        (index, positive): windows.step[(windows.run == index) & (windows.is_positive == positive)].tolist()
        for index in (0, 1)
        for positive in (True, False)
    }
    # 83 - 25 = 58 to 83 - 5 = 78; free of the event up to 25 steps after 57.
    assert steps[0, True] == [60, 65, 70, 75]
    assert steps[0, False] == list(range(20, 56, 5))
    assert steps[1, True] == []
    assert steps[1, False] == list(range(20, STEPS - 25 + 1, 5))
    far = cut_windows(runs, QUICK.horizon + 1, QUICK.far_horizon, QUICK)
    assert far.step[far.is_positive].tolist() == [35, 40, 45, 50, 55]


def test_windows_know_nothing_of_what_comes_after_them() -> None:
    run = make_run(np.random.default_rng(0), 100)
    windows = cut_windows([run], QUICK.gap, QUICK.horizon, QUICK)
    spoiled = replace(run, series={name: values.copy() for name, values in run.series.items()})
    for values in spoiled.series.values():
        values[80:] = 1e9
    for name, before in windows.signals.items():
        after = cut_windows([spoiled], QUICK.gap, QUICK.horizon, QUICK).signals[name]
        assert np.array_equal(before[windows.step <= 80], after[windows.step <= 80])
        if name not in BASELINES:
            assert not np.array_equal(before[windows.step > 80], after[windows.step > 80])


def test_levels_and_changes_against_numbers_known_in_advance() -> None:
    values = np.exp(np.arange(1.0, 51.0) * 0.25)
    assert level(values, step=20, steps=10) == pytest.approx(0.25 * 15.5)
    assert change(values, step=20, steps=20) == pytest.approx(0.25)
    # Measured at every fifth step only, or not positive: what is there is used.
    values[np.arange(50) % 5 != 0] = np.nan
    values[10] = -1.0
    assert level(values, step=20, steps=10) == pytest.approx(0.25 * 16)
    assert change(values, step=20, steps=20) == pytest.approx(0.25)
    assert math.isnan(change(values, step=10, steps=10)) and math.isnan(level(values, step=5, steps=4))


def test_runs_are_halved_within_configurations() -> None:
    runs = [make_run(np.random.default_rng(0), rate=rate, seed=seed) for seed in range(4) for rate in (1e-3, 3e-3)]
    half = halves(runs)
    for rate in (1e-3, 3e-3):
        assert sorted(half[[index for index, run in enumerate(runs) if run.rates[0] == rate]]) == [0, 0, 1, 1]


@pytest.mark.parametrize(("num_events", "num_stable"), [(0, 6), (1, 6), (2, 0), (4, 6), (0, 0)])
def test_too_few_events_are_said_and_no_crash(num_events: int, num_stable: int) -> None:
    result = analyse(make_sweep(1, warning, num_events, num_stable), QUICK)
    assert set(result["verdicts"].values()) == {"undecided"} and result["claim"] == "undecided"
    text = as_markdown(result)
    assert "Too few events" in text and ("No event." in text) == (num_events == 0)
    json.dumps(result, allow_nan=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep of 12 runs with an event and 12 without, and some that must not take part."""
    folder = tmp_path / "sweep"
    for run in make_sweep(3, warning, 12, 12).runs:
        write_run(folder, run)
    generator = np.random.default_rng(9)
    write_run(folder, make_run(generator, 60, variant="poisoned-batches", seed=50))
    write_run(folder, make_run(generator, None, variant="poisoned-batches", seed=51))
    write_run(folder, make_run(generator, 20, seed=60))
    stopped = make_run(generator, seed=70)
    write_run(folder, stopped, stopped.series["loss"][:100], stopped=True)
    guarded = make_run(generator, 70, seed=80)
    write_run(folder, guarded)
    events = folder / "cells" / guarded.cell / "events.jsonl"
    events.write_text('{"event": "guard_skip", "step": 71}\n' + events.read_text())
    (folder / "study.json").write_text(json.dumps({"commit": "abc", "command": ["tools/sweep.py", "study.yaml"]}))
    with (folder / "results.jsonl").open("a") as file:
        failed = {"cell": "broken", "variant": "plain", "seed": 90, "run": "cells/broken", "state": "failed"}
        file.write(json.dumps({**failed, "error": "no memory"}) + "\n")
    return folder


def test_a_sweep_is_read_as_it_was_left(folder: Path) -> None:
    swept = read_runs(folder, QUICK)
    expected = {run.cell: run for run in make_sweep(3, warning, 12, 12).runs}
    assert {run.cell for run in swept.runs} == {*expected, "plain-lr0.001-seed70"}
    for run in swept.runs:
        if (original := expected.get(run.cell)) is None:
            assert run.event is not None and (run.event.kind, run.event.step) == ("non-finite", 101)
            continue
        assert run.event == original.event and run.seed == original.seed
        assert np.array_equal(run.rates, original.rates)
        for name in SERIES:
            values = original.series[name].copy()
            if name in ("shallow_gradient_variance", "largest_logit"):
                values[1::2] = np.nan
            np.testing.assert_allclose(run.series[name], values, rtol=1e-12)
    assert swept.poisoned == {"poisoned-batches-lr0.001-seed50": True, "poisoned-batches-lr0.001-seed51": False}
    assert swept.unstable_from_start == ("plain-lr0.001-seed60",)
    assert {item.cell: item.reason for item in swept.left_out} == {
        "plain-lr0.001-seed80": "the guard acted",
        "broken": "failed: no memory",
    }
    assert len({run.shape for run in swept.runs}) == 1
    assert len({run.twin for run in swept.runs}) == len({run.variant for run in swept.runs}) == 2


def test_the_tool_writes_json_and_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("docs.studies.predict.analysis.Protocol", lambda: replace(QUICK, minimum_events=5))
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "prediction.json").read_text())
    text = (tmp_path / "out" / "prediction.md").read_text()
    assert capsys.readouterr().out == text
    runs = result["runs"]
    assert (runs["with_event"], runs["without_event"], runs["analysed"]) == (13, 12, 25)
    assert "13 with an event and 12 without" in text and "Fewer than 20 runs with an event" in text
    assert "- commit: abc" in text and "- command: tools/sweep.py study.yaml" in text and "- seeds: 0, 1, 2" in text
    assert "poisoned" not in "".join(event["cell"] for event in result["events"])
    assert result["claim"] == "supported" and "**supported**" in text
    assert "2 runs; in 1 an event was found" in text
    area = of(result)["signals"]["tev_mean"]["area"]
    assert f"| TEV mean | {area:.3f} [" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines and all(line.count("|") in (3, 5, 7) for line in lines)
    assert main([str(folder), "--output", str(tmp_path / "again")]) == 0
    for name in ("prediction.json", "prediction.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_cannot_be_read_is_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no results; give the output folder of tools/sweep.py" in capsys.readouterr().err
    metrics = next((folder / "cells").glob("plain-*seed0/metrics.jsonl"))
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:10] + lines[11:]))
    with pytest.raises(PredictionError, match=r"seed0.*train\.log_every=1"):
        read_runs(folder, QUICK)
    metrics.write_text("".join(lines))
    (metrics.parent / "config.yaml").unlink()
    with pytest.raises(PredictionError, match=r"seed0/config\.yaml"):
        read_runs(folder, QUICK)


def test_a_null_loss_ends_the_run(folder: Path) -> None:
    metrics = next((folder / "cells").glob("plain-*seed4/metrics.jsonl"))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert lines[30]["step"] == 30
    lines[30]["loss"] = None
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = next(run for run in read_runs(folder, QUICK).runs if run.seed == 4)
    assert run.event is not None and (run.event.kind, run.event.step, run.steps) == ("non-finite", 30, 29)
