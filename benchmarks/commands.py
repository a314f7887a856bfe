"""Runs a command with a time-out, in a session of its own; nothing of it is left when this returns."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from mlra_scale.cluster.process_tree import descendants

GRACE_SECONDS = 5.0
"""Between SIGTERM, at which srun ends the tasks of a step on all nodes, and SIGKILL."""


class CommandFailed(RuntimeError):
    """A command failed; the text is all that it wrote at its end.

    Args:
        what: Which, and how it ended.
        output: What it wrote.
    """

    def __init__(self, what: str, output: str = "") -> None:
        super().__init__(f"{what}\n{output[-3000:]}".strip())
        lines = [re.sub(r"^\[rank\d+\]: ", "", line.strip()) for line in output.splitlines() if line.strip()]
        # Compilers write advice behind their error, and launchers an error of their own that says nothing.
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|Exit|Interrupt)\b", line)]
        telling = [line for line in named if not line.endswith(":")]
        self.last_line = (telling or named or lines or [what])[-1]


def end_on_sigterm() -> None:
    """Lets SIGTERM end this process as Ctrl-C does: `run_command` then ends what it has started."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def run_command(
    what: str, command: Sequence[str], environment: Mapping[str, str], timeout_s: float, log: Path | None = None
) -> None:
    """Runs a command to its end.

    Args:
        what: How an error names it.
        command: Its words.
        environment: Of the process.
        timeout_s: Seconds after which it, and all that it has started, is ended.
        log: Where its output goes; None: nowhere, but its end is part of an error.

    Raises:
        CommandFailed: It ended with another exit code than 0, or was not done in time.
    """
    # A file and not a pipe, and a session of its own: compilers start processes that would hold the pipe open, and that
    # must not outlive a command that is ended.
    with contextlib.ExitStack() as stack:
        file: IO[bytes]
        file = stack.enter_context(tempfile.TemporaryFile()) if log is None else stack.enter_context(log.open("w+b"))
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{what}: not done after {timeout_s:g} s") from None
        finally:
            _end(process)
        if code != 0:
            file.seek(0)
            raise CommandFailed(f"{what}: exit code {code}", file.read().decode(errors="replace"))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process that still runs, what it has started in whatever session, and what is left of its own session."""
    family: list[int] = []
    if process.poll() is None:
        family = descendants(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # The number of a group stays taken for as long as one of its processes lives.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
