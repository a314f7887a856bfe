"""The benchmark of the low-rank plans runs; what it counts is what the cost model says, or it says so."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import low_rank
from benchmarks.low_rank_ranks import plans_of
from mlra_scale.model.low_rank_plan import Device

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_runs_and_reports(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.low_rank", "--quick", "--tensor", "2", "--counted", "2"]
    command += ["--timeout", "200"]
    result = subprocess.run(
        [*command, "--json", str(report_file)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    for text in ("then as predicted", "whole steps, T = 32", "fastest at R=D/4", "counted on every rank", "what auto"):
        assert text in result.stdout
    report = json.loads(report_file.read_text())
    timed = report["timed"]["2"]
    names = {str(plan) for plan in plans_of(2, (2, 4, 8))} - {"dense"}
    assert len(names) == 9 and set(timed["projections"]) == {"32", "64"}
    for rows in (*timed["projections"].values(), timed["steps"]):
        assert set(rows) == names
        for row in rows.values():
            assert 0.0 < row["min"] <= row["median"] <= row["max"] < math.inf and row["predicted"] < math.inf
    counted = report["counted"]["2"]
    # Replicated: the down-projections twice; sharded: every multiply-add once.
    assert counted["sharded R=D/2"]["all_ranks_to_useful"] == counted["sharded R=D/8"]["all_ranks_to_useful"] == 1.0
    assert counted["replicated R=D/4"]["all_ranks_to_useful"] == 1.5
    for row in report["errors"].values():
        assert 0.0 < row["output"] < 0.01
    assert report["errors"]["merged R=D/2 float32"]["output"] < 1e-6


def test_counts_that_differ_from_the_formulas_are_told() -> None:
    shape = low_rank.COUNTED
    counts = {}
    for plan in plans_of(1, low_rank.PARTS):
        modelled = low_rank.model_shape(shape, plan.parts or 1, low_rank.COUNTED_TOKENS, 1)
        device = Device(flops=1.0, bandwidth=math.inf)
        counts[str(plan)] = (low_rank.predicted_seconds(plan.name, modelled, device), 0.0)
    assert low_rank.check_counts(1, [counts])["dense"]["all_ranks_to_useful"] == 1.0
    counts["merged R=D/4"] = (1.0, 0.0)
    with pytest.raises(SystemExit, match="tensor 1, rank 0, merged R=D/4: counted"):
        low_rank.check_counts(1, [counts])


def test_auto_never_repeats_the_down_projection_where_it_costs_more() -> None:
    rows = low_rank.chosen()
    assert {row["tensor"] for row in rows} == {1, 2, 4, 8} and {row["auto"] for row in rows} == {
        "replicated",
        "sharded",
        "merged",
    }
    for row in rows:
        others = [cost for name, cost in row["to_dense"].items() if name != "replicated"]
        assert not row["repeats"] or row["to_dense"]["replicated"] <= min(others)
    # Where it does repeat it, the ranks are small and sums are dear, or there is little to repeat beside latencies.
    assert all(row["parts"] > 2 or row["tokens"] == 1024 for row in rows if row["repeats"])
