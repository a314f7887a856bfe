"""Processes: what one has started, what state it is in, and how one ends with the process that started it (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent ends.

    A rank that outlives its node's agent would keep its device and the run directory's lock from the next attempt.

    Args:
        parent: The process that started this one. If it has ended already, this process has another parent, and ends.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this one has ended already")


def descendants(pid: int) -> list[int]:
    """Returns the children of a process, theirs, and so on; not those that another process has adopted."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The name in parentheses may hold anything; state and parent follow it.
                parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(pid, []))
    for each in found:
        found += children.get(each, [])
    return found


def process_state(pid: int) -> str:
    """Returns a process's state as the kernel names it, such as `T (stopped)`; empty where there is no such process."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("State:"):
                return line.split(":", 1)[1].strip()
    return ""


def send_signal(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended, and whose number may be another user's by now."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def end_process(process: subprocess.Popen[Any], seconds: float) -> None:
    """Ends a child, by force if it takes longer than so many seconds; one that has ended already is left alone."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
