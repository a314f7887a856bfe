"""Any command line as processes of its own: in a terminal or without, watched while it runs, and nothing left of it."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.training_runs import ROOT, Finished, environment

PYTHON = sys.executable
TRAIN = (PYTHON, "-m", "mlra_scale.train")
CTRL_C = b"\x03"
TIMEOUT = 300.0
"""Seconds. No promise depends on the speed of the machine: this only ends what hangs."""


def torchrun(num_ranks: int, *module: str) -> tuple[str, ...]:
    """The beginning of a command line that starts ranks on this machine as a user does."""
    launcher = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    return (*launcher, f"--nproc_per_node={num_ranks}", *(module or TRAIN[1:]))


def tool(name: str) -> tuple[str, ...]:
    """The beginning of the command line of a tool."""
    return (PYTHON, f"tools/{name}.py")


class Program:
    """A running command line and every process that it starts, which end with this one.

    Args:
        command: The command line.
        log: File for its output; what was there is kept.
        terminal: Whether it runs in the foreground of a terminal of its own.
        stdout: Where its stdout goes instead of the log.
        stderr: Where its stderr goes instead of the log.
        extra: Further environment variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        terminal: bool = False,
        stdout: int | None = None,
        stderr: int | None = None,
        **extra: str,
    ) -> None:
        self.log, self._master, self._seen, self._id = log, -1, 0, uuid.uuid4().hex
        log.parent.mkdir(parents=True, exist_ok=True)
        self._start = log.stat().st_size if log.exists() else 0
        env = environment(DS_ACCELERATOR="cpu", TEST_PROGRAM=self._id, **extra)
        file = log.open("ab")
        streams: dict[str, Any]
        if terminal:
            self._master, slave = pty.openpty()
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        else:
            streams = {"stdin": subprocess.DEVNULL, "stdout": stdout or file, "stderr": stderr or file}
        # By programs rather than by preexec_fn, which may lock up where several threads start processes. Each gives its
        # place to the next: the process is that of the command. A test run in a shell's background has SIGINT ignored.
        start = ["setpriv", "--pdeathsig", "KILL", "setsid", *(["--ctty"] if terminal else [])]
        line = [*start, "env", "--default-signal=INT", *command]
        self.started = time.monotonic()
        self._process = subprocess.Popen(line, env=env, cwd=ROOT, **streams)
        if terminal:
            os.close(slave)
            self._reader = threading.Thread(target=self._read, args=(file,), daemon=True)
            self._reader.start()
        else:
            file.close()

    def _read(self, file: Any) -> None:
        with file, contextlib.suppress(OSError, ValueError):
            while part := os.read(self._master, 1 << 16):
                file.write(part)
                file.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def output(self) -> str:
        """What it has printed."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_until(self, condition: Callable[[], Any], timeout: float = TIMEOUT) -> None:
        """Waits until something is true while it runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert not self.has_ended() or condition(), f"it ended before\n{self.output()[-3000:]}"
            assert time.monotonic() < deadline, f"not so after {timeout:.0f} s\n{self.output()[-3000:]}"
            time.sleep(0.02)

    def wait_for(self, pattern: str) -> None:
        """Waits until it prints something that the pattern matches, after what the last such call has found."""

        def is_printed() -> bool:
            found = re.search(pattern, self.output()[self._seen :])
            self._seen += found.end() if found else 0
            return found is not None

        self.wait_until(is_printed)

    def type(self, keys: bytes) -> None:
        """Types into its terminal."""
        os.write(self._master, keys)

    def hang_up(self) -> None:
        """Closes its terminal, as the end of an ssh connection does."""
        os.close(self._master)
        self._master = -1

    def signal(self, number: int) -> None:
        """Sends a signal to the process that was started."""
        self._process.send_signal(number)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, timeout: float = TIMEOUT, end: bool = True) -> int:
        """Waits for the end of the process that was started, and returns its exit code (minus the signal)."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {timeout:.0f} s\n{self.output()[-3000:]}") from None
        finally:
            if end:
                self.end()

    def left(self) -> dict[int, tuple[int, dict[str, str]]]:
        """Parent and environment of every living process that it has started, in whatever session, by process id."""
        return {
            process.pid: (process.info["ppid"], process.info["environ"])
            for process in psutil.process_iter(["ppid", "environ", "status"])
            if (process.info["environ"] or {}).get("TEST_PROGRAM") == self._id
            and process.info["status"] != psutil.STATUS_ZOMBIE
        }

    def ranks(self) -> dict[int, int]:
        """The process id of every rank that torchrun or `mlra-scale train` has started and that lives."""
        found = {pid: (parent, variables) for pid, (parent, variables) in self.left().items() if "RANK" in variables}
        # A rank's own children have its variables too.
        return {int(variables["RANK"]): pid for pid, (parent, variables) in found.items() if parent not in found}

    def assert_nothing_is_left(self, seconds: float) -> None:
        """Fails if processes that it started live on after so long."""
        deadline = time.monotonic() + seconds
        while pids := self.left():
            assert time.monotonic() < deadline, f"{len(pids)} processes are left after {seconds:.0f} s"
            time.sleep(0.1)

    def end(self) -> None:
        """Kills what is left."""
        while pids := self.left():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.02)
        self._process.wait()
        if self._master >= 0:
            self._reader.join(timeout=2.0)
            self.hang_up()


def train(*arguments: str, num_processes: int = 1, timeout: float = 180.0, **extra: Any) -> Finished:
    """Runs `mlra_scale.train` with these arguments and waits for its end.

    Returns:
        Exit code (that of torchrun is 1 whatever the workers' is) and output.
    """
    with tempfile.TemporaryDirectory() as name:
        log, output, errors = (Path(name) / file for file in ("log", "stdout", "stderr"))
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            begin = TRAIN if num_processes == 1 else torchrun(num_processes)
            program = Program([*begin, *arguments], log, stdout=stdout.fileno(), stderr=stderr.fileno(), **extra)
        return Finished(program.wait(timeout), output.read_text(), errors.read_text())
