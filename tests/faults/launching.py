"""Starting training processes that are going to be killed: by torchrun, or forked from a server that has imported all.

Torchrun is what a user has; a start takes ten seconds. The fork server is for the test suite: the ranks are processes
of their own too, and die of the same signals, but start in a second.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults.dying import VARIABLE, Fault
from tests.support.training_runs import ROOT, environment

PATIENCE = 10.0
"""Seconds that ranks have to end after one of them was killed, before the rest is killed too."""


class Launch(ABC):
    """A running world of ranks."""

    @abstractmethod
    def pids(self) -> dict[int, int]:
        """Returns the process id of every rank that is alive."""

    @abstractmethod
    def wait(self, timeout: float) -> bool:
        """Waits for the end of all ranks; kills what is left at the end. Returns whether all ended well."""

    @abstractmethod
    def end(self) -> None:
        """Kills what is left, the launcher included."""

    @abstractmethod
    def is_running(self) -> bool:
        """Returns whether no rank has ended yet."""

    @abstractmethod
    def output(self) -> str:
        """Returns what the ranks have printed."""

    def kill(self, ranks: Sequence[int]) -> None:
        """Kills ranks by SIGKILL, at about the same moment."""
        pids = self.pids()
        for rank in ranks:
            if rank in pids:
                os.kill(pids[rank], signal.SIGKILL)


class Torchrun(Launch):
    """Ranks under torchrun."""

    def __init__(self, arguments: Sequence[str], num_ranks: int, log: Path, fault: Fault | None = None) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += [f"--nproc_per_node={num_ranks}", "-m", "tests.faults.dying", *arguments]
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=environment(**({VARIABLE: str(fault)} if fault else {})),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self) -> dict[int, int]:
        found = {}
        for task in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
            for pid in task.read_text().split():
                try:
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:  # it has just ended
                    continue
                rank = next((text[5:] for text in variables if text.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank)] = int(pid)
        return found

    def wait(self, timeout: float) -> bool:
        try:
            return self._process.wait(timeout) == 0
        finally:
            self.end()

    def end(self) -> None:
        if self._process.poll() is None:
            # Its whole session: the launcher and its ranks.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        return self._log.read_text(errors="replace")


class Forked(Launch):
    """Ranks forked from a server process that has imported everything; `extra` are further environment variables."""

    def __init__(
        self, arguments: Sequence[str], num_ranks: int, log: Path, fault: Fault | None = None, **extra: str
    ) -> None:
        import torch.distributed as dist

        # As under torchrun, the launcher owns the store in which the ranks meet.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._log = log
        log.write_text("")
        context = _server()
        self._processes = []
        for rank in range(num_ranks):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            variables |= extra | ({VARIABLE: str(fault)} if fault else {})
            process = context.Process(target=_rank, args=(tuple(arguments), variables, log), daemon=True)
            process.start()
            self._processes.append(process)

    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in enumerate(self._processes) if process.is_alive()}

    def wait(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while (alive := [process for process in self._processes if process.is_alive()]) and time.monotonic() < deadline:
            wait_for([process.sentinel for process in alive], timeout=max(0.0, deadline - time.monotonic()))
            if any(process.exitcode not in (None, 0) for process in self._processes):
                deadline = min(deadline, time.monotonic() + PATIENCE)
        self.end()
        return all(process.exitcode == 0 for process in self._processes)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank; minus the signal for those that were killed."""
        return [process.exitcode for process in self._processes]


def _server() -> Any:
    """The context whose processes are forked from a server; its environment is that of the first call."""
    context = multiprocessing.get_context("forkserver")
    fixed = environment()
    for name, value in fixed.items():
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
    from tests.faults.dying import run

    code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' threads and atexit handlers belong to the server.
    os._exit(code)
