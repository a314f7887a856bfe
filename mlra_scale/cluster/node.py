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
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Link, host_and_port
from mlra_scale.cluster.family import AGENT_VARIABLE, descendants
from mlra_scale.cluster.job_file import Attempt, JobFile
from mlra_scale.cluster.messages import RankMessage
from mlra_scale.cluster.pulse import PULSE_VARIABLE, Beat, PulseSocket
from mlra_scale.cluster.slurm import SlurmError, requeue
from mlra_scale.cluster.versions import versions
from mlra_scale.config import ConfigError
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.device_environment import set_device_environment

STACKS_VARIABLE = "MLRA_SCALE_STACKS_FOLDER"
NODE_VARIABLE = "MLRA_SCALE_NODE"
DEVICE_VARIABLE = "MLRA_SCALE_DEVICE"
_REPORT_SECONDS = 1.0
_JOB_SECONDS = 30.0
_RESTART_SECONDS = 360.0
"""How long a job that lives may wait between two attempts."""
_SECONDS_TO_SEE = 30.0
"""How long a shared file system may take to show what another node wrote (NFS caches names for up to 30 s)."""
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
    parser.add_argument("--nonce", required=True, help="what the file of this name in that folder holds")
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
        node_rank: Its place among the nodes.
        pulse: Where the ranks' beats arrive.
        family: Returns the processes that have been started here; to be killed with the ranks among them.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        node: str,
        node_rank: int,
        pulse: PulseSocket,
        family: Callable[[], Iterable[int]],
    ) -> None:
        host, port = host_and_port(arguments.job)
        self._link = Link(host, port, _greeting(node))
        self._node_rank, self._pulse, self._logs = node_rank, pulse, arguments.logs
        self._family = family
        self._lost_seconds: float = arguments.lost_seconds
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._told_stop: set[int] = set()
        self._stop = threading.Event()
        self._kill_at: float | None = None
        self._end: dict[str, Any] | None = None
        self._has_ended = threading.Event()
        self.has_lost_job = False
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals that ask for a stop; the job decides how long that may take."""
        self._stop.set()

    @property
    def is_stop_asked(self) -> bool:
        """Whether a signal, or the job, has asked for a stop."""
        return self._stop.is_set()

    def ended(self, **result: Any) -> None:
        """Tells the job how the ranks ended, and waits until that is on its way."""
        self._end = result
        self._has_ended.wait(30.0)
        if self.has_lost_job:
            self._thread.join()  # it ends the process

    def _watch(self) -> None:
        try:
            self._run()
        except Exception:  # ranks that nobody watches must end: they and the job no longer hear each other
            traceback.print_exc()
            self._kill()
            os._exit(1)

    def _run(self) -> None:
        last_heard, last_report, has_told_stop = time.monotonic(), 0.0, False
        while True:
            end = self._end  # before the ranks' last words are taken
            self._listen_to_ranks()
            for message in self._link.receive():
                last_heard = time.monotonic()
                self._obey(message)
            if end is not None:
                self._link.send({"ended": end})
                self._link.close()
                self._has_ended.set()
                return
            if not self._link.is_open or time.monotonic() - last_heard > self._lost_seconds:
                self._leave_lost_job()
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
        for values in self._pulse.receive():
            try:
                message = RankMessage.of(values)
            except ValueError:
                continue  # cut short, or of no rank of ours
            if message.beat is not None:
                self._beats[message.beat.rank] = (message.beat.as_beat(), time.monotonic())
            if message.bad_nodes is not None:
                self._link.send({"bad_nodes": message.bad_nodes})

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
        # Not only those that have told something: one that has just been started has not.
        for pid in self._family():
            _signal(pid, signal.SIGKILL)
        if not self._beats and not self.has_lost_job:
            os._exit(1)  # there is nothing to wait for

    def _leave_lost_job(self) -> NoReturn:
        """Ends the ranks here, and sends the job back to the queue if it is its first node that is lost.

        With --no-kill Slurm would leave such a job as it is, on the nodes that are left, until its time limit. Where
        only the batch script has ended, Slurm ends the job and signals this process; where the job has gone on without
        this node, it has begun another attempt.
        """
        self.has_lost_job = True
        self._kill()
        time.sleep(_JOB_SECONDS + 2.0 * self._node_rank)
        if self._newest_attempt_has_ended():
            time.sleep(_RESTART_SECONDS)  # the job may be waiting before it starts again
        job_id = os.environ.get("SLURM_JOB_ID")
        if job_id is not None and not self.is_stop_asked and self._is_newest_attempt():
            with contextlib.suppress(SlurmError):
                requeue(job_id)
        os._exit(1)

    def _is_newest_attempt(self) -> bool:
        attempts = self._attempts()
        return not attempts or self._logs.name == f"attempt-{attempts[-1].number:03d}"

    def _newest_attempt_has_ended(self) -> bool:
        return any(attempt.ended is not None for attempt in self._attempts()[-1:])

    def _attempts(self) -> list[Attempt]:
        try:
            return JobFile.read(self._logs.parents[1] / "job.json").attempts
        except (OSError, ValueError):
            return []


def folder_fault(folder: Path, nonce: str) -> str:
    """Says what is wrong with the run directory as this node sees it; empty: nothing."""
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while True:
        try:
            if (folder / "nonce").read_bytes() == nonce.encode():
                break
        except OSError:
            pass
        if time.monotonic() > deadline:
            return f"does not see {folder}, which the job has made: the run directory must be on a shared file system"
        time.sleep(0.5)
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"cannot write to {folder}"


def process_state(pid: int) -> str:
    """Returns a process's state as the kernel names it, such as `T (stopped)`; empty where there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("State:"):
                return line.split(":", 1)[1].strip()
    return ""


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):  # it has ended, and its number is another user's process perhaps
        os.kill(pid, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ranks of this node; returns 0 if all of them ended with 0."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    node_rank = int(os.environ.get("SLURM_PROCID", "0"))  # one task per node; SLURM_NODEID counts lost nodes too
    try:
        folder = _private_folder()
    except OSError as error:
        _report_unusable(arguments, node, f"has no room for a socket in /tmp: {error.strerror}")
        return 1
    with folder as path, contextlib.closing(PulseSocket(Path(path))) as pulse:
        watch = Watch(arguments, node, node_rank, pulse, partial(descendants, os.getpid()))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, watch.ask_to_stop)
        os.environ |= {
            PULSE_VARIABLE: pulse.address,
            STACKS_VARIABLE: str(arguments.logs),
            NODE_VARIABLE: node,
            DEVICE_VARIABLE: arguments.device,
            AGENT_VARIABLE: str(os.getpid()),
            # What NCCL was doing when ranks stopped hearing of each other: one file per rank, beside the logs.
            "TORCH_FR_DUMP_TEMP_FILE": f"{arguments.logs}/nccl-rank-",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{arguments.logs}/nccl-rank-",
        }
        with contextlib.suppress(ConfigError):  # which the ranks report
            set_device_environment(resolve(build_parser().parse_intermixed_args(arguments.training))[0], os.environ)
        bad_nodes = {node: fault} if (fault := folder_fault(arguments.logs, arguments.nonce)) else {}
        failures = [] if bad_nodes else _launch(arguments, node_rank)
        watch.ended(failures=failures, bad_nodes=bad_nodes)
    return 1 if failures or bad_nodes else 0


