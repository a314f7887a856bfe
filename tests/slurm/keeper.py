"""Runs one daemon and owns every process that comes out of it: ``python keeper.py COMMAND...``.

Slurm's step daemons leave their parent, and tasks may start sessions of their own, so neither process groups nor
parents find them later. The keeper is their subreaper: an orphan below it becomes its child, not init's. When its
standard input closes, because the owner closed it or died in whatever way, it kills all of them and ends.

Only the standard library, and no import of the project: it must start fast and run isolated.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LIBC = ctypes.CDLL(None, use_errno=True)


def descendants(root: int) -> list[int]:
    """The live processes below this one, parents first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # The name in parentheses may hold anything; the state and the parent follow the last parenthesis.
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(folder.name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    """Sends a signal to processes, some of which may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def reap() -> None:
    """Takes in every child that has ended, ours or inherited."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


def _prepare_daemon() -> None:
    """Runs in the daemon's process before its program does."""
    # Were the keeper itself killed, the daemon should not outlive it.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # An ignored signal stays ignored in the program, and in every job that it starts.
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


def keep(command: list[str]) -> None:
    """Runs the command until standard input closes, then leaves no process."""
    if LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")
    # Ending before what it keeps would set that free: a signal to all processes of a test run reaches this one too.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_prepare_daemon,
    )
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        reap()
    # What is killed may just have forked: until nothing is left.
    while pids := descendants(os.getpid()):
        send(pids, signal.SIGKILL)
        time.sleep(0.02)
        reap()


if __name__ == "__main__":
    keep(sys.argv[1:])
