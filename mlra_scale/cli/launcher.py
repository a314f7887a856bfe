"""Starts the ranks of a training on this machine: torchrun's workers, without its agent.

torchrun answers the failure of a rank with its own traceback and exit code 1. Here the rank's exit code is the
command's, and one line says which rank failed first, where the rank could not say so itself.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import FrameType

from mlra_scale.training.interruption import STOP_SIGNALS

_POLL_SECONDS = 0.1


def run_ranks(num_ranks: int, command: Sequence[str]) -> int:
    """Runs a command as ranks of one process group on this machine, and waits until all have ended.

    A signal that this process gets is passed on to every rank. When a rank fails, the others are ended by SIGTERM, and
    after 30 seconds by SIGKILL.

    Returns:
        0, or the exit code of the rank that failed first: 128 and the signal's number where a signal ended it.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in STOP_SIGNALS:
        # A parent that has a signal ignored, as nohup has SIGHUP, wants it to stay so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    # torch's own handlers would raise an error at any place of the code below.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    # torch logs every signal that it sends and every exit code.
    logging.disable(logging.ERROR)
    # This process owns the store of the ranks: no port is chosen before it is bound.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="mlra-scale-") as logs:
        ranks = start_processes(
            name="rank",
            entrypoint=command[0],
            args=dict.fromkeys(range(num_ranks), tuple(command[1:])),
            envs={rank: _environment(rank, num_ranks, store.port) for rank in range(num_ranks)},
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        while (result := ranks.wait(timeout=0)) is None:
            while received:
                _send(received.pop(0), ranks.pids().values())
            time.sleep(_POLL_SECONDS)
    if not result.failures:
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    return _report(first.local_rank, first.exitcode)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Returns the variables by which torch finds the other ranks, and one thread per rank where none are named."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1),
    }
    return {name: str(value) for name, value in values.items()}


def _send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _report(rank: int, exit_code: int) -> int:
    """Prints which rank failed, unless it has printed the reason for its exit code itself; returns the exit code."""
    if exit_code < 0:
        how, exit_code = f"was ended by {signal.Signals(-exit_code).name}", 128 - exit_code
    elif exit_code == 1:
        how = "failed; its error is above"
    else:
        return exit_code
    print(f"mlra-scale train: rank {rank} {how}; all ranks have ended", file=sys.stderr, flush=True)
    return exit_code