def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """Makes a folder for the ranks' socket on this node, with a short path: in memory where the disk is full.

    Raises:
        OSError: There is no room in either.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="mlra-scale-", dir="/tmp", ignore_cleanup_errors=True)
    except OSError:
        if not os.path.isdir("/dev/shm"):
            raise
        return tempfile.TemporaryDirectory(prefix="mlra-scale-", dir="/dev/shm", ignore_cleanup_errors=True)


def _greeting(node: str) -> dict[str, Any]:
    return {"node": node, "token": os.environ[TOKEN_VARIABLE], "pid": os.getpid(), "versions": versions()}


def _report_unusable(arguments: argparse.Namespace, node: str, fault: str) -> None:
    """Tells the job that this node cannot be used."""
    host, port = host_and_port(arguments.job)
    link = Link(host, port, _greeting(node))
    link.send({"ended": {"failures": [], "bad_nodes": {node: fault}}})
    link.close()


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
        # The others ask for a checkpoint here; torchrun would pass them on and kill after 30 s.
        signals_to_handle="SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "mlra_scale.cluster.rank", *arguments.training)
    except ChildFailedError as error:
        _print(str(error))
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
        _print(f"torchrun on {os.environ[NODE_VARIABLE]}: {type(error).__name__}: {error}")
        return [{"rank": None, "code": 1, "time": time.time(), "message": f"torchrun: {_text(str(error))}"}]
    return []


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # srun is gone; the job hears the same over its connection
        print(text, file=sys.stderr, flush=True)


def _text(message: Any) -> str:
    """One line of torchrun's word on a failure: a text, or what the rank left in its error file."""
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    return " ".join(str(text).split())[:500]


if __name__ == "__main__":
    sys.exit(main())
