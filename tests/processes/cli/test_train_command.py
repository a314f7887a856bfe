"""`mlra-scale train`: one process or several, one error, the ranks' exit codes, and signals that save."""

import os
import signal
import time
from pathlib import Path

import pytest

from mlra_scale.training.exit_codes import ExitCode
from tests.support.processes import CTRL_C, PYTHON, Program
from tests.support.training_runs import base_command, curve, events

SMALL = ("model.num_layers=2", "model.hidden_size=32", "evaluation.batches=1", "checkpoint.every=0")


def program(run: Path, data: Path, *arguments: str, num_ranks: int = 2, terminal: bool = False) -> Program:
    begin = [PYTHON, "-m", "mlra_scale.cli.main", "train", *(["--nproc", str(num_ranks)] if num_ranks > 1 else [])]
    return Program([*begin, *base_command(run, data, *SMALL, *arguments)], run.with_suffix(".log"), terminal=terminal)


def test_two_processes_train_one_run(tmp_path: Path, training_data: Path) -> None:
    run = tmp_path / "run"
    launched = program(run, training_data, "train.steps=3", "parallel.pipeline=2")
    assert launched.wait() == 0, launched.output()
    assert list(curve(run, "loss")) == [1, 2, 3] and events(run)[-1]["event"] == "finished"
    assert launched.output().count("done: step 3/3") == 1, "one rank prints"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bad_input_is_one_error_with_its_own_exit_code(num_ranks: int, tmp_path: Path, training_data: Path) -> None:
    launched = program(tmp_path / "run", training_data, "train.stepz=3", num_ranks=num_ranks)
    assert launched.wait() == ExitCode.BAD_INPUT
    lines = launched.output().splitlines()
    assert lines[0] == "mlra_scale.train: bad input" and len(lines) == 2 and "train.stepz = 3" in lines[1], lines
    assert not (tmp_path / "run").exists()


@pytest.mark.slow_except("Ctrl-C")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_on_all_ranks(how: str, tmp_path: Path, training_data: Path) -> None:
    run = tmp_path / "run"
    launched = program(run, training_data, "train.steps=1000000", terminal=how == "Ctrl-C")
    launched.wait_for(r"step +3/")
    if how == "Ctrl-C":
        launched.type(CTRL_C)
    else:
        launched.signal(signal.SIGTERM)
    assert launched.wait() == ExitCode.PREEMPTED, launched.output()
    assert [event["event"] for event in events(run)][-2:] == ["checkpoint", "preempted"], launched.output()
    assert "Traceback" not in launched.output() and "is complete" in launched.output()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_ranks_at_once(tmp_path: Path, training_data: Path) -> None:
    launched = program(tmp_path / "run", training_data, "train.steps=1000000", terminal=True)
    launched.wait_for(r"step +2/")
    ranks = launched.ranks()
    os.kill(ranks[1], signal.SIGSTOP)  # rank 0 waits for it in a collective
    launched.type(CTRL_C)
    launched.wait_for("Ctrl-C again ends it at once")
    time.sleep(1.2)  # two within a second are one press that came twice
    launched.type(CTRL_C)
    launched.wait_for("ended at once by a second Ctrl-C")
    os.kill(ranks[1], signal.SIGCONT)
    assert launched.wait() == ExitCode.INTERRUPTED, launched.output()


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path, training_data: Path) -> None:
    launched = program(tmp_path / "run", training_data, "train.steps=1000000")
    launched.wait_for(r"step +1/")
    os.kill(launched.ranks()[1], signal.SIGKILL)
    assert launched.wait(end=False) == 128 + signal.SIGKILL, launched.output()
    assert "mlra-scale train: rank 1 was ended by SIGKILL; all ranks have ended" in launched.output()
    launched.assert_nothing_is_left(5.0)
    launched.end()
