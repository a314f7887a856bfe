"""Any command line as a process of its own: in a terminal or without, with a stdout that fails, armed with moments."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.moments import ARMED, Moment, missed, variables
from tests.support.training_runs import ROOT, environment

PYTHON = sys.executable
TRAIN = (PYTHON, "-m", "mlra_scale.train")
CTRL_C = b"\x03"


def torchrun(num_ranks: int) -> tuple[str, ...]:
    """The beginning of a command line that starts ranks on this machine as a user does."""
    launcher = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    return (*launcher, f"--nproc_per_node={num_ranks}", *TRAIN[1:])


def tool(name: str) -> tuple[str, ...]:
    """The beginning of the command line of a tool."""
    return (PYTHON, f"tools/{name}.py")


class Program:
    """A running command line and all that it starts.

    Args:
        command: The command line.
        log: File for its output; what was there is kept.
        moments: What its processes are armed with.
        terminal: Whether it runs in the foreground of a terminal of its own.
        stdout: Where its stdout goes instead of the log.
        stderr: Where its stderr goes instead of the log.
        never: Moments at which no process may come; they do nothing.
        shell: What starts the command, which is added.
        extra: Further environment variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        moments: Sequence[Moment] = (),
        terminal: bool = False,
        stdout: int | None = None,
        stderr: int | None = None,
        never: Sequence[Moment] = (),
        shell: Sequence[str] = (),
        **extra: str,
    ) -> None:
        self.log, self._moments, self._never, self._master = log, list(moments), list(never), -1
        self.signalled, self.is_hung_up = 0.0, False
        log.parent.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in log.parent.glob(f"{log.name}.marks-*"))
        self._marks = log.with_name(f"{log.name}.marks-{number}")
        self._start = log.stat().st_size if log.exists() else 0
        armed = {"PYTHONPATH": f"{ARMED}{os.pathsep}{ROOT}", **variables([*moments, *never], self._marks)}
        self._id = uuid.uuid4().hex
        env = environment(DS_ACCELERATOR="cpu", FAULTS_PROGRAM=self._id, **{**armed, **extra})
        file = log.open("ab")

        streams: dict[str, Any]
        if terminal:
            self._master, slave = pty.openpty()
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        else:
            streams = {"stdin": subprocess.DEVNULL, "stdout": stdout or file, "stderr": stderr or file}
        self.started = time.monotonic()
        # By programs rather than by preexec_fn, which may lock up where several threads start processes. Each gives its
        # place to the next: the process is that of the command.
        line = ["setpriv", "--pdeathsig", "KILL", "setsid", *(["--ctty"] if terminal else []), *shell, *command]
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

    def output(self) -> str:
        """What it has printed."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_until(self, condition: Callable[[], Any], timeout: float = 240.0) -> None:
        """Waits until something is true while it runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._process.poll() is None, f"it ended before\n{self.output()[-1000:]}"
            assert time.monotonic() < deadline, f"not so after {timeout:.0f} s\n{self.output()[-1000:]}"
            time.sleep(0.02)

    def is_hit(self) -> bool:
        """Whether all its moments have come."""
        return not missed(self._moments, self._marks)

    def type(self, keys: bytes) -> None:
        """Types into its terminal."""
        os.write(self._master, keys)

    def hang_up(self) -> None:
        """Closes its terminal, as the end of an ssh connection does."""
        os.close(self._master)
        self._master, self.is_hung_up = -1, True

    def signal(self, number: int) -> None:
        """Sends a signal to the process that was started."""
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, timeout: float = 300.0, end: bool = True) -> int:
        """Waits for the end of the process that was started, and returns its exit code (minus the signal).

        Args:
            timeout: Seconds; then it fails.
            end: Whether to kill what it has started.

        Raises:
            AssertionError: It has not ended, a moment has not come, or one that must never come has.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {timeout:.0f} s\n{self.output()[-1000:]}") from None
        finally:
            if end:
                self.end()
        assert not (late := missed(self._moments, self._marks)), f"did not come to {late}\n{self.output()[-1000:]}"
        both = [*self._moments, *self._never]
        come = set(map(str, self._never)) - set(missed(both, self._marks))
        assert not come, f"came to {come}"
        return code

    def assert_nothing_is_left(self, seconds: float) -> None:
        """Fails if processes that it started live on after so long."""
        deadline = time.monotonic() + seconds
        while pids := self.left():
            assert time.monotonic() < deadline, f"{len(pids)} processes are left after {seconds:.0f} s"
            time.sleep(0.1)

    def left(self) -> list[int]:
        """Every process that it started and that lives, ranks of torchrun in sessions of their own included."""
        mark = f"FAULTS_PROGRAM={self._id}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not is_zombie and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

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
