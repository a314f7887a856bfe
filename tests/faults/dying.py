"""The training command line with a fault in it: `python -m tests.faults.dying ...` takes the same arguments.

The environment variable FAULT says where: `kill POINT RANK N` kills that rank by SIGKILL when it reaches one of
mlra_scale.checkpoint.failpoints for the N-th time; `fail POINT RANK N` lets the operating system refuse there.
FILE_LIMIT is a number of bytes beyond which the operating system lets no file grow. MOMENTS is that of moments.py.
"""

import errno
import importlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from mlra_scale.checkpoint import failpoints
from mlra_scale.train import main

VARIABLE = "FAULT"
LIMIT_VARIABLE = "FILE_LIMIT"


@dataclass(frozen=True)
class Fault:
    """What happens to a rank.

    Attributes:
        point: One of failpoints.FAILPOINTS.
        rank: Whose fault it is.
        occurrence: How often the rank has reached the point then.
        action: "kill", or "fail": an error of the disk.
    """

    point: str
    rank: int
    occurrence: int = 1
    action: str = "kill"

    def __str__(self) -> str:
        return f"{self.action} {self.point} {self.rank} {self.occurrence}"

    @classmethod
    def read(cls, text: str) -> "Fault":
        """Reads what str() wrote."""
        action, point, rank, occurrence = text.split()
        return cls(point, int(rank), int(occurrence), action)


def dies_at(fault: Fault) -> str:
    """What a rank says before it is killed: a run that ends for another reason proves nothing."""
    return f"rank {fault.rank} dies at {fault.point}, time {fault.occurrence}"


def install(fault: Fault) -> None:
    """Puts the fault where it belongs, if it is this rank's."""
    assert fault.point in failpoints.FAILPOINTS, fault
    if int(os.environ.get("RANK", "0")) != fault.rank:
        return
    count, lock = 0, threading.Lock()

    def reached(point: str) -> None:
        nonlocal count
        with lock:
            count += point == fault.point
            is_now = point == fault.point and count == fault.occurrence
        if is_now and fault.action == "kill":
            os.write(2, f"{dies_at(fault)}\n".encode("ascii"))
            os.kill(os.getpid(), signal.SIGKILL)
        if is_now:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failpoints.reached = reached


def run(arguments: Sequence[str]) -> int:
    """Runs the command line with the faults that the environment asks for."""
    if text := os.environ.get(VARIABLE):
        install(Fault.read(text))
    if "MOMENTS" in os.environ:
        importlib.import_module("tests.faults.armed.sitecustomize")
    if text := os.environ.get(LIMIT_VARIABLE):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(text), int(text)))
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
