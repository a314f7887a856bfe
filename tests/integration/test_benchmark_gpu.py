"""The GPU benchmark: its dry run, why it refuses, and all of its code at a tiny size on a CPU."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


def test_the_dry_run_shows_what_would_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--models", "72 layers"]) == 0
    shown = capsys.readouterr().out
    assert "72 layers, D=1024, 16 heads, 8 x 1024 tokens per step, vocabulary 50304, bf16" in shown
    assert "gpt2-xl" not in shown
    rows = {line[:32].strip(): line[32:].split() for line in shown.splitlines() if line.startswith(gpu.KINDS)}
    for name in gpu.KINDS:
        parameters, flops, memory = rows[name][:3]
        # 12 L D^2 and the embeddings; six operations for each and token, and the attention's.
        assert parameters == "959,490,048" and 50.0 < float(flops) < 60.0 and float(memory) > 14.0
    assert list(rows) == list(gpu.NAMES), "each kind compiled as well, and plain PyTorch again"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--device cuda: there is no CUDA device here; --dry-run shows"),
        (["--device", "cpu"], "--device cpu: the models of this benchmark are for a GPU; --dry-run shows"),
        (["--rounds", "1"], "--rounds 1: a spread needs at least 2"),
        (["--batch", "0"], "--batch 0: at least 1"),
    ],
)
def test_it_refuses_with_a_reason(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_the_same_code_runs_on_a_cpu(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--json", str(report_file)]
    result = subprocess.run(
        [*command, "--contenders", "plain PyTorch", "mlra_scale R=D/2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(report_file.read_text())
    (model,) = report["models"]
    assert list(model["contenders"]) == ["plain PyTorch", "mlra_scale R=D/2"]
    assert set(model["ratios"]) == {"mlra_scale R=D/2 / plain PyTorch"} and model["product_flops"] > 0.0
    for name, item in model["contenders"].items():
        assert len(item["seconds_per_step"]) == 2 and 0.0 < model["mfu"][name] < 1.0
        assert item["peak_bytes"] > 12 * gpu.config_for(gpu.TINY, name).model.num_parameters()
    for name, row in report["parity"].items():
        assert row["holds"] and (row["gradient"] == 0.0 or name.endswith("bf16"))
    assert 0.0 < report["parity"]["dense bf16"]["gradient"] < 0.1


def test_compiled_contenders_of_ours_compile() -> None:
    compiled = {name for name in gpu.NAMES if gpu.config_for(gpu.TINY, name).train.compile}
    assert compiled == {"mlra_scale dense, compiled", "mlra_scale R=D/2, compiled"}


def test_a_child_that_fails_is_told(tmp_path: Path) -> None:
    specification = {"shape": gpu.TINY, "name": "plain PyTorch", "precision": "fp8", "rounds": 2, "steps": 1}
    specification["products"] = [16]
    with pytest.raises(SystemExit, match=r"exit code 1(?s:.)*train\.precision"):
        gpu.run_child("cpu", "time", specification, tmp_path / "file")


def test_parity_is_judged() -> None:
    generator = torch.Generator().manual_seed(1)
    exact = {name: torch.randn(50, generator=generator).double() for name in ("a", "b")}
    exact |= {"zero": torch.zeros(50).double(), "loss": torch.tensor([5.0]).double()}

    def off_by(share: float) -> dict[str, torch.Tensor]:
        noise = {name: torch.randn(value.shape, generator=generator) for name, value in exact.items()}
        return {
            name: value * (1.0 + 1e-7) if name == "loss" else value + share * noise[name]
            for name, value in exact.items()
        }

    assert gpu.compare_fp32(off_by(1e-7), exact)["holds"]
    one_bad = off_by(1e-7)
    one_bad["b"] = one_bad["b"] * 1.001
    assert (found := gpu.compare_fp32(one_bad, exact))["worst"] == "b" and not found["holds"]
    assert not gpu.compare_fp32({**off_by(1e-7), "loss": exact["loss"] * 1.001}, exact)["holds"]
    for name in exact:
        assert not gpu.compare_fp32({**exact, name: exact[name] * math.nan}, exact)["holds"]
    cpu = off_by(1e-2)
    assert gpu.compare_bf16(off_by(1.5e-2), cpu, exact)["holds"]
    assert not gpu.compare_bf16(off_by(3e-2), cpu, exact)["holds"]
    assert not gpu.compare_bf16({**off_by(1e-2), "loss": exact["loss"] * 1.01}, cpu, exact)["holds"]
