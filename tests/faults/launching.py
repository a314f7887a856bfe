"""Starting processes that are going to be killed: real command lines, or ranks forked from a server.

Torchrun is what a user has; a start takes ten seconds. The fork server has imported everything: its ranks are processes
of their own too, and die of the same signals, but start in a second.
"""

import ctypes
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults.triggers import ARMED, Trap, Trigger
from tests.support.processes import TIMEOUT, Program
from tests.support.training_runs import ROOT, environment

PATIENCE = 10.0
"""Seconds that ranks have to end after one of them was killed, before the rest is killed too."""
FILE_LIMIT = "FILE_LIMIT"
"""The environment variable with the number of bytes beyond which the operating system lets no file grow."""


class Armed(Program):
    """A command line whose processes have triggers; see Program and Trap."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        triggers: Sequence[Trigger] = (),
        never: Sequence[Trigger] = (),
        **options: Any,
    ) -> None:
        self.trap = Trap(triggers, log, never)
        path = {"PYTHONPATH": f"{ARMED}{os.pathsep}{ROOT}"}
        super().__init__(command, log, **{**path, **self.trap.variables(), **options})

    def wait(self, timeout: float = TIMEOUT, end: bool = True) -> int:
        """See Program; fails also where a trigger was not reached."""
        code = super().wait(timeout, end)
        self.trap.check(self.output())
        return code


class Forked:
    """Ranks forked from a server process that has imported everything; `extra` are further environment variables."""

    def __init__(
        self, arguments: Sequence[str], num_ranks: int, log: Path, triggers: Sequence[Trigger] = (), **extra: str
    ) -> None:
        import torch.distributed as dist

        # As under torchrun, the launcher owns the store in which the ranks meet.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._log, self._trap = log, Trap(triggers, log)
        log.write_text("")
        context = _server()
        self._processes = []
        variables = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", **extra, **self._trap.variables()}
        for rank in range(num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=(tuple(arguments), variables | own, log), daemon=True)
            process.start()
            self._processes.append(process)

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank; minus the signal for those that were killed."""
        return [process.exitcode for process in self._processes]

    def ranks(self) -> dict[int, int]:
        """The process id of every rank that is alive."""
        return {rank: process.pid for rank, process in enumerate(self._processes) if process.is_alive()}

    def has_ended(self) -> bool:
        """Whether a rank has ended."""
        return any(process.exitcode is not None for process in self._processes)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Waits for the end of all ranks, and kills what is left; returns the first exit code that is not 0, or 0."""
        deadline = time.monotonic() + timeout
        while (alive := [process for process in self._processes if process.is_alive()]) and time.monotonic() < deadline:
            wait_for([process.sentinel for process in alive], timeout=max(0.0, deadline - time.monotonic()))
            if any(self.codes):
                deadline = min(deadline, time.monotonic() + PATIENCE)
        self.end()
        self._trap.check(f"codes {self.codes}\n{self.output()}")
        return next((code for code in self.codes if code), 0)

    def end(self) -> None:
        """Kills what is left."""
        for process in self._processes:
            process.kill()
            process.join()

    def output(self) -> str:
        """What the ranks have printed."""
        return self._log.read_text(errors="replace")


def _server() -> Any:
    """The context whose processes are forked from a server; its environment is that of the first call."""
    context = multiprocessing.get_context("forkserver")
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    context.set_forkserver_preload(["tests.faults.preloaded"])
    return context


def _rank(arguments: tuple[str, ...], variables: dict[str, str], log: Path) -> None:
    """What a forked process does."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    # tqdm's own lock is a named semaphore, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
    if "TRIGGERS" in variables:
        importlib.import_module("tests.faults.armed.sitecustomize")
    if FILE_LIMIT in variables:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(variables[FILE_LIMIT]),) * 2)
    from mlra_scale.train import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' threads and atexit handlers belong to the server.
    os._exit(code)
