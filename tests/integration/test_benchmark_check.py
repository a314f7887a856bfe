"""The check of a device or a cluster: its steps, failing steps, what counts as a difference, and its contenders.

tests/slurm/test_check.py runs it on two nodes.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import check, check_ranks, gpu
from benchmarks.check import STEPS, Check, Task
from benchmarks.contenders import config_of, draw_weights, given_weights
from benchmarks.harness import text_of
from benchmarks.parity import compare_bf16, compare_fp32
from benchmarks.processes import CommandFailed, run_command
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.config import ConfigError, batch_plan
from mlra_scale.model.validation import validate
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file
from tests.support.layouts import initial_state
from tests.support.waiting import all_end

ROOT = Path(__file__).resolve().parents[2]


def check_in(folder: Path, preset: str = "debug", world_size: int = 1) -> Check:
    task = Task("cpu", world_size, world_size, str(folder), preset, (), is_quick=True, seconds=0.0)
    return Check(task, LauncherSettings(world_size, "cpu", (), (sys.executable,)), None)


def step(name: str) -> check.Step:
    return next(step for step in STEPS if step.name == name)


def test_every_step_of_the_table_has_its_function() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    for each in STEPS:
        module, function = each.function.split(".")
        assert callable(getattr(import_module(f"benchmarks.{module}"), function))
        assert each.on in ("one", "all") and each.needs in ("", "gpu", "ranks") and each.seconds >= 60
    names = list(check.NAMES)
    # By worth; and what is compared with the result of another comes after it.
    assert names[:2] == ["parity", "smoke"] and names.index("training") < names.index("72 layers")
    assert names.index("rates") < names.index("training") and names.index("alone") < names.index("layouts")
    document = (ROOT / "docs" / "cluster_check.md").read_text()
    assert [name for name in names if f"| `{name}` |" not in document] == []


@pytest.mark.slow
def test_a_step_that_fails_or_has_no_time_does_not_stop_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [step("layouts"), replace(step("smoke"), seconds=0.5), step("offload"), step("links"), step("alone")]
    assert not check_in(tmp_path).run(steps, minutes=10)
    states = json.loads((tmp_path / "check.json").read_text())["states"]
    assert states.pop("smoke").startswith("failed: smoke: not done after 0.5 s")
    assert states == {
        "layouts": "failed: ValueError: the step 'alone', which this one is compared with, has no result; run both",
        "offload": "left out: needs a GPU",
        "links": "left out: needs several ranks",
        "alone": "measured",
    }
    found = json.loads((tmp_path / "alone.json").read_text())
    assert len(found["fp32"]["losses"]) == check_ranks.STEPS and found["fp32"] != found["bf16"]
    assert "ValueError" in (tmp_path / "layouts.log").read_text()
    assert "layouts: failed" in capsys.readouterr().out


def test_nothing_is_left_when_it_is_ended(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--quick", "--steps", "alone", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.check", *words], cwd=ROOT)
    deadline = time.monotonic() + 120.0
    while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert children and all_end([child.pid for child in children])


def test_a_command_leaves_no_process_of_another_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where /proc hides the processes of others, so that psutil itself finds no children."""

    def hide(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "children", hide)
    grandchild = ["setsid", "sh", "-c", "echo $$ > pid; exec sleep 60"]
    command = ["sh", "-c", f"cd {tmp_path}; {shlex.join(grandchild)} & wait"]
    with pytest.raises(CommandFailed, match="not done after 2 s"):
        run_command("sleeper", command, os.environ, 2.0, tmp_path / "log")
    assert all_end([int((tmp_path / "pid").read_text())])


def test_no_step_begins_when_the_minutes_are_over(tmp_path: Path) -> None:
    assert check_in(tmp_path).run(STEPS, minutes=0.1)
    states = json.loads((tmp_path / "check.json").read_text())["states"]
    assert set(states.values()) == {
        "not run: the minutes are over",
        "left out: needs a GPU",
        "left out: needs several ranks",
    }


