"""The agent of one node: runs torchrun's agent, and beside it a thread that watches the ranks (watch.py).

torchrun starts the ranks, keeps a log of each and reports how each ended. The thread adds what torchrun does not do:
signals that ask for a stop reach the ranks (torchrun would kill them), a rank that stands still is seen, stacks of all
ranks are written, and a node that no longer hears the job ends its ranks, so that they cannot meet those of the next
attempt.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlra_scale.cluster.messages import NodeMessage, RankFailure, printable
from mlra_scale.cluster.node.watch import Watch, connect
from mlra_scale.cluster.rank import (
    AGENT_VARIABLE,
    DEVICE_VARIABLE,
    HEARTBEAT_VARIABLE,
    LOGS_VARIABLE,
    NODE_VARIABLE,
    SPARE_VARIABLE,
)
from mlra_scale.cluster.rank.heartbeat import HeartbeatSocket
from mlra_scale.cluster.rank.latch import Latch
from mlra_scale.config import ConfigError
from mlra_scale.process_tree import at_low_priority, descendants, leave
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.start.device import set_device_environment

_SECONDS_TO_SEE = 30.0
"""How long a shared file system may take to show what another node wrote (NFS caches names for up to 30 s)."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments; those after `--` are of the training."""
    parser = argparse.ArgumentParser(prog="mlra_scale.cluster.node", description=__doc__, allow_abbrev=False)
    parser.add_argument("--job", required=True, metavar="HOST:PORT", help="where the job listens")
    parser.add_argument("--master", required=True, metavar="HOST:PORT", help="where the ranks meet")
    parser.add_argument("--run-id", required=True, help="of this attempt")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True, help="on each node")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="what every rank needs")
    parser.add_argument("--logs", type=Path, required=True, help="folder for one log per rank")
    parser.add_argument("--nonce", required=True, help="what the file of this name in that folder holds")
    parser.add_argument("--start-seconds", type=float, required=True, help="how long to wait for the other nodes")
    parser.add_argument("--lost-seconds", type=float, required=True, help="how long the job may be silent")
    parser.add_argument("--spare", action="store_true", help="others train here until these ranks begin")
    parser.add_argument("training", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    arguments.training = arguments.training[1:] if arguments.training[:1] == ["--"] else arguments.training
    return arguments


def folder_fault(folder: Path, node: str, nonce: str) -> str:
    """Returns what is wrong with the folder of this attempt's logs as this node sees it; empty: nothing.

    The job has written `nonce` into the file of this name there. The node writes it into a file of its own, for which
    the other nodes look (rank/preflight.py).
    """
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while True:
        with contextlib.suppress(OSError):
            if (folder / "nonce").read_bytes() == nonce.encode():
                break
        if time.monotonic() > deadline:
            return f"does not see {folder}, which the job has made: the run directory must be on a shared file system"
        time.sleep(0.5)
    try:
        (folder / f"nonce-{node}").write_text(nonce)
    except OSError as error:
        return f"cannot write to {folder}: {error.strerror}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ranks of this node; returns 0 if all of them ended with 0."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    node_rank = int(os.environ.get("SLURM_PROCID", "0"))  # one task per node; SLURM_NODEID counts lost nodes too
    heartbeats, latch = HeartbeatSocket(), Latch(arguments.processes)
    if not arguments.spare:
        latch.open()
    link, logs = connect(arguments.job, node), arguments.logs
    watch = Watch(link, heartbeats, latch, logs, node_rank, arguments.lost_seconds, partial(descendants, os.getpid()))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, watch.ask_to_stop)
    os.environ |= {
        HEARTBEAT_VARIABLE: heartbeats.address,
        LOGS_VARIABLE: str(logs),
        NODE_VARIABLE: node,
        DEVICE_VARIABLE: arguments.device,
        AGENT_VARIABLE: str(os.getpid()),
        SPARE_VARIABLE: "1" if arguments.spare else "",
        # What NCCL was doing when ranks stopped hearing of each other: one file per rank, beside the logs.
        "TORCH_FR_DUMP_TEMP_FILE": f"{logs}/nccl-rank-",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{logs}/nccl-rank-",
    }
    with contextlib.suppress(ConfigError):  # the ranks report it
        set_device_environment(resolve(build_parser().parse_intermixed_args(arguments.training))[0], os.environ)
    bad_nodes = {node: fault} if (fault := folder_fault(logs, node, arguments.nonce)) else {}
    failures = [] if bad_nodes else run_ranks(arguments, latch, node, node_rank)
    watch.report_end(NodeMessage(failures=failures, bad_nodes=bad_nodes))
    heartbeats.close()
    return 1 if failures or bad_nodes else 0


def run_ranks(arguments: argparse.Namespace, latch: Latch, node: str, node_rank: int) -> list[RankFailure]:
    """Runs the ranks of this node by torchrun until all have ended; returns how ranks failed, empty if none did."""
    # Here, because importing torch takes seconds in which the job would not know of this node.
    gc.disable()  # see train.py
    if arguments.spare:
        at_low_priority(importlib.import_module, "torch.distributed.launcher.api")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from mlra_scale.cluster.node.logs import RankLogs

    gc.freeze()
    gc.enable()
    config = LaunchConfig(
        min_nodes=arguments.nodes,
        max_nodes=arguments.nodes,
        nproc_per_node=arguments.processes,
        run_id=arguments.run_id,
        rdzv_backend="static",
        rdzv_endpoint=arguments.master,
        rdzv_configs={"rank": node_rank, "timeout": int(arguments.start_seconds)},
        max_restarts=0,
        logs_specs=RankLogs(arguments.logs, node_rank * arguments.processes),
        log_line_prefix_template="[${rank}] ",
        # The other signals ask for a checkpoint here; torchrun would pass them on and kill after 30 s.
        signals_to_handle="SIGQUIT",
    )
    latch.become_standard_input()
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "mlra_scale.cluster.rank", *arguments.training)
    except ChildFailedError as error:
        _print(str(error))
        return [
            RankFailure(
                rank=rank,
                code=failure.exitcode,
                time=failure.timestamp,
                message=_text(failure.message) if failure.exitcode > 0 else "",
            )
            for rank, failure in error.failures.items()
        ]
    except Exception as error:  # the job must hear of whatever goes wrong in torchrun
        _print(f"torchrun on {node}: {type(error).__name__}: {error}")
        return [RankFailure(rank=None, code=1, time=time.time(), message=f"torchrun: {_text(str(error))}")]
    return []


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # srun is gone; the job hears the same over its connection
        print(text, file=sys.stderr, flush=True)


def _text(message: Any) -> str:
    """One line of torchrun's report on a failure: a text, or what the rank left in its error file."""
    return printable(str(message.get("message", "") if isinstance(message, dict) else message))[:500]


if __name__ == "__main__":
    leave(main())
