"""The benchmarks run, and compare models that compute the same; times are never asserted."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoint, corruption, optimizers, preparation, render, restart, scaling, step_time
from benchmarks.contenders import PlainGPT2, Shape, Step, TransformersGPT2, config_of, step_of_module
from benchmarks.harness import Report, Table, ratios, rotated, text_of
from benchmarks.tensor_memory import start
from mlra_scale.data import Batch
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.training.record import read_record
from mlra_scale.training.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape("test", num_layers=3, hidden_size=48, num_heads=4, batch_size=3, sequence_length=16, vocab_size=384)


def run_quick(name: str, file: Path, *words: str, timeout: float = 300.0) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(file), *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(file.read_text())


def spreads_of(report: dict[str, Any]) -> list[dict[str, float]]:
    """Every spread of the tables; each must be in order, and finite."""
    found = [cell for table in report["tables"] for row in table["rows"] for cell in row if isinstance(cell, dict)]
    for ratio in found:
        assert -math.inf < ratio["min"] <= ratio["lower"] <= ratio["median"]
        assert ratio["median"] <= ratio["upper"] <= ratio["max"] < math.inf
    return found


@pytest.mark.parametrize(
    "benchmark",
    [checkpoint, corruption, optimizers, preparation, restart, scaling, step_time],
    ids=lambda it: it.__name__,
)
def test_benchmarks_refuse_at_once(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [(["--rounds", "1"], "--rounds 1: a spread needs at least 2")]
    if benchmark is step_time:
        cases += [
            (["--json", str(tmp_path)], f"--json {tmp_path}: this is a folder; name a file"),
            (["--json", str(tmp_path / "no" / "a.json")], f"there is no folder {tmp_path / 'no'}; create it"),
            (["--threads", "0"], "--threads 0: at least 1"),
            (["--shapes", "100"], "invalid choice: '100' (choose from"),
        ]
    for arguments, problem in cases:
        with pytest.raises(SystemExit) as ended:
            benchmark.main(["--quick", *arguments])
        assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_a_report_replaces_the_one_before_and_is_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    spread = {"median": 1.5, "lower": 1.25, "upper": 1.75, "min": 1.0, "max": 2.0}
    for number in (1, 2):
        report = Report("python -m benchmarks.x", "2026-11-29", "abc", {"device": "cpu"})
        report.tables.append(Table("A title", ["", "ms", "ratio", "none"], [["ours", 1234.56, spread, None]], "a note"))
        report.numbers = {"number": number}
        report.write(file)
        assert json.loads(file.read_text())["numbers"] == {"number": number} and list(tmp_path.iterdir()) == [file]
    report.write(None)
    report.write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    assert render.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert "python -m benchmarks.x  (2026-11-29, commit abc)" in text and text_of(report.tables[0]) in text
    for part in ("A title", "1,234.6", "1.500 [1.250 1.750] (1.000 2.000)", "a note"):
        assert part in text
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")
    assert render.main(["--figures", str(file)]) == 0 and file.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_the_documented_reports_are_rendered(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((ROOT / "docs" / "performance").glob("*.json"))
    assert len(files) >= 5 and render.main([str(file) for file in files]) == 0
    shown, document = capsys.readouterr().out, (ROOT / "docs" / "performance.md").read_text()
    for file in files:
        report = json.loads(file.read_text())
        assert f"{report['command']}  ({report['date']}, commit {report['commit']})" in shown
        assert spreads_of(report) or file.name == "planner.json"
        assert f"performance/{file.name}" in document and report["commit"] in document, file


def test_every_round_begins_with_another() -> None:
    assert ["".join(rotated("abc", number)) for number in range(4)] == ["abc", "bca", "cab", "abc"]
    assert ratios([2.0, 3.0], [1.0, 1.0]) == {"median": 2.5, "lower": 2.25, "upper": 2.75, "min": 2.0, "max": 3.0}


def test_make_bench_runs_what_is_named() -> None:
    make = shutil.which("make")
    assert make is not None
    command = [make, "-n", "bench", "BENCH=scaling checkpoint", "BENCH_ARGS=--quick"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "for name in scaling checkpoint; do" in text
    assert "--json runs/bench/$name.json --quick | tee runs/bench/$name.txt" in text


def random_weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Weights of the dense model with nothing at zero or one, so that a swapped pair shows."""
    generator = torch.Generator().manual_seed(1)
    table = ParameterTable(config_of(shape, "dense", "fp32").model)
    return {
        name: torch.randn(info.shape, generator=generator) * 0.1 + (1.0 if name.endswith("norm.weight") else 0.0)
        for name, info in table.items()
    }