def test_the_file_of_the_cluster_keeps_what_each_step_measured(tmp_path: Path) -> None:
    checked = check_in(tmp_path)
    base = {"name": "h100", "nodes": 3, "devices_per_node": 4, "memory": 1e11, "source": "here"}
    checked._note_constants({}, dict(base))
    assert not (tmp_path / "cluster.json").exists()
    checked._note_constants({"link_inter": 3e10}, dict(base))
    checked._note_constants({"zero_overhead": [0.0, 1.0, 2.0, 3.0], "utilization": 0.4}, dict(base))
    named = replace(named_cluster("h100"), name="h100, measured", source="here", nodes=3, devices_per_node=4)
    overheads = (0.0, 1.0, 2.0, 3.0)
    expected = replace(named, memory=1e11, link_inter=3e10, utilization=0.4, zero_overhead=overheads)
    assert read_cluster_file(tmp_path / "cluster.json") == expected
    measured = json.loads((tmp_path / "cluster.json").read_text())["measured"]
    assert measured == ["link_inter", "utilization", "zero_overhead"]
    with pytest.raises(ConfigError, match=r"cluster\.utilization = nan"):
        checked._note_constants({"utilization": math.nan}, None)


@pytest.mark.parametrize(("world_size", "per_node"), [(1, 1), (2, 1), (2, 2), (4, 4), (6, 3), (8, 8), (32, 8)])
def test_layouts_are_those_that_so_many_ranks_can_have(world_size: int, per_node: int) -> None:
    layouts = check_ranks.layouts_of(world_size, per_node)
    for sections in layouts.values():
        train = {"global_batch_size": 2 * world_size, "micro_batch_size": 1}
        config = config_of(check_ranks.SHAPE, "mlra", "bf16", train=train, **sections)
        validate(config, world_size, "cpu")
        assert batch_plan(config, world_size).world_size == world_size
    assert ("tensor 2 x pipeline 4" in layouts) == (world_size % 8 == 0)
    assert ("tensor 2, sequence parallel" in layouts) == (world_size % 2 == 0)
    assert ("tensor 8, ZeRO 3" in layouts) == (per_node == 8)


def trajectory(*losses: float, norm: float = 2.0) -> dict[str, list[float]]:
    return {"losses": list(losses), "norms": [norm] * len(losses)}


def test_what_differs_from_one_process_is_named() -> None:
    alone: dict[str, Any] = {"fp32": trajectory(6.0, 5.0), "bf16": trajectory(6.02, 5.0)}
    assert check_ranks.difference(trajectory(6.0 + 3e-5, 5.0), "fp32", alone) == ""
    assert check_ranks.difference(trajectory(6.0, 5.001), "fp32", alone).startswith("DIFFERS: losses 5.001 at step 2")
    assert "norms 2.01 at step 1" in check_ranks.difference(trajectory(6.0, 5.0, norm=2.01), "fp32", alone)
    assert check_ranks.difference(trajectory(6.0, math.nan), "fp32", alone) != ""
    # In bf16: twice what one process differs by, or what bf16 rounds off once.
    assert check_ranks.difference(trajectory(5.97, 5.009), "bf16", alone) == ""
    assert "losses 5.95" in check_ranks.difference(trajectory(5.95, 5.0), "bf16", alone)
    assert "losses 5.02 at step 2" in check_ranks.difference(trajectory(6.0, 5.02), "bf16", alone)


def test_a_wait_is_noted_by_the_function_that_waits() -> None:
    """torch warns in the innermost Python frame of what waits."""
    names: dict[str, Any] = {"warnings": warnings}
    for file, code in (
        (
            "/lib/deepspeed/accelerator/cuda.py",
            "def hands_on(): warnings.warn('called a synchronizing CUDA operation')",
        ),
        ("/lib/deepspeed/runtime/utils.py", "def norm():\n    return hands_on()"),
        ("/here/mlra_scale/parallel/engine.py", "class Engine:\n    def propose(self):\n        norm(); norm()"),
    ):
        exec(compile(code, file, "exec"), names)
    with check_ranks.noted_waits() as found:
        names["Engine"]().propose()
        warnings.warn("something else", stacklevel=1)
    assert found == {"deepspeed/runtime/utils.py:norm": 2}


