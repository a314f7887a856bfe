"""Processes that end with those that started them, and what the kernel knows of processes."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from mlra_scale.process_tree import at_low_priority, descendants, process_state
from tests.support.waiting import all_end, eventually

GRANDCHILD = "import time; print('runs', flush=True); time.sleep(60)"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GRANDCHILD!r}])"
RANK = """
import os, sys, time
from mlra_scale.process_tree import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}, str(os.getpid())])"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def start(started: list[subprocess.Popen[str]], program: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_descendants_are_children_and_theirs(started: list[subprocess.Popen[str]]) -> None:
    process, said = start(started, CHILD)
    assert said == "runs"
    found = descendants(process.pid)
    assert len(found) == 1 and descendants(found[0]) == []
    assert process.pid in descendants(os.getpid()) and found[0] in descendants(os.getpid())
    assert descendants(2**22) == []


LEAVE = """
import atexit, ctypes, sys, threading, time
from mlra_scale.process_tree import leave
atexit.register(lambda: print("registered"))
threading.Thread(target=lambda: (time.sleep(0.2), print("of a thread"))).start()
libc = ctypes.CDLL(None)
libc.printf(b"of C\\n")
print("of Python", end="")
if sys.argv[1:]:
    sys.stdout.close()
leave(7)
"""


def test_leaving_loses_no_output_and_keeps_the_exit_code() -> None:
    """What a whole end of the interpreter would do, without its second of finalization."""
    command = [sys.executable, "-c", LEAVE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 7 and result.stderr == ""
    assert sorted(result.stdout.replace("of Python", "of Python\n", 1).split("\n")[:-1]) == [
        *("of C", "of Python", "of a thread", "registered")
    ]
    assert subprocess.run([*command, "closed"], capture_output=True, timeout=30, check=False).returncode == 7


def test_a_rank_whose_agent_has_ended_before_does_not_begin() -> None:
    result = subprocess.run([sys.executable, "-c", RANK, "1"], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1 and "has ended already" in result.stderr and result.stdout == ""


def test_a_rank_dies_with_its_agent(started: list[subprocess.Popen[str]]) -> None:
    process, said = start(started, PARENT)
    rank = int(said)
    assert process_state(rank) != ""
    process.kill()
    process.wait()
    assert all_end([rank], 5.0)


def test_the_state_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert eventually(lambda: process_state(process.pid) == "sleeping")
            process.send_signal(signal.SIGSTOP)
            assert eventually(lambda: process_state(process.pid) == "stopped")
        finally:
            process.kill()
        assert eventually(lambda: process_state(process.pid) == "zombie")
    assert process_state(process.pid) == ""
    assert process_state(os.getpid()) == "running"


def test_a_process_that_may_not_be_seen_hides_no_other(
    started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc mounted with hidepid."""
    parent, _ = start(started, CHILD)
    ppid = psutil.Process.ppid

    def unseen(process: psutil.Process) -> int:
        if process.pid == 1:
            raise psutil.AccessDenied(1)
        return int(ppid(process))

    monkeypatch.setattr(psutil.Process, "ppid", unseen)
    assert len(descendants(parent.pid)) == 1


def test_without_free_descriptors_a_state_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(process: psutil.Process) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(psutil.Process, "status", fail)
    assert process_state(os.getpid()) == ""


def test_a_low_priority_is_that_of_a_thread() -> None:
    """A process that has lowered its own could not raise it again."""
    before, inside = os.getpriority(os.PRIO_PROCESS, 0), []
    at_low_priority(lambda number: inside.append((number, os.getpriority(os.PRIO_PROCESS, 0))), 7)
    assert inside == [(7, 19)] and os.getpriority(os.PRIO_PROCESS, 0) == before
    with pytest.raises(ZeroDivisionError):
        at_low_priority(lambda: 1 / 0)
