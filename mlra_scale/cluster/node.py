"""The agent of one node: torchrun, in its Python form, with an eye on its ranks and a line to the job.

torchrun starts the ranks, keeps a log of each and says how each ended. What it does not do is done here: signals that
ask for a stop reach the ranks (torchrun would kill them), a rank that stands still is seen, its neighbours' stacks are
written, and a node that the job no longer hears ends its ranks, so that they cannot meet those of the next attempt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Link
from mlra_scale.cluster.pulse import PULSE_VARIABLE, Beat, PulseSocket
from mlra_scale.cluster.slurm import SlurmError, requeue
from mlra_scale.cluster.versions import versions

STACKS_VARIABLE = "MLRA_SCALE_STACKS_FOLDER"
NODE_VARIABLE = "MLRA_SCALE_NODE"
DEVICE_VARIABLE = "MLRA_SCALE_DEVICE"
_REPORT_SECONDS = 1.0
_JOB_SECONDS = 30.0
_KILL_SECONDS = 15.0
"""How long torchrun may take to notice that its killed ranks are gone."""


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
    parser.add_argument("--start-seconds", type=float, required=True, help="how long to wait for the other nodes")
    parser.add_argument("--lost-seconds", type=float, required=True, help="how long the job may be silent")
    parser.add_argument("training", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    arguments.training = arguments.training[1:] if arguments.training[:1] == ["--"] else arguments.training
    return arguments


class Watch:
    """Listens to the ranks and to the job, in a thread of its own.

    Args:
        arguments: Of the command line.
        node: This node's name.
        pulse: Where the ranks' beats arrive.
    """

    def __init__(self, arguments: argparse.Namespace, node: str, pulse: PulseSocket) -> None:
        host, port = arguments.job.rsplit(":", 1)
        greeting = {"node": node, "token": os.environ[TOKEN_VARIABLE], "pid": os.getpid(), "versions": versions()}
        self._link = Link(host, int(port), greeting)
        self._node, self._pulse, self._logs = node, pulse, arguments.logs
        self._lost_seconds: float = arguments.lost_seconds
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._told_stop: set[int] = set()
        self._stop = threading.Event()
        self._kill_at: float | None = None
        self._end: dict[str, Any] | None = None
        self._has_ended = threading.Event()
        self.has_lost_job = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGUSR1."""
        self._stop.set()

    @property
    def is_stop_asked(self) -> bool:
        """Whether a signal, or the job, has asked for a stop."""
        return self._stop.is_set()

    def ended(self, **result: Any) -> None:
        """Tells the job how the ranks ended, and waits until that is on its way."""
        self._end = result
        self._has_ended.wait(30.0)

    def _run(self) -> None:
        last_heard, last_report, has_told_stop = time.monotonic(), 0.0, False
        while True:
            self._listen_to_ranks()
            for message in self._link.receive():
                last_heard = time.monotonic()
                self._obey(message)
            if self._end is not None:
                self._link.send({"ended": self._end})
                self._has_ended.set()
                return
            if not self._link.is_open or time.monotonic() - last_heard > self._lost_seconds:
                if not self.has_lost_job:
                    print(f"{self._node}: the job is heard no more; its ranks here end", file=sys.stderr, flush=True)
                self.has_lost_job = True
                self._kill()
            if self._stop.is_set():
                self._pass_stop_on()
                if not has_told_stop:
                    has_told_stop = True
                    self._link.send({"signalled": True})
            if self._kill_at is not None and time.monotonic() > self._kill_at + _KILL_SECONDS:
                os._exit(1)  # the main thread is stuck, in a rendezvous perhaps
            if time.monotonic() - last_report >= _REPORT_SECONDS:
                last_report = time.monotonic()
                self._link.send({"ranks": [self._seen(beat, heard) for beat, heard in self._beats.values()]})
            time.sleep(0.1)

    def _listen_to_ranks(self) -> None:
        for message in self._pulse.receive():
            if "beat" in message:
                beat = Beat(**message["beat"])
                self._beats[beat.rank] = (beat, time.monotonic())
            else:
                self._link.send(message)

    def _seen(self, beat: Beat, heard: float) -> dict[str, Any]:
        return {
            "beat": vars(beat),
            "silence": round(time.monotonic() - heard, 3),
            "state": process_state(beat.pid),
        }

    def _obey(self, message: dict[str, Any]) -> None:
        order = message.get("order")
        if order == "stop":
            self._stop.set()
        elif order == "stacks":
            for beat, _ in self._beats.values():
                _signal(beat.pid, signal.SIGUSR2)
        elif order == "kill":
            self._kill()

    def _pass_stop_on(self) -> None:
        for beat, _ in self._beats.values():
            if beat.pid not in self._told_stop:
                self._told_stop.add(beat.pid)
                _signal(beat.pid, signal.SIGUSR1)

    def _kill(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic()
        for beat, _ in self._beats.values():
            _signal(beat.pid, signal.SIGKILL)
        if not self._beats:
            os._exit(1)  # there is nothing to wait for


def _requeue_without_job(watch: Watch) -> None:
    """Sends the job back to the queue if its first node is lost, and its batch script with it.

    With --no-kill Slurm would leave such a job as it is, on the nodes that are left, until its time limit. Where only
    the batch script has ended, Slurm ends the job, and signals this process at once.
    """
    time.sleep(_JOB_SECONDS)
    if "SLURM_JOB_ID" in os.environ and not watch.is_stop_asked:
        with contextlib.suppress(SlurmError):
            requeue(os.environ["SLURM_JOB_ID"])


def process_state(pid: int) -> str:
    """Returns a process's state as the kernel names it, such as `T (stopped)`; empty where there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("State:"):
                return line.split(":", 1)[1].strip()
    return ""


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ranks of this node; returns 0 if all of them ended with 0."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    node_rank = int(os.environ.get("SLURM_PROCID", "0"))  # one task per node; SLURM_NODEID counts lost nodes too
    with (
        tempfile.TemporaryDirectory(prefix="mlra-scale-") as folder,
        contextlib.closing(PulseSocket(Path(folder))) as pulse,
    ):
        watch = Watch(arguments, node, pulse)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, watch.ask_to_stop)
        os.environ |= {
            PULSE_VARIABLE: pulse.address,
            STACKS_VARIABLE: str(arguments.logs),
            NODE_VARIABLE: node,
            DEVICE_VARIABLE: arguments.device,
            # What NCCL was doing when ranks stopped hearing of each other: one file per rank, beside the logs.
            "TORCH_FR_DUMP_TEMP_FILE": f"{arguments.logs}/nccl-rank-",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{arguments.logs}/nccl-rank-",
        }
        failures = _launch(arguments, node_rank)
        watch.ended(failures=failures)
        if watch.has_lost_job:
            _requeue_without_job(watch)
    return 1 if failures else 0


def _launch(arguments: argparse.Namespace, node_rank: int) -> list[dict[str, Any]]:
    """Runs torchrun; returns how ranks failed, empty if none did."""
    # Here, because importing torch takes seconds in which the job would not know of this node.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from mlra_scale.cluster.logs import RankLogs

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
        # SIGTERM asks for a checkpoint here; torchrun would pass it on and kill after 30 s.
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "mlra_scale.cluster.rank", *arguments.training)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return [
            {
                "rank": rank,
                "code": failure.exitcode,
                "time": failure.timestamp,
                "message": _text(failure.message) if failure.exitcode > 0 else "",
            }
            for rank, failure in error.failures.items()
        ]
    except Exception as error:  # whatever torchrun meets, the job must hear of it
        print(f"torchrun on {os.environ[NODE_VARIABLE]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return [{"rank": None, "code": 1, "time": time.time(), "message": f"torchrun: {_text(str(error))}"}]
    return []


def _text(message: Any) -> str:
    """One line of torchrun's word on a failure: a text, or what the rank left in its error file."""
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    return " ".join(str(text).split())[:500]


if __name__ == "__main__":
    sys.exit(main())