def test_the_list_of_waits_is_that_of_the_traced_engines() -> None:
    listed = check_ranks.known_waits()
    assert listed["mlra_scale/parallel/engine.py:Engine._propose"] >= 1
    assert sum(listed.values()) >= len(listed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "--minutes 0: a number above 0"),
        (["--minutes", "nan"], "--minutes nan: a number above 0"),
        (["--processes", "0"], "--processes 0: at least 1"),
        (["--steps", "links", "speed"], "invalid choice: 'speed'"),
        (["--output", "/dev/null/there"], "--output /dev/null/there: cannot be made"),
    ],
)
def test_it_refuses_with_a_reason(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_ours_is_under_zero_1_and_compiled_where_it_says_so() -> None:
    ours = {name: gpu.gpu_config(gpu.TINY, name) for name in gpu.NAMES if "mlra_scale" in name}
    assert len(ours) == 4 and {config.deepspeed["zero_optimization"]["stage"] for config in ours.values()} == {1}
    compiled = {name for name in gpu.NAMES if gpu.gpu_config(gpu.TINY, name).train.compile}
    assert compiled == {"mlra_scale dense, compiled", "mlra_scale R=D/2, compiled"}


def test_weights_that_were_drawn_once_are_those_that_a_model_draws() -> None:
    drawn = draw_weights(gpu.TINY)
    for attention in ("dense", "mlra"):
        model = config_of(gpu.TINY, attention, "fp32").model
        own = initial_state(model, 1234)
        assert all(torch.equal(drawn[name], value) for name, value in own.items())
    with given_weights({name: value + 1.0 for name, value in drawn.items()}):
        shifted = initial_state(model, 1234)
    assert all(torch.equal(shifted[name], value + 1.0) for name, value in own.items())


def test_a_contender_that_fails_or_is_not_done_in_time_is_reported(tmp_path: Path) -> None:
    """And the next one begins: each has a process of its own."""
    arguments = (gpu.TINY, "plain PyTorch", "cpu", tmp_path / "missing", (16,))
    failed = gpu.time_alone(*arguments, timeout_s=120.0)
    assert gpu.state_of(failed).startswith("failed: FileNotFoundError: ") and "Traceback" in failed["output"]
    late = gpu.time_alone(*arguments, timeout_s=0.2)
    assert gpu.state_of(late) == "failed: plain PyTorch: start: rank(s) [0] hung, no answer in 0.2 s"


def test_the_steps_of_one_device_are_those_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "main", lambda words: words)
    asked: Any = gpu.main(["--device", "cpu", "--quick"])
    assert asked == ["--device", "cpu", "--quick", "--steps", "parity", "72 layers", "gpt2-xl"]


@pytest.mark.slow
def test_contenders_run_on_a_cpu(tmp_path: Path) -> None:
    task = Task("cpu", 1, 1, str(tmp_path), "debug", (), is_quick=True, seconds=240.0)
    written: list[dict[str, Any]] = []
    found = gpu.contenders(task, written.append, "72 layers", ["plain PyTorch", "mlra_scale R=D/2"])["report"]
    assert [list(each["report"]["contenders"]) for each in written] == [
        ["plain PyTorch"],
        ["plain PyTorch", "mlra_scale R=D/2"],
    ]
    assert set(found["ratios"]) == {"mlra_scale R=D/2 / plain PyTorch"} and found["product_flops"] > 0.0
    for name, item in found["contenders"].items():
        assert len(item["seconds_per_step"]) == gpu.ROUNDS and 0.0 < found["mfu"][name] < 1.0 and item["first_loss"] > 0
        assert item["peak_bytes"] > 12 * gpu.gpu_config(gpu.TINY, name).model.num_parameters()


@pytest.mark.slow
def test_a_cpu_agrees_with_itself(tmp_path: Path) -> None:
    checked = check_in(tmp_path)
    assert checked.run([step("parity")], minutes=20)
    cases = checked.task.result_of("parity")["cases"]
    for name, row in cases.items():
        assert row["holds"] and (row["gradient"] == 0.0 or name.endswith("bf16"))
    assert 0.0 < cases["small: dense bf16"]["gradient"] < 0.1
    assert {name.split(":")[0] for name in cases} == {"small", "masked, head chunks"}