def test_plain_pytorch_and_transformers_take_the_same_steps() -> None:
    weights = random_weights(SHAPE)
    modules = [make(SHAPE, weights).double() for make in (PlainGPT2, TransformersGPT2)]
    steps = [step_of_module(module, torch.device("cpu"), "fp32") for module in modules]
    for index in range(4):
        plain, transformers = (step(SHAPE.batch(index)) for step in steps)
        # The loss is taken in fp32; gradients, clipping, weight decay and Adam show in the later steps.
        assert transformers == pytest.approx(plain, rel=1e-6)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    assert sizes[0] == sizes[1] == config_of(SHAPE, "dense", "fp32").model.num_parameters()


@pytest.mark.slow
def test_step_time_runs_and_reports_every_ratio(tmp_path: Path) -> None:
    text, report = run_quick("step_time", tmp_path / "report.json", "--profile", "--device", "cpu")
    for expected in ("device: cpu", "threads: 1 of", "torch ", "plain PyTorch again", "aten::mm"):
        assert expected in text
    (shape,) = report["numbers"].values()
    dense = ["plain PyTorch", "transformers", "transformers ZeRO-1", "plain PyTorch again", "mlra_scale dense"]
    ranks = ["mlra_scale R=D/2", "mlra_scale R=D/4", "mlra_scale R=D/8"]
    assert list(shape["seconds_per_step"]) == [*dense, *ranks]
    with_ours = {f"{name} / {other}" for name in ["mlra_scale dense", *ranks] for other in dense[:3]}
    assert with_ours | {f"{name} / mlra_scale dense" for name in ranks} <= set(shape["ratios"])
    assert all(ratio["min"] > 0.0 for ratio in spreads_of(report))
    # Dense contenders started from the same weights and saw the same tokens: they are still together at the end.
    for name in dense:
        assert shape["last_loss"][name] == pytest.approx(shape["last_loss"]["plain PyTorch"], rel=1e-4)
    # Weights, gradients and two moments in fp32, and activations.
    assert min(shape["peak_bytes"].values()) > 16 * shape["parameters"]["mlra_scale R=D/8"]
    assert shape["peak_bytes"]["plain PyTorch"] == shape["peak_bytes"]["plain PyTorch again"]


def test_peak_memory_is_exact_on_a_cpu() -> None:
    sizes: list[int] = []

    def build() -> Step:
        kept = torch.zeros(1000)

        def step(batch: Batch) -> float:
            temporary = kept + 1.0
            both = torch.cat([temporary, temporary])
            sizes.append(kept.nbytes + temporary.nbytes + both.nbytes)
            del temporary
            return float((both[0] * 2.0).item())

        return step

    started = start(build, torch.device("cpu"), SHAPE.batch(0), SHAPE.batch(1))
    assert started.loss == 2.0 and sizes == [16_000, 16_000]
    assert 16_000 <= started.peak_bytes < 16_500, "with the allocator's alignment"


