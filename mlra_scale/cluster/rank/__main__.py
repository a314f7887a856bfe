"""One rank of a cluster job: sends heartbeats to its node, checks the node, and trains."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from pathlib import Path
from typing import IO

from mlra_scale.cluster.rank import (
    AGENT_VARIABLE,
    DEVICE_VARIABLE,
    HEARTBEAT_VARIABLE,
    LOGS_VARIABLE,
    NODE_VARIABLE,
    SPARE_VARIABLE,
)
from mlra_scale.cluster.rank.latch import take_latch, wait_at_latch
from mlra_scale.process_tree import at_low_priority, be_killed_first, die_with_parent, leave

if __name__ == "__main__":
    LATCH = take_latch()
    BECOME_AS_OTHERS = be_killed_first() if os.environ[SPARE_VARIABLE] else None
    # Before the seconds that the other imports take.
    from mlra_scale.console import make_unfailing
    from mlra_scale.training.interruption import Interruption

    gc.disable()  # until everything is imported; see train.py
    die_with_parent(int(os.environ[AGENT_VARIABLE]))
    make_unfailing()
    INTERRUPTION = Interruption().until_exit()
    if os.environ[SPARE_VARIABLE]:
        from mlra_scale.cluster.rank.libraries import load_libraries

        at_low_priority(load_libraries, os.environ[DEVICE_VARIABLE], sys.argv[1:])

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from mlra_scale import train
from mlra_scale.cluster.rank.heartbeat import HeartbeatSender
from mlra_scale.cluster.rank.preflight import BadNodes, check_alone, check_together
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import Watchdog


class NodeWatchdog(Watchdog):
    """Sends the node heartbeats, and checks the nodes before the ranks train; `shared` is a folder of all nodes."""

    # The launcher has ended the run before this one: what still holds the lock is about to end.
    lock_seconds = 150.0

    def __init__(self, heartbeats: HeartbeatSender, node: str, shared: Path) -> None:
        self._heartbeats, self.node, self._shared = heartbeats, node, shared

    def heartbeat(self, phase: str, step: int) -> None:
        """See Watchdog."""
        self._heartbeats.begin(phase, step)

    def check(self, device: torch.device) -> None:
        """See Watchdog.

        Raises:
            BadNodes: Some node cannot be used; on all ranks.
        """
        self._heartbeats.begin("checking")
        check_together(device, self.node, self._shared)

    def exclude(self, node: str, reason: str) -> bool:
        """See Watchdog."""
        self._heartbeats.send(bad_nodes={node: reason})
        return True


def _stacks_file(path: Path) -> IO[str]:
    """Opens the file for stacks; where that is not possible, such as on a full disk, they go to the rank's log."""
    try:
        return path.open("w")
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); stacks go to this log", flush=True)
        return os.fdopen(os.dup(sys.stdout.fileno()), "w")


@record
def main() -> int:
    """Trains; returns the training's exit code."""
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # one log for both, in order
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    node, shared = os.environ[NODE_VARIABLE], Path(os.environ[LOGS_VARIABLE])
    heartbeats = HeartbeatSender(os.environ[HEARTBEAT_VARIABLE], rank, local_rank)
    heartbeats.begin("waiting")
    with _stacks_file(shared / f"rank-{rank:05d}.stacks") as stacks:
        # Written by the signal's handler in C: it works while the interpreter waits in a collective.
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        wait_at_latch(LATCH)
        if BECOME_AS_OTHERS is not None:
            BECOME_AS_OTHERS()
        heartbeats.begin("starting")
        try:
            check_alone(node, local_rank, os.environ[DEVICE_VARIABLE])
            code = train.main(sys.argv[1:], NodeWatchdog(heartbeats, node, shared), INTERRUPTION)
        except BadNodes as error:
            if rank == 0 or not error.is_common:
                print(f"bad node: {error}", file=sys.stderr, flush=True)
            heartbeats.send(bad_nodes=error.nodes)
            code = ExitCode.BAD_NODE
        heartbeats.begin("ending")
        faulthandler.unregister(signal.SIGUSR2)
    return code


if __name__ == "__main__":
    try:
        CODE = main() or ExitCode.DONE
    except Exception:
        sys.excepthook(*sys.exc_info())
        CODE = ExitCode.FAILED
    leave(CODE)
