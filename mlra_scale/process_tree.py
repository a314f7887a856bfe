"""Processes of one machine (Linux): descendants, state and priority; how a process ends with its parent."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent ends; ends it now if another process has adopted it already.

    A rank that outlives its node's agent would keep its device and the run directory's lock from the next attempt.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this one has ended already")


def at_low_priority(function: Callable[..., object], *arguments: Any) -> None:
    """Calls a function in a thread of the lowest priority, and waits for it; an error in it is raised here.

    Linux has a priority for each thread: that of this one, which it could not raise again, stays.
    """
    errors: list[BaseException] = []

    def run() -> None:
        os.nice(19)
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="low priority")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def be_killed_first() -> Callable[[], None]:
    """Lets the kernel choose this process before others where memory runs out; what it returns takes that back."""
    path = Path("/proc/self/oom_score_adj")
    try:
        before = path.read_text()
        path.write_text("1000")
    except OSError:
        return lambda: None

    def take_back() -> None:
        with contextlib.suppress(OSError):
            path.write_text(before)

    return take_back


def leave(code: int) -> NoReturn:
    """Ends this process without the interpreter's finalization, which takes a second once torch is loaded.

    Non-daemon threads and what is registered for the end of the process come before, as they do there; buffers of C
    libraries are written. The job waits for the end of every rank before it starts others.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(code)


def descendants(pid: int) -> list[int]:
    """Returns the children of a process, theirs, and so on; not those that another process has adopted.

    Processes that this one may not see (/proc mounted with hidepid) are passed over: psutil's own `children` would find
    none at all then.
    """
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            children.setdefault(process.ppid(), []).append(process.pid)
    found = list(children.get(pid, []))
    for each in found:
        found += children.get(each, [])
    return found


def kill_with_descendants(process: subprocess.Popen[bytes]) -> None:
    """Kills a child of this process, unless it has ended, and its descendants in any session."""
    for pid in descendants(process.pid):
        send_signal(pid, signal.SIGKILL)
    process.kill()


def process_state(pid: int) -> str:
    """Returns the state of a process, such as `stopped` or `zombie`; empty where there is no such process."""
    with contextlib.suppress(psutil.Error, OSError):  # OSError: this process has no free descriptor
        return str(psutil.Process(pid).status())
    return ""


def send_signal(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended, and whose number may be another user's by now."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)
