"""The benchmarks run, and compare models that compute the same; times are never asserted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data_checks, step_time
from benchmarks.contenders import Shape, Step, build_plain, build_transformers, config_of, step_of_module
from benchmarks.memory import start
from benchmarks.stability import variance_of_pieces
from mlra_scale.data import Batch
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.training.record import read_record
from mlra_scale.training.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape("test", num_layers=3, hidden_size=48, num_heads=4, batch_size=3, sequence_length=16, vocab_size=384)


def test_the_checks_of_data_are_measured(tmp_path: Path) -> None:
    data_checks.write_pair(tmp_path / "set", np.random.default_rng(0).integers(20, 90, 3000))
    assert data_checks.measure_opening(tmp_path / "set").keys() == {
        "seconds",
        "seconds with SHA-256",
        "MB allocated",
    }
    assert len(data_checks.measure_reading(tmp_path / "set", 100, 32)) == 4


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
    modules = [build(SHAPE, weights).double() for build in (build_plain, build_transformers)]
    steps = [step_of_module(module, torch.device("cpu"), "fp32") for module in modules]
    for index in range(4):
        plain, transformers = (step(SHAPE.batch(index)) for step in steps)
        # The loss is taken in fp32; gradients, clipping, weight decay and Adam show in the later steps.
        assert transformers == pytest.approx(plain, rel=1e-6)
    assert sum(parameter.numel() for parameter in modules[0].parameters()) == sum(
        parameter.numel() for parameter in modules[1].parameters()
    )


@pytest.mark.slow
def test_step_time_runs_and_reports_every_ratio(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.step_time", "--quick", "--profile", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--json", str(report_file)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    for text in (
        "device: cpu",
        "threads: 1 of",
        "torch ",
        "plain PyTorch again",
        "R=D/2 / mlra_scale dense",
        "TEV once",
    ):
        assert text in result.stdout
    report = json.loads(report_file.read_text())
    (shape,) = report["shapes"]
    names = list(shape["seconds_per_step"])
    dense = ["plain PyTorch", "transformers", "transformers ZeRO-1", "plain PyTorch again", "mlra_scale dense"]
    ranks = ["mlra_scale R=D/2", "mlra_scale R=D/4", "mlra_scale R=D/8"]
    assert [name for name in names if name != "litgpt"] == [*dense, *ranks]
    if "litgpt" in names:
        assert "litgpt is another shape" in result.stdout
    else:
        assert "litgpt is left out: not installed" in result.stdout and "litgpt" in report["left_out"]
        assert f"{sys.prefix}/bin/pip install --no-deps litgpt==" in report["left_out"]["litgpt"]
        assert f" -c {ROOT}/constraints.txt " in report["left_out"]["litgpt"]
    with_ours = {f"{name} / {other}" for name in ["mlra_scale dense", *ranks] for other in dense[:3]}
    assert with_ours | {f"{name} / mlra_scale dense" for name in ranks} <= set(shape["ratios"])
    for ratio in [*shape["ratios"].values(), shape["tev_share_of_a_step"]]:
        assert 0.0 < ratio["min"] <= ratio["lower"] <= ratio["median"] <= ratio["upper"] <= ratio["max"] < math.inf
    # Dense contenders started from the same weights and saw the same tokens: they are still together at the end.
    for name in dense:
        assert shape["last_loss"][name] == pytest.approx(shape["last_loss"]["plain PyTorch"], rel=1e-4)
    # Weights, gradients and two moments in fp32, and activations.
    assert min(shape["peak_bytes"].values()) > 16 * shape["parameters"]["mlra_scale R=D/8"]
    assert shape["peak_bytes"]["plain PyTorch"] == shape["peak_bytes"]["plain PyTorch again"]
    assert set(shape["operators"]) == {"mlra_scale dense", "plain PyTorch"}
    assert "aten::mm" in result.stdout


def test_shapes_and_contenders_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = step_time.build_parser().parse_args(["--shapes", "256", "768", "--contenders", "mlra_scale dense"])
    assert (arguments.shapes, arguments.contenders) == (["256", "768"], ["mlra_scale dense"])
    names = ["plain PyTorch", "plain PyTorch again", "mlra_scale dense"]
    assert step_time.names_of([*arguments.contenders, "litgpt"], ["litgpt"]) == names, "the noise is always there"
    with pytest.raises(SystemExit):
        step_time.main(["--shapes", "100"])
    assert "invalid choice: '100' (choose from" in capsys.readouterr().err


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
def test_stability_runs_and_reports_every_share(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.stability", "--quick", "--json", str(report_file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    report = json.loads(report_file.read_text())
    assert len(report["shares_of_a_step"]) == 4 and len(report["gradient_variance_against_tev"]) == 3
    for ratio in [*report["shares_of_a_step"].values(), *report["gradient_variance_against_tev"].values()]:
        assert 0.0 < ratio["min"] <= ratio["median"] <= ratio["max"] < math.inf


def test_the_variance_of_pieces_is_that_of_the_whole() -> None:
    pieces = [torch.randn(7, generator=torch.Generator().manual_seed(n)) + 0.1 * n for n in (1, 2, 3)] + [torch.ones(1)]
    assert variance_of_pieces(pieces) == pytest.approx(float(torch.cat(pieces).var(correction=0)), rel=1e-6)


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
    report_file, disk = tmp_path / "report.json", tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--quick", "--device", "cpu", "--folder", str(disk)]
    result = subprocess.run(
        [*command, "--json", str(report_file)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    for text in ("MB per checkpoint", "write rate, synchronous / dd", "stall, asynchronous / synchronous"):
        assert text in result.stdout
    report = json.loads(report_file.read_text())
    assert len(report["ratios"]) == 4 and all(len(values) == 2 for values in report["seconds"].values())
    assert report["bytes"] > 12 * 30_000 and min(report["seconds"]["async stall"]) > 0.0
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_planner_predicts_and_measures_every_layout(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.planner", "--quick", "--json", str(report_file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for text in ("calibrated: matrix products", "Spearman", "data 2, ZeRO 1", "tensor 2, replicated", "pipeline 2"):
        assert text in result.stdout
    report = json.loads(report_file.read_text())
    assert [row["predicted_rank"] for row in report["layouts"]].count(1) == 1
    for row in report["layouts"]:
        assert 0.0 < row["predicted_seconds"] < math.inf and len(row["seconds"]) == 2
        # Memory, unlike time, is the same on every machine.
        assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1)
