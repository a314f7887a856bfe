"""Ways to stop that need processes: a terminal, torchrun, a console that is gone, a run directory that is gone."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import Interruption
from tests.support.processes import CTRL_C, TIMEOUT, TRAIN, Program, torchrun
from tests.support.training_runs import ROOT, base_command, curve, environment, events, write_megatron_data


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


@pytest.mark.slow_except("2")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_one_ctrl_c_in_a_terminal_saves_and_counts_once(
    num_processes: int, launch: Callable[..., Program], tmp_path: Path, data: Path
) -> None:
    """Alone it comes from the terminal; under torchrun it comes from torchrun, which the terminal interrupts."""
    run = tmp_path / "run"
    process = launch(command(run, data, num_processes=num_processes), terminal=True)
    process.wait_for(r"step +3/")
    process.type(CTRL_C)
    code = process.wait()
    assert code == (ExitCode.PREEMPTED if num_processes == 1 else 1), "torchrun's own is 1"
    assert names(run)[-2:] == ["checkpoint", "preempted"], process.output()[-3000:]
    step = events(run)[-1]["step"]
    assert step >= 3 and list(curve(run, "loss")) == list(range(1, step + 1))
    assert (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    assert "Ctrl-C again ends it at once" in process.output() and "is complete" in process.output()


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


@pytest.mark.slow
def test_a_terminal_that_closes_saves(launch: Callable[..., Program], tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    process = launch(command(run, data), terminal=True)
    process.wait_for(r"step +2/")
    process.hang_up()
    assert process.wait() == ExitCode.PREEMPTED
    assert names(run)[-2:] == ["checkpoint", "preempted"]


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
def test_no_console_ends_a_run(tmp_path: Path, data: Path) -> None:
    """A full disk, a reader that has gone, and no standard streams at all; names that ASCII lacks."""
    run = tmp_path / "l\u00e4ufe"
    text = " ".join(f"'{part}'" for part in command(run, data, "train.steps=4", "evaluation.every=1")).replace(
        "train.steps=1000000", "train.steps=4"
    )
    for redirection, rest in (
        ("> /dev/full 2> /dev/full", "train.steps=4"),
        (">&- 2>&- <&-", "train.steps=6"),
        ("2>&1 | head -n 1", "train.steps=8"),
    ):
        shell = f"set -o pipefail; {text.replace('train.steps=4', rest)} --resume auto {redirection}"
        done = subprocess.run(
            ["bash", "-c", shell],
            env=environment(PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0"),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, (redirection, done.stdout, done.stderr)
        assert names(run)[-1] == "finished", redirection
    assert list(curve(run, "loss")) == list(range(1, 9))
    assert curve(run, "validation_loss").keys() == set(range(9))


@pytest.mark.slow
@pytest.mark.parametrize("act", ["moved", "removed"])
def test_a_run_directory_that_goes_ends_the_run(
    act: str, launch: Callable[..., Program], tmp_path: Path, data: Path
) -> None:
    run = tmp_path / "run"
    process = launch(command(run, data, "checkpoint.every=300"))
    process.wait_for(r"step +4/")
    if act == "moved":
        run.rename(tmp_path / "elsewhere")
    else:
        run.rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
    assert process.wait() == ExitCode.CHECKPOINT_FAILED
    assert re.search(f"{run} is gone: it has been moved or removed", process.output())
    assert not run.exists(), "nothing is put in its place"
    if act == "moved":
        assert f"{tmp_path}/elsewhere now" in process.output()
        assert names(tmp_path / "elsewhere")[-1] == "stopped"


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
            assert not interruption.is_stop_asked()
    finally:
        signal.signal(signal.SIGTERM, before)


SLOW_WANDB = """
import sys, time
from mlra_scale.train import Interruption, main
from mlra_scale.training import trainer
from mlra_scale.training.wandb_log import WandbLog
trainer.EXPENDABLE_SECONDS = 0.5
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