def test_the_line_that_names_the_error_is_shown() -> None:
    advice = "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially)"
    error = "torch._inductor.exc.InductorError: CUDA out of memory. Tried to allocate 2 GiB"
    assert CommandFailed("it", f"Traceback (most recent call last):\n  here\n{error}\n\n{advice}\n").last_line == error
    of_ranks = f"[rank1]: {error}\nW1129 Sending process 7 closing signal\ntorch.x.errors.ChildFailedError:\n====\n"
    assert CommandFailed("it", of_ranks).last_line == error
    assert CommandFailed("it", "one\nKilled\n").last_line == "Killed"
    assert CommandFailed("it: exit code -9").last_line == "it: exit code -9"


def test_commands_run_in_threads(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(2):
            pool.submit(run_command, "it", ["echo", "here"], {"PATH": "/usr/bin:/bin"}, 30.0, tmp_path / str(number))
    assert [(tmp_path / str(number)).read_text() for number in range(2)] == ["here\n"] * 2


@pytest.mark.slow
def test_nothing_of_a_command_is_left_when_its_time_is_over(tmp_path: Path) -> None:
    # A shell that does not hear SIGTERM, and processes that it has started, one in a session of its own.
    script = "trap '' TERM; sleep 60 & echo $! > children; setsid sleep 60 & echo $! >> children"
    script, log = f"{script}; echo Error: here; wait", tmp_path / "log"
    with pytest.raises(CommandFailed, match=r"^it: not done after 5 s$"):
        run_command("it", ["bash", "-c", f"cd {tmp_path} && {script}"], {"PATH": "/usr/bin:/bin"}, 5.0, log)
    assert log.read_text().startswith("Error: here\n")  # bash may add that its children were killed
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
    last = gpu.evaluate(gpu.TINY, children)
    assert set(last["ratios"]) == {"mlra_scale dense / plain PyTorch", "mlra_scale R=D/2 / plain PyTorch"}
    # Of the medians; of rounds in pairs it would be 4/3.
    assert last["ratios"]["mlra_scale dense / plain PyTorch"] == pytest.approx(2.0)
    states = {name: gpu.state_of(item).split(":")[0] for name, item in last["contenders"].items()}
    assert states == {
        "plain PyTorch": "",
        "transformers": "failed",
        "mlra_scale dense": "",
        "mlra_scale R=D/2": "",
        "plain PyTorch, compiled": "differs",
        "mlra_scale dense, compiled": "differs",
    }
    text = text_of(gpu.table_of(last))
    assert (
        "transformers: failed: torch.OutOfMemoryError: CUDA out of memory" in text
        and "differs: loss nan at the first step" in text
    )
    json.dumps(last)
    failed = {"plain PyTorch": {"failed": "no", "output": "no"}}
    assert "failed: no" in text_of(gpu.table_of(gpu.evaluate(gpu.TINY, failed)))


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


@pytest.mark.nightly
@pytest.mark.timeout(1900)
def test_one_process_is_checked_whole(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--quick", "--minutes", "60", "--output", str(tmp_path), "data.seed=3"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.check", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    states = json.loads((tmp_path / "check.json").read_text())["states"]
    needs_gpu = {each.name: "left out: needs a GPU" for each in STEPS if each.needs == "gpu"}
    assert states == {
        **needs_gpu,
        **dict.fromkeys(("parity", "smoke", "training", "layouts", "resume"), "agrees"),
        **dict.fromkeys(("rates", "alone"), "measured"),
        "links": "left out: needs several ranks",
    }, result.stdout + result.stderr
    assert result.returncode == 0
    smoke = json.loads((tmp_path / "smoke.json").read_text())
    assert all(
        state.startswith("trained, stopped, resumed, stopped: steps 1 to") for state in smoke["variants"].values()
    )
    assert all(json.loads((tmp_path / "resume.json").read_text())["compared"].values())


def test_a_signal_while_a_command_starts_ends_it() -> None:
    """It comes after the fork, before the caller knows the process."""
    program = """
import os, pathlib, signal, subprocess, sys, time
from benchmarks import processes
started = subprocess.Popen.__init__
def slow(self, *arguments, **options):
    started(self, *arguments, **options)
    print(self.pid, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
subprocess.Popen.__init__ = slow
processes.end_on_sigterm()
processes.run_command("sleep", ["sleep", "60"], dict(os.environ), 60.0, pathlib.Path(os.devnull))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert all_end([int(done.stdout)])
