"""The check of a cluster: its table, what it does when a step fails or has no time, and what counts as a difference.

tests/slurm/test_check.py runs it on two nodes.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check, check_ranks
from benchmarks.check import STEPS, Check, Task
from benchmarks.contenders import config_of
from mlra_scale.cluster.process_tree import descendants
from mlra_scale.cluster.settings import Settings
from mlra_scale.config import ConfigError, batch_plan, validate
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file
from tests.support.leftovers import all_end

ROOT = Path(__file__).resolve().parents[2]


def check_in(folder: Path, preset: str = "debug", world_size: int = 1) -> Check:
    task = Task("cpu", world_size, world_size, str(folder), preset, (), is_quick=True, seconds=0.0)
    return Check(task, Settings(world_size, "cpu", (), (sys.executable,)), None)


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
    assert states == {
        "layouts": "failed: ValueError: the step 'alone', which this one is compared with, has no result; run both",
        "smoke": "failed: smoke: not done after 0.5 s",
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
    while not (children := descendants(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert children and all_end(children)


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
