"""Ways to stop that need processes: a second Ctrl-C, a signal before training, a forked child, a slow wandb.

Terminals that close, consoles that take nothing and run directories that vanish are cases of tests/faults.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import Interruption
from tests.support.processes import CTRL_C, TIMEOUT, TRAIN, Program, torchrun
from tests.support.training_runs import base_command, events, write_megatron_data


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """launch(command, ...): starts a Program; nothing of it outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(command: Sequence[str], **options: Any) -> Program:
            started = Program(command, tmp_path / "output.log", **options)
            stack.callback(started.end)
            return started

        yield start


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_megatron_data(tmp_path_factory.mktemp("data") / "tiny", 200)


def command(run: Path, data: Path, *arguments: str, num_processes: int = 1) -> list[str]:
    tiny = ["model.num_layers=1", "train.steps=1000000", "evaluation.batches=1", "checkpoint.every=0", *arguments]
    return [*(TRAIN if num_processes == 1 else torchrun(num_processes)), *base_command(run, data, *tiny)]


def names(run: Path) -> list[str]:
    return [event["event"] for event in events(run)]


@pytest.mark.slow
def test_a_second_ctrl_c_kills_under_torchrun_too(launch: Callable[..., Program], tmp_path: Path, data: Path) -> None:
    """A rank that never comes to the end of its step: torchrun would wait for TORCH_ELASTIC_SHUTDOWN_TIMEOUT."""
    run = tmp_path / "run"
    process = launch(
        command(run, data, num_processes=2), terminal=True, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(int(TIMEOUT))
    )
    process.wait_for(r"step +2/")
    ranks = process.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGSTOP)  # rank 0 waits for it in a collective
    process.type(CTRL_C)
    process.wait_for("Ctrl-C again ends it at once")
    time.sleep(1.5)
    began = time.monotonic()
    process.type(CTRL_C)
    process.wait_for("ended at once by a second Ctrl-C")
    assert time.monotonic() - began < 60
    os.kill(ranks[1], signal.SIGCONT)
    assert process.wait() == 1
    assert "preempted" not in names(run)


@pytest.mark.slow_except("15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_ends_at_once(
    number: signal.Signals, launch: Callable[..., Program], tmp_path: Path, data: Path
) -> None:
    """In the seconds of imports, long before handlers were set when training began."""
    process = launch([sys.executable, "-X", "importtime", *command(tmp_path / "run", data)[1:]])
    process.wait_for(r"\| +torch\n|pydantic.main")
    process.signal(number)
    assert process.wait() == ExitCode.PREEMPTED
    assert "stopped before training began: nothing was written" in process.output()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_forked_child_keeps_its_signals_to_itself() -> None:
    """Its handler would otherwise write into the pipe that it shares with its parent."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a test before this one may have left another handler
    try:
        with Interruption() as interruption:
            interruption.limit(None)
            pid = os.fork()
            if pid == 0:
                time.sleep(30)
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(pid, signal.SIGTERM)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM, "the handler of before"
            time.sleep(0.2)
            assert not interruption.is_stop_requested()
    finally:
        signal.signal(signal.SIGTERM, before)


SLOW_WANDB = """
import sys, time
from mlra_scale.train import Interruption, main
from mlra_scale.training.loop import session
from mlra_scale.training.log.wandb_log import WandbLog
session.EXPENDABLE_SECONDS = 0.5
def finish(log, code, summary=None):
    print("wandb waits", flush=True)
    time.sleep(3600)
WandbLog.finish = finish
sys.exit(main(interruption=Interruption().until_exit()))
"""


@pytest.mark.slow
def test_a_signal_after_the_last_step_does_not_wait_for_wandb(
    launch: Callable[..., Program], tmp_path: Path, data: Path
) -> None:
    run = tmp_path / "run"
    process = launch([sys.executable, "-c", SLOW_WANDB, *command(run, data, "train.steps=2")[3:]])
    process.wait_for("wandb waits")
    process.signal(signal.SIGTERM)
    assert process.wait() == ExitCode.DONE
    assert "all 2 steps are done and saved" in process.output() and "stops after this step" not in process.output()
    assert names(run)[-2:] == ["checkpoint", "finished"]
