"""Commands with a time-out. Nothing of a command is left when `run_command` returns. See also benchmarks/ranks.py."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from mlra_scale.process_tree import descendants

GRACE_SECONDS = 5.0
"""Between SIGTERM, at which srun ends the tasks of a step on all nodes, and SIGKILL."""


class CommandFailed(RuntimeError):
    """A command failed; the text is a summary and the end of its output."""

    def __init__(self, summary: str, output: str = "") -> None:
        super().__init__(f"{summary}\n{output[-3000:]}".strip())
        self.last_line = error_line(output) or summary


def error_line(output: str) -> str:
    """Returns the line of an output that names the error; empty if there is no output."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line.strip()) for line in output.splitlines() if line.strip()]
    # Compilers print advice after their error, and launchers an error of their own without a reason.
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|Exit|Interrupt)\b", line)]
    with_reason = [line for line in errors if not line.endswith(":")]
    return (with_reason or errors or lines or [""])[-1]


def end_on_sigterm() -> None:
    """Lets SIGTERM end this process as Ctrl-C does, so that `run_command` ends what it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_command(name: str, command: Sequence[str], environment: Mapping[str, str], timeout_s: float, log: Path) -> None:
    """Runs a command to its end, in a session of its own: compilers start processes that must not outlive it.

    Its output goes to the log. After the time-out it is ended with all that it has started.

    Raises:
        CommandFailed: It ended with another exit code than 0, or was not done in time.
    """
    process = None
    with log.open("wb") as file:
        try:
            with _deferred_signals():
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{name}: not done after {timeout_s:g} s") from None
        finally:
            if process is not None:
                _end(process)
    if code != 0:
        raise CommandFailed(f"{name}: exit code {code}", log.read_text(errors="replace"))


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGINT act at the end of the block, when the process that the block starts is known.

    In a thread nothing has to be deferred: Python runs handlers of signals in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process that still runs, its descendants in any session, and the rest of its own session."""
    tree: list[psutil.Process] = []
    if process.poll() is None:
        for pid in descendants(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                tree.append(psutil.Process(pid))
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
    for descendant in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    # The number of a group stays taken while one of its processes lives.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