@pytest.mark.slow
def test_guard_poisons_pairs_of_runs(training_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.guard", "labels", "--quick", "--jobs", "2", "--output", str(tmp_path)]
    data = [f"data.path={training_data}", "model.vocab_size=4096"]
    result = subprocess.run([*command, *data], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    ended = {
        item["variant"]: RunDirectory(tmp_path / "labels" / item["run"])
        for item in read_record(tmp_path / "labels" / "results.jsonl")
    }
    losses = {
        name: [item["loss"] for item in read_record(folder.metrics) if item["step"] > 0]
        for name, folder in ended.items()
    }
    assert losses["guarded"][:30] == losses["unguarded"][:30], "the same run up to the poison"
    assert losses["unguarded"][30] > losses["unguarded"][29] + 0.5, "which shows"
    acted = {
        name: any(item["event"] == "guard_skip" for item in read_record(folder.events))
        for name, folder in ended.items()
    }
    assert acted == {"guarded": True, "unguarded": False}


@pytest.mark.slow
def test_checkpoint_runs_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    text, report = run_quick("checkpoint", tmp_path / "report.json", "--device", "cpu", "--folder", str(disk))
    assert report["numbers"]["bytes"] > 0 and len(spreads_of(report)) == 5 and report["environment"]["disk"] in text
    assert list(disk.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.timeout(1000)
def test_restart_kills_a_rank_and_a_node_with_and_without_spares(tmp_path: Path) -> None:
    _, report = run_quick("restart", tmp_path / "report.json", timeout=900.0)
    numbers = report["numbers"]
    assert [len(marks) for marks in numbers["starts"]["training"]] == [len(restart.PHASES)] * 2
    for rounds in numbers["restarts"].values():
        assert len(rounds) == 2 and all(seconds > 0.0 for each in rounds for seconds in each.values())
    assert len(spreads_of(report)) == 5


@pytest.mark.slow
def test_preparation_gives_the_tokens_of_the_bare_tokenizer(tmp_path: Path) -> None:
    _, report = run_quick("preparation", tmp_path / "report.json")
    assert [len(table["rows"]) for table in report["tables"]] == [4, 4, 1]
    assert len(spreads_of(report)) == 5 and all(ratio["min"] > 0.0 for ratio in spreads_of(report))
    tokens = {each["tokens"] for results in report["numbers"].values() for each in results}
    assert len(tokens) == 1 and tokens.pop() > 100_000


@pytest.mark.slow
def test_scaling_runs_and_reports_every_layout(tmp_path: Path) -> None:
    text, report = run_quick("scaling", tmp_path / "report.json")
    for expected in ("control: two single processes", "data: ZeRO 3 weak", "tensor: strong", "pipeline: m = 4"):
        assert expected in text
    assert len(spreads_of(report)) == 2 * (8 + 2 + 3) and all(ratio["min"] > 0.0 for ratio in spreads_of(report))


@pytest.mark.slow
def test_optimizers_run_and_their_messages_are_counted(tmp_path: Path) -> None:
    _, report = run_quick("optimizers", tmp_path / "report.json")
    assert len(spreads_of(report)) == 2 * 4 and all(ratio["min"] > 0.0 for ratio in spreads_of(report))
    # Alone nothing is sent, and on two data ranks each owns the matrices of the block that it holds.
    alone, counted = (table["rows"] for table in report["tables"] if "collectives" in table["title"])
    assert "alltoall_base_" not in {row[1] for row in [*alone, *counted]}
    assert {row[0] for row in counted} >= {"muon, mlra", "spectron, mlra", "muon, dense"}


@pytest.mark.slow
def test_checks_against_corruption_are_timed(tmp_path: Path) -> None:
    _, report = run_quick("corruption", tmp_path / "report.json")
    assert len(spreads_of(report)) == 2 * 4 and all(ratio["min"] > 0.0 for ratio in spreads_of(report))


def test_data_ranks_share_the_samples_of_one_process() -> None:
    shape = replace(SHAPE, batch_size=4)
    rows = shape.samples(range(8, 12)).tokens_BS.tolist()
    assert [row for first in (8, 10) for row in shape.samples(range(first, first + 2)).tokens_BS.tolist()] == rows
    assert len({tuple(row) for row in rows}) == 4


def ideal_results() -> scaling.Results:
    """Times of a machine without any overhead, whose processes are slowed down by a half by a neighbour."""
    results = {"two at once": [[{"seconds": 1.5, "loss": 3.0}] * 2] * 2}
    for world, (ranks, works) in scaling.worlds_of(scaling.TINY, (2, 4)).items():
        for name in works:
            seconds = float(name.rpartition(" ")[2]) if name.startswith("m = ") else 1.0
            seconds /= 2.0 if ranks == 2 and not name.endswith("weak") else 1.0
            results[f"{world}: {name}"] = [[{"seconds": seconds, "loss": 3.0}] * ranks] * 2
    return results


def test_ideal_scaling_is_one_and_other_losses_are_not_reported() -> None:
    results = ideal_results()
    scaling.check_losses(scaling.TINY, results)
    table = scaling.table_of(scaling.TINY, (2, 4), results)
    rows: list[Any] = table.rows
    *rows, control = rows
    for row in rows:
        assert row[3]["median"] == pytest.approx(1.0) and row[4]["median"] == pytest.approx(1.5), row
    assert control[2] == pytest.approx(1500.0) and "1.500 times as long" in table.note
    results["tensor: strong"] = [[{"seconds": 0.5, "loss": 3.001}] * 2] * 2
    with pytest.raises(SystemExit, match="tensor: strong does not compute what one: ZeRO 0 computes"):
        scaling.check_losses(scaling.TINY, results)
