"""Ways to stop that need processes: a terminal, torchrun, a console that is gone, a run directory that is gone."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import Interruption
from tests.support.training_runs import ROOT, base_command, curve, environment, events, write_megatron_data

_SECONDS = 300.0
"""No test here depends on how fast the machine is: this only ends one that hangs."""


class Process:
    """A command in a session of its own; what it prints is read as it comes, from pipes or from a terminal."""

    def __init__(self, command: list[str], is_in_terminal: bool = False, **extra: str) -> None:
        self.output = ""
        self._terminal: int | None = None
        options: dict[str, Any] = {"env": environment(**extra), "cwd": ROOT}
        # A test run in a shell's background has SIGINT ignored, and so would have what it starts.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if is_in_terminal:
                self._pid, self._terminal = pty.fork()
                if self._pid == 0:
                    os.chdir(options["cwd"])
                    os.execvpe(command[0], command, options["env"])
                self._reader = self._terminal
            else:
                self._process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options
                )
                assert self._process.stdout is not None
                self._pid, self._reader = self._process.pid, self._process.stdout.fileno()
        finally:
            signal.signal(signal.SIGINT, handler)
        self.code: int | None = None

    def wait_for(self, pattern: str) -> None:
        """Reads until a pattern has come since the last call."""
        begun, deadline = len(self.output), time.monotonic() + _SECONDS
        while not re.search(pattern, self.output[begun:]):
            assert self._read(), f"it ended before {pattern!r}: {self.output[-4000:]}"
            assert time.monotonic() < deadline, self.output[-4000:]

    def press(self, key: str) -> None:
        """Presses a key in the terminal."""
        assert self._terminal is not None
        os.write(self._terminal, key.encode())

    def send(self, number: signal.Signals) -> None:
        os.kill(self._pid, number)

    def hang_up(self) -> None:
        """Closes the terminal."""
        assert self._terminal is not None
        os.close(self._terminal)
        self._reader = -1

    def end(self) -> int:
        """Reads to the end; returns the exit code, negative for a signal."""
        while self._reader >= 0 and self._read():
            pass
        deadline = time.monotonic() + _SECONDS
        while self.code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.02)
        return self.code

    def _read(self) -> bool:
        if not select.select([self._reader], [], [], _SECONDS)[0]:
            return False
        try:
            piece = os.read(self._reader, 65536)
        except OSError:  # of a terminal whose last process has ended
            return False
        self.output += piece.decode("utf-8", errors="replace")
        return piece != b""

    def kill(self) -> None:
        if self.code is None:
            os.killpg(self._pid, signal.SIGKILL)


@pytest.fixture
def launch() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(command: list[str], **options: Any) -> Process:
        started.append(Process(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_megatron_data(tmp_path_factory.mktemp("data") / "tiny", 200)


def command(run: Path, data: Path, *arguments: str, num_processes: int = 1) -> list[str]:
    tiny = ["model.num_layers=1", "train.steps=1000000", "evaluation.batches=1", "checkpoint.every=0", *arguments]
    module = ["-m", "mlra_scale.train", *base_command(run, data, *tiny)]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        module = [*launcher, f"--nproc_per_node={num_processes}", *module]
    return [sys.executable, *module]


def names(run: Path) -> list[str]:
    return [event["event"] for event in events(run)]


@pytest.mark.slow_except("2")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_one_ctrl_c_in_a_terminal_saves_and_counts_once(
    num_processes: int, launch: Callable[..., Process], tmp_path: Path, data: Path
) -> None:
    """Alone it comes from the terminal; under torchrun it comes from torchrun, which the terminal interrupts."""
    run = tmp_path / "run"
    process = launch(command(run, data, num_processes=num_processes), is_in_terminal=True)
    process.wait_for(r"step +3/")
    process.press("\x03")
    code = process.end()
    assert code == (ExitCode.PREEMPTED if num_processes == 1 else 1), "torchrun's own is 1"
    assert names(run)[-2:] == ["checkpoint", "preempted"], process.output[-3000:]
    step = events(run)[-1]["step"]
    assert step >= 3 and list(curve(run, "loss")) == list(range(1, step + 1))
    assert (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    assert "Ctrl-C again ends it at once" in process.output and "is complete" in process.output


@pytest.mark.slow
def test_a_second_ctrl_c_kills_under_torchrun_too(launch: Callable[..., Process], tmp_path: Path, data: Path) -> None:
    """A rank that never comes to the end of its step: torchrun would wait for TORCH_ELASTIC_SHUTDOWN_TIMEOUT."""
    run = tmp_path / "run"
    process = launch(
        command(run, data, num_processes=2), is_in_terminal=True, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(int(_SECONDS))
    )
    process.wait_for(r"step +2/")
    ranks = _ranks_of(process._pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGSTOP)  # rank 0 waits for it in a collective
    process.press("\x03")
    process.wait_for("Ctrl-C again ends it at once")
    time.sleep(1.5)
    began = time.monotonic()
    process.press("\x03")
    process.wait_for("ended at once by a second Ctrl-C")
    assert time.monotonic() - began < 60
    os.kill(ranks[1], signal.SIGCONT)
    assert process.end() == 1
    assert "preempted" not in names(run)


def _ranks_of(pid: int) -> list[int]:
    """Processes that torchrun has started, by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found[next(int(item[5:]) for item in variables if item.startswith(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_a_terminal_that_closes_saves(launch: Callable[..., Process], tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    process = launch(command(run, data), is_in_terminal=True)
    process.wait_for(r"step +2/")
    process.hang_up()
    assert process.end() == ExitCode.PREEMPTED
    assert names(run)[-2:] == ["checkpoint", "preempted"]


@pytest.mark.slow_except("15")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_ends_at_once(
    number: signal.Signals, launch: Callable[..., Process], tmp_path: Path, data: Path
) -> None:
    """In the seconds of imports, long before handlers were set when training began."""
    process = launch([sys.executable, "-X", "importtime", *command(tmp_path / "run", data)[1:]])
    process.wait_for(r"\| +torch\n|pydantic.main")
    process.send(number)
    assert process.end() == ExitCode.PREEMPTED
    assert "stopped before training began: nothing was written" in process.output
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
            timeout=_SECONDS,
        )
        assert done.returncode == 0, (redirection, done.stdout, done.stderr)
        assert names(run)[-1] == "finished", redirection
    assert list(curve(run, "loss")) == list(range(1, 9))
    assert curve(run, "validation_loss").keys() == set(range(9))


@pytest.mark.slow
@pytest.mark.parametrize("act", ["moved", "removed"])
def test_a_run_directory_that_goes_ends_the_run(
    act: str, launch: Callable[..., Process], tmp_path: Path, data: Path
) -> None:
    run = tmp_path / "run"
    process = launch(command(run, data, "checkpoint.every=300"))
    process.wait_for(r"step +4/")
    if act == "moved":
        run.rename(tmp_path / "elsewhere")
    else:
        run.rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
    assert process.end() == ExitCode.CHECKPOINT_FAILED
    assert re.search(f"{run} is gone: it has been moved or removed", process.output)
    assert not run.exists(), "nothing is put in its place"
    if act == "moved":
        assert f"{tmp_path}/elsewhere now" in process.output
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
    launch: Callable[..., Process], tmp_path: Path, data: Path
) -> None:
    run = tmp_path / "run"
    process = launch([sys.executable, "-c", SLOW_WANDB, *command(run, data, "train.steps=2")[3:]])
    process.wait_for("wandb waits")
    process.send(signal.SIGTERM)
    assert process.end() == ExitCode.DONE
    assert "all 2 steps are done and saved" in process.output and "stops after this step" not in process.output
    assert names(run)[-2:] == ["checkpoint", "finished"]
