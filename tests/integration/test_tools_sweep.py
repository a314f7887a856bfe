"""tools/sweep.py with real training processes: interrupted, killed and started again; and runs that diverge."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlra_scale.study.grid import cells_of, load_study
from mlra_scale.study.results import SweepDirectory
from tests.support.training_runs import ROOT, Finished, Start, curve, environment, events, metrics

# At this rate decay alone multiplies every weight by -89 a step: the loss is no number any more within some ten steps.
STUDY = """
name: tiny
preset: debug
data: {data}
base:
  train.steps: {steps}
  train.log_every: 1
  optim.weight_decay: 9.0
  optim.warmup_steps: 0
  optim.schedule: constant
  checkpoint.every: 10
variants:
  mlra:
axes:
  optim.lr: {rates}
seeds: [5]
ranks: {ranks}
"""
STEPS = 150


def write_study(folder: Path, data: Path, rates: str, steps: int = STEPS, ranks: int = 1) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(STUDY.format(data=data, rates=rates, steps=steps, ranks=ranks))
    return file


def command(study: Path, output: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "sweep.py"), str(study), "--output", str(output), *arguments]


def sweep(study: Path, output: Path, *arguments: str) -> Finished:
    done = subprocess.run(
        command(study, output, *arguments),
        env=environment(),
        cwd=study.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(study: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A sweep that is under way; it does not outlive the block."""
    process = subprocess.Popen(
        command(study, output),
        env=environment(),
        cwd=study.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def wait_until(is_so: Callable[[], bool], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_killed_loses_nothing(tmp_path: Path, training_data: Path, start: Start) -> None:
    study, output = write_study(tmp_path, training_data, "[3e-3, 10.0]"), tmp_path / "out"
    calm, wild = cells_of(load_study(study))
    directory = SweepDirectory(output)
    files = directory.files(calm)

    with started(study, output) as process:
        wait_until(lambda: files.last_step() >= 3)
        process.send_signal(signal.SIGINT)
        output_text, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output_text
    assert f"interrupted: {calm.name}; the same command continues them" in output_text
    assert events(files.run.path)[-1]["event"] == "preempted"
    stopped_at = events(files.run.path)[-1]["step"]
    assert 3 <= stopped_at < STEPS
    assert directory.results.read_text() == ""

    with started(study, output) as process:
        wait_until(lambda: files.last_step() > stopped_at)
        os.kill(process.pid, signal.SIGKILL)
        # The run continues without its sweep, and keeps the lock of its cell until it ends.
        assert not files.result.exists()

    ended = sweep(study, output)
    assert ended.code == 0, ended.stdout + ended.stderr
    # In either order: how far the run is that was left alone depends on the machine.
    assert f"{calm.name}: done" in ended.stdout and f"{wild.name}: diverged at step" in ended.stdout
    assert [event["event"] for event in events(files.run.path)].count("start") == 2
    assert [event["step"] for event in events(files.run.path) if event["event"] == "resume"] == [stopped_at]
    done, diverged = map(json.loads, directory.results.read_text().splitlines())

    # As if nothing had happened, to the last digit.
    start("alone", *calm.overrides, f"data.path={training_data}")
    assert curve(files.run.path, "loss") == curve(tmp_path / "alone", "loss")
    loss = list(curve(files.run.path, "loss").values())
    assert (done["state"], done["steps"], done["initial_loss"], done["diverged_at"]) == ("done", STEPS, loss[0], None)
    assert abs(done["final_loss"] - sum(loss[-STEPS // 10 :]) / (STEPS // 10)) < 1e-9
    assert done["validation_loss"] == metrics(files.run.path)[-1]["validation_loss"]
    assert done["tev_std"] == metrics(files.run.path)[-1]["tev_std"] and done["tokens"] == STEPS * 8 * 64
    assert 0 < done["seconds"] < 120

    last = events(output / diverged["run"])[-1]
    assert (diverged["state"], diverged["diverged_at"], last["exit_code"]) == ("diverged", last["step"], 3)
    assert diverged["axes"] == {"optim.lr": 10.0} and diverged["seed"] == 5 and diverged["error"] is None
    assert not list(output.glob("cells/*/checkpoints"))

    again = sweep(study, output)
    assert again.code == 0 and "0 of 2 cells to do" in again.stdout
    refused = sweep(study, output, "optim.weight_decay=0.1")
    assert refused.code == 2 and f"cell {calm.name}: optim.weight_decay = 0.1: the cell ran with 9.0" in refused.stderr


@pytest.mark.slow
def test_ranks_of_a_cell(tmp_path: Path, training_data: Path) -> None:
    """They are started by `mlra-scale train --nproc`, and end as a run of one process does."""
    study, output = write_study(tmp_path, training_data, "[10.0]", steps=30, ranks=2), tmp_path / "out"
    ended = sweep(study, output)
    assert ended.code == 0, ended.stdout + ended.stderr
    (result,) = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert result["state"] == "diverged" and 2 <= result["diverged_at"] <= 30
    assert events(output / result["run"])[0]["world_size"] == 2


def test_data_that_are_not_there_stop_the_sweep(tmp_path: Path) -> None:
    study, output = write_study(tmp_path, tmp_path / "nowhere", "[1e-3, 3e-3]"), tmp_path / "out"
    ended = sweep(study, output)
    assert ended.code == 2, ended.stdout + ended.stderr
    assert "no more cells were started" in ended.stderr and "data.path" in ended.stderr
    (result,) = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert result["state"] == "failed" and "nowhere" in result["error"]
