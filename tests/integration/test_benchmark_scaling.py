"""The benchmarks of scaling, growth and running costs run, and their arithmetic is right; times are never asserted."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders import Shape
from benchmarks.growth import line_through
from benchmarks.layouts import micro_batches
from benchmarks.scaling import QUICK, bubble, check_losses, report_of, turns_of
from benchmarks.turns import Turn, World, take_turns
from tests.support.turn_takers import count_turns, fail

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape("test", num_layers=1, hidden_size=8, num_heads=1, batch_size=4, sequence_length=8, vocab_size=64)


def run_quick(name: str, report_file: Path) -> tuple[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(report_file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(report_file.read_text())


def check_spread(ratio: Mapping[str, float]) -> None:
    assert -math.inf < ratio["min"] <= ratio["lower"] <= ratio["median"] <= ratio["upper"] <= ratio["max"] < math.inf


@pytest.mark.slow
def test_scaling_runs_and_reports_every_layout(tmp_path: Path) -> None:
    text, report = run_quick("scaling", tmp_path / "report.json")
    for expected in ("control: two single processes", "data: ZeRO 3 weak", "tensor: strong", "bubble", "plain loop"):
        assert expected in text
    assert len(report["scaling"]) == 8 + 2 + 3
    for row in report["scaling"]:
        for ratio in (row["of_ideal"], row["of_control"]):
            check_spread(ratio)
            assert ratio["min"] > 0.0
    for row in report["bubble"]:
        for name in ("idle_of_the_busier_stage", "idle_mean", "busy_less_busy_over_busier"):
            check_spread(row[name])
            assert row[name]["min"] > 0.0 and row[name]["max"] <= 1.0, (
                "a stage is not busy for longer than a step takes"
            )
    assert [row["theory"] for row in report["bubble"]] == pytest.approx([1 / 3, 1 / 5])
    assert next(iter(report["engines_against_plain_loop"]["tiny"])) == "plain loop"


@pytest.mark.slow
def test_growth_runs_and_reports_every_axis(tmp_path: Path) -> None:
    text, report = run_quick("growth", tmp_path / "report.json")
    assert [axis["axis"] for axis in report["axes"]] == ["depth", "vocabulary", "sequence length"]
    assert "straight line" in text
    for axis in report["axes"]:
        assert axis["peak_bytes"] == sorted(axis["peak_bytes"]), "more of anything does not take less memory"
        for ratio in [*axis["time_to_smallest"], *axis["time_to_linear"]]:
            check_spread(ratio)
    # Blocks are all alike: what one more of them takes is known to the byte, but for what allocators round up.
    assert report["axes"][0]["memory_line"]["largest_distance"] < 0.02


@pytest.mark.slow
def test_running_runs_and_reports_every_part(tmp_path: Path) -> None:
    text, report = run_quick("running", tmp_path / "report.json")
    for expected in ("prepare_data:", "start-up", "TEV", "waiting for the samples", "validation micro-batch"):
        assert expected in text
    assert report["steps"]["wandb"] == "offline"
    for ratio in [*report["steps"]["shares_of_a_step"].values(), report["steps"]["evaluation_to_forward"]]:
        check_spread(ratio)
        assert ratio["min"] > 0.0
    for ratio in report["preparation"]["tokens_per_second_to_tokenizers_alone"].values():
        check_spread(ratio)
    seconds = report["start_up"]["seconds"]
    for run, whole in enumerate(seconds["whole"]):
        phases = {name: values[run] for name, values in seconds.items() if name != "whole"}
        for name, value in phases.items():
            assert 0.0 < value < whole, f"{name}: the phase was met, and what is in others was not counted twice"


def test_data_ranks_share_the_samples_of_one_process() -> None:
    (whole,) = micro_batches(SHAPE, 8, 0, 1, count=1, size=4)
    shared = [micro_batches(SHAPE, 8, rank, 2, count=1, size=2)[0] for rank in range(2)]
    single = micro_batches(SHAPE, 8, 0, 1, count=4, size=1)
    rows = whole.tokens_BS.tolist()
    assert [row for batch in shared for row in batch.tokens_BS.tolist()] == rows
    assert [row for batch in single for row in batch.tokens_BS.tolist()] == rows
    assert len({tuple(row) for row in rows}) == 4


def test_the_bubble_of_an_ideal_pipeline_is_the_theory() -> None:
    count, forward_and_backward = 3, 2.0
    span = (count + 1) * forward_and_backward
    stages = [{"busy": count * forward_and_backward, "span": span}, {"busy": count * forward_and_backward, "span": 7.0}]
    row = bubble(count, [stages, stages])
    assert row["theory"] == pytest.approx(0.25)
    assert row["idle_of_the_busier_stage"]["median"] == pytest.approx(0.25)
    assert row["idle_mean"]["median"] == pytest.approx(0.25)


def ideal_results() -> dict[str, list[list[dict[str, float]]]]:
    """What a machine without any overhead would measure, whose processes are slowed down by a half by a neighbour."""
    results = {}
    for turn in turns_of(QUICK):
        seconds = 1.0
        if turn.name.startswith(("one: m", "pipeline")):
            seconds = float(turn.name.rpartition(" ")[2])
        if turn.name.startswith(("data", "tensor", "pipeline")) and not turn.name.endswith("weak"):
            seconds /= 2
        ranks = 1 if turn.name.startswith("one") else 2
        seconds = 1.5 if turn.name == "two at once" else seconds
        results[turn.name] = [[{"seconds": seconds, "loss": 3.0, "busy": 1.0, "span": 2.0}] * ranks] * 2
    return results


def test_ideal_scaling_is_one() -> None:
    report = report_of(QUICK, ideal_results())
    for row in report["scaling"]:
        assert row["of_ideal"]["median"] == pytest.approx(1.0), row
        assert row["of_control"]["median"] == pytest.approx(1.5)
    assert report["control_slowdown"]["median"] == pytest.approx(1.5)


def test_layouts_that_compute_something_else_are_not_reported() -> None:
    results = ideal_results()
    check_losses(QUICK, results)
    results["tensor: strong"] = [[{"seconds": 0.5, "loss": 3.001}] * 2] * 2
    with pytest.raises(SystemExit, match="tensor: strong does not compute what one: plain loop computes"):
        check_losses(QUICK, results)


def test_a_line_is_found_and_what_bends_is_told() -> None:
    straight = line_through([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert straight == pytest.approx({"offset": 3.0, "slope": 2.0, "largest_distance": 0.0}, abs=1e-12)
    assert line_through([1.0, 2.0, 4.0], [1.0, 4.0, 16.0])["largest_distance"] > 0.1


TURNS = [Turn("alone", (("a", "count"),)), Turn("both", (("bb", "count"), ("a", "count")))]


@pytest.mark.slow
def test_turns_are_taken_by_those_who_have_them() -> None:
    worlds = [World("a", 1, count_turns, ("a",)), World("bb", 2, count_turns, ("bb",))]
    results = take_turns(worlds, TURNS, rounds=2, timeout_s=200.0)
    assert [[rank["length"] for rank in ranks] for ranks in results["both"]] == [[2.0, 2.0, 1.0]] * 3
    assert [[rank["number"] for rank in ranks] for ranks in results["alone"]] == [[0.0], [1.0], [2.0]]


def test_a_world_that_fails_ends_the_others() -> None:
    worlds = [World("a", 1, count_turns, ("a",)), World("bb", 1, fail, ("bb",))]
    with pytest.raises(RuntimeError, match=r"bb cannot be built|another process failed"):
        take_turns(worlds, TURNS, rounds=2, timeout_s=200.0)


def test_make_bench_runs_what_is_named(tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make is not None
    command = [make, "-n", "bench", "BENCH=scaling growth", "BENCH_ARGS=--quick"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "for name in scaling growth; do" in text
    assert "--json runs/bench/$name.json --quick | tee runs/bench/$name.txt" in text
