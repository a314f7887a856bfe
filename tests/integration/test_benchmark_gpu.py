"""The GPU benchmark: its dry run, why it refuses, and all of its code at a tiny size on a CPU."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.commands import CommandFailed, run_command
from benchmarks.contenders import config_of, draw_weights, given_weights
from benchmarks.gpu_child import config_for, run_child
from benchmarks.gpu_parity import compare_bf16, compare_fp32
from mlra_scale.model.initialization import initial_state
from tests.support.leftovers import all_end

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
    assert gpu.main(["--dry-run", "--models", "72 layers", "--contenders", "plain PyTorch", "mlra_scale dense"]) == 0
    shown = capsys.readouterr().out
    assert "plain PyTorch again" in shown, "the noise, wherever there is something to compare it with"
    assert "transformers" not in shown


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--device cuda: there is no CUDA device here; --dry-run shows"),
        (["--device", "cpu"], "--device cpu: the models of this benchmark are for a GPU; --dry-run shows"),
        (["--rounds", "1"], "--rounds 1: a spread needs at least 2"),
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--timeout", "0"], "--timeout 0: a number of seconds above 0"),
    ],
)
def test_it_refuses_with_a_reason(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or it would begin where there is one
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2 and problem in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_code_runs_on_a_cpu(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--json", str(report_file)]
    result = subprocess.run(
        [*command, "--contenders", "plain PyTorch", "mlra_scale R=D/2", "--timeout", "120"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(report_file.read_text())
    (model,) = report["models"]
    assert list(model["contenders"]) == ["plain PyTorch", "mlra_scale R=D/2"]
    assert set(model["ratios"]) == {"mlra_scale R=D/2 / plain PyTorch"} and model["product_flops"] > 0.0
    for name, item in model["contenders"].items():
        assert len(item["seconds_per_step"]) == 2 and 0.0 < model["mfu"][name] < 1.0 and item["first_loss"] > 0.0
        assert item["peak_bytes"] > 12 * config_for(gpu.TINY, name).model.num_parameters()
    for name, row in report["parity"].items():
        assert row["holds"] and (row["gradient"] == 0.0 or name.endswith("bf16"))
    assert 0.0 < report["parity"]["small: dense bf16"]["gradient"] < 0.1
    assert {name.split(":")[0] for name in report["parity"]} == {"small", "masked, head chunks"}


def test_compiled_contenders_of_ours_compile() -> None:
    compiled = {name for name in gpu.NAMES if config_for(gpu.TINY, name).train.compile}
    assert compiled == {"mlra_scale dense, compiled", "mlra_scale R=D/2, compiled"}


def test_ours_is_under_zero_1() -> None:
    ours = [config_for(gpu.TINY, name) for name in gpu.NAMES if "mlra_scale" in name]
    assert len(ours) == 4 and {config.deepspeed["zero_optimization"]["stage"] for config in ours} == {1}


def test_weights_that_were_drawn_once_are_those_that_a_model_draws() -> None:
    drawn = draw_weights(gpu.TINY)
    for attention in ("dense", "mlra"):
        model = config_of(gpu.TINY, attention, "fp32").model
        own = initial_state(model, 1234)
        assert all(torch.equal(drawn[name], value) for name, value in own.items())
    with given_weights({name: value + 1.0 for name, value in drawn.items()}):
        shifted = initial_state(model, 1234)
    assert all(torch.equal(shifted[name], value + 1.0) for name, value in own.items())


@pytest.mark.slow
def test_a_child_that_fails_is_told(tmp_path: Path) -> None:
    specification = {"shape": gpu.TINY, "name": "mlra_scale dense", "precision": "fp8", "rounds": 2, "steps": 1}
    specification["products"] = [16]
    with pytest.raises(CommandFailed, match=r"exit code 1(?s:.)*train\.precision"):
        run_child("cpu", "time", specification, tmp_path / "file", timeout_s=120.0)


def test_a_child_that_is_not_done_in_time_is_ended() -> None:
    task = {"precision": "bf16", "rounds": 2, "steps": 1, "products": [16]}
    found = gpu.time_child(gpu.TINY, task, "cpu", 0.2, "plain PyTorch")
    assert gpu.state_of(found) == "failed: time of plain PyTorch: not done after 0.2 s"


def test_the_line_that_names_the_error_is_shown() -> None:
    advice = "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially)"
    error = "torch._inductor.exc.InductorError: CUDA out of memory. Tried to allocate 2 GiB"
    assert CommandFailed("it", f"Traceback (most recent call last):\n  here\n{error}\n\n{advice}\n").last_line == error
    of_ranks = f"[rank1]: {error}\nW1129 Sending process 7 closing signal\ntorch.x.errors.ChildFailedError:\n====\n"
    assert CommandFailed("it", of_ranks).last_line == error
    assert CommandFailed("it", "one\nKilled\n").last_line == "Killed"
    assert CommandFailed("it: exit code -9").last_line == "it: exit code -9"


@pytest.mark.slow
def test_nothing_of_a_command_is_left_when_its_time_is_over(tmp_path: Path) -> None:
    # A shell that does not hear SIGTERM, and processes that it has started, one in a session of its own.
    script = "trap '' TERM; sleep 60 & echo $! > children; setsid sleep 60 & echo $! >> children"
    script, log = f"{script}; echo Error: here; wait", tmp_path / "log"
    with pytest.raises(CommandFailed, match=r"^it: not done after 1 s$"):
        run_command("it", ["bash", "-c", f"cd {tmp_path} && {script}"], {"PATH": "/usr/bin:/bin"}, 1.0, log)
    assert log.read_text() == "Error: here\n"
    children = [int(line) for line in (tmp_path / "children").read_text().split()]
    assert len(children) == 2 and all_end(children)


def reported(seconds: Sequence[float], loss: float) -> dict[str, Any]:
    return {"seconds_per_step": list(seconds), "first_loss": loss, "peak_bytes": 10**6, "product_flops": 1e12}


def test_who_fails_or_differs_has_no_ratio_and_the_others_have() -> None:
    children = {
        "plain PyTorch": reported([0.2, 0.4, 0.3], 5.0),
        "transformers": {"failed": "torch.OutOfMemoryError: CUDA out of memory", "output": "all of it"},
        "mlra_scale dense": reported([0.15, 0.1, 0.4], 5.001),
        "mlra_scale R=D/2": reported([0.1, 0.1, 0.1], 6.0),
        "plain PyTorch, compiled": reported([0.1, 0.1, 0.1], 5.2),
        "mlra_scale dense, compiled": reported([0.1, 0.1, 0.1], math.nan),
    }
    results = list(gpu.measure(gpu.TINY, list(children), children.__getitem__))
    assert [len(result["contenders"]) for result in results] == [1, 2, 3, 4, 5, 6], "there is a result after each"
    last = results[-1]
    assert set(last["ratios"]) == {"mlra_scale dense / plain PyTorch", "mlra_scale R=D/2 / plain PyTorch"}
    # Of the medians; of rounds in pairs it would be 4/3.
    assert last["ratios"]["mlra_scale dense / plain PyTorch"] == {
        "of_medians": pytest.approx(2.0),
        "seconds": [0.1, 0.4],
        "seconds_of_other": [0.2, 0.4],
    }
    states = {name: gpu.state_of(item).split(":")[0] for name, item in last["contenders"].items()}
    assert states == {
        "plain PyTorch": "",
        "transformers": "failed",
        "mlra_scale dense": "",
        "mlra_scale R=D/2": "",
        "plain PyTorch, compiled": "differs",
        "mlra_scale dense, compiled": "differs",
    }
    text = "\n".join(gpu.table_lines(last, 3))
    assert (
        "failed: torch.OutOfMemoryError: CUDA out of memory" in text and "differs: loss nan at the first step" in text
    )
    json.dumps(last)
    failed = {"plain PyTorch": {"failed": "no", "output": "no"}}
    assert "failed: no" in "\n".join(gpu.table_lines(gpu.evaluate(gpu.TINY, failed), 3))


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"

    def cut_off(*arguments: Any) -> dict[str, Any]:
        if file.exists():
            raise KeyboardInterrupt
        return reported([0.1, 0.1], 5.0)

    monkeypatch.setattr(gpu, "time_child", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--quick", "--json", str(file)])
    (model,) = json.loads(file.read_text())["models"]
    assert list(model["contenders"]) == ["plain PyTorch"] and list(tmp_path.iterdir()) == [file]


def test_parity_that_cannot_be_computed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--quick", "--timeout", "0.2", "--contenders", "plain PyTorch"]
    assert gpu.main([*arguments, "--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        report["parity_failed"].endswith("not done after 0.2 s")
        and "failed" in report["models"][0]["contenders"]["plain PyTorch"]
    )
    assert "parity failed: gradients of small: not done" in capsys.readouterr().out


def test_parity_alone_leaves_the_rest_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "add_parity", lambda report, arguments: report.update(parity={}) or True)
    assert gpu.main(["--device", "cpu", "--quick", "--parity-only", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["models"] == [] and report["parity"] == {}


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

    assert compare_fp32(off_by(1e-7), exact)["holds"]
    one_bad = off_by(1e-7)
    one_bad["b"] = one_bad["b"] * 1.001
    assert (found := compare_fp32(one_bad, exact))["worst"] == "b" and not found["holds"]
    assert not compare_fp32({**off_by(1e-7), "loss": exact["loss"] * 1.001}, exact)["holds"]
    for name in exact:
        assert not compare_fp32({**exact, name: exact[name] * math.nan}, exact)["holds"]
    cpu = off_by(1e-2)
    assert compare_bf16(off_by(1.5e-2), cpu, exact)["holds"]
    assert not compare_bf16(off_by(3e-2), cpu, exact)["holds"]
    assert not compare_bf16({**off_by(1e-2), "loss": exact["loss"] * 1.01}, cpu, exact)["holds"]
