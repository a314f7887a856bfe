"""The job of an hour of failures (schedule.py), and what is done to it: the kinds of faults."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults.case import flip
from tests.faults.fuse import FaultyDisk
from tests.faults.jobs import kill
from tests.faults.places import fill
from tests.faults.training import reported_checkpoints
from tests.slurm import keeper
from tests.slurm.cluster import SlurmCluster, wait_until
from tests.slurm.jobs import ENDLESS, Submitted, submit
from tests.support.training_runs import events

SCRIPT = "pretrain_zero3.sh"
OVERRIDES = (*ENDLESS, "cluster.hang_minutes=0.75", "checkpoint.keep_last=3")
PATIENCE = 900.0
"""Seconds until the run must have come back from a fault."""
CHECKPOINTS_BETWEEN = 2
"""New checkpoints before the next fault: failures in a row without one would rightly end the job."""
POLL = 0.3
"""Seconds between two looks at the run: what the times are exact to."""
PAUSE = 8.0
"""Seconds for which a rank is stopped, or the file system is frozen, without the loss of an attempt."""
OUTAGE = 30.0
"""Seconds for which the controller is stopped."""


@functools.cache
def faketime() -> Path | None:
    """libfaketime, as Debian's or pip's package of this name installs it, where Python can sleep under it.

    Under Debian 12's, 0.9.10, `time.sleep` of Python 3.11 fails with EINVAL.
    """
    places = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    if (found := importlib.util.find_spec("libfaketime")) is not None and found.origin is not None:
        places += Path(found.origin).parent.rglob("libfaketime.so.1")
    return next((place for place in places if _can_sleep(place)), None)


def _can_sleep(library: Path) -> bool:
    moved = os.environ | {"LD_PRELOAD": str(library), "FAKETIME": "+400d", "DONT_FAKE_MONOTONIC": "1"}
    command = [sys.executable, "-c", "import time; time.sleep(0.01)"]
    return subprocess.run(command, env=moved, capture_output=True, timeout=60).returncode == 0


def interpreter(switches: Path) -> Path:
    """Writes the interpreter of all nodes: that of these tests, in an environment that files in a folder change."""
    other = switches / "other" / "deepspeed-9.9.9.dist-info"
    if not other.exists():
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.9.9\n")
    path = switches / "python"
    path.write_text(
        "#!/bin/bash\n"
        f"if [[ -e {switches}/versions-$SLURMD_NODENAME ]]; then export PYTHONPATH={other.parent}:$PYTHONPATH; fi\n"
        f"if [[ -e {switches}/clock ]]; then\n"
        f'export FAKETIME="$(cat {switches}/clock)" DONT_FAKE_MONOTONIC=1 LD_PRELOAD={faketime()}\n'
        "fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


class Hour:
    """The job, its run, and what the faults do to them.

    Args:
        cluster: Of three nodes.
        place: A folder for everything.
        data: Prepared data.
        disk: The disk of the run directory, where it can be filled.
        frozen: The file system on that disk, where it can be frozen.
    """

    def __init__(
        self, cluster: SlurmCluster, place: Path, data: Path, disk: Path | None, frozen: FaultyDisk | None
    ) -> None:
        self.cluster, self.place, self.data, self.disk, self.frozen = cluster, place, data, disk, frozen
        self.run = (frozen.folder if frozen is not None else disk or place) / "run"
        self.switches = place / "switches"
        self.switches.mkdir()
        self.num_jobs = 0
        self.job = self.submit()

    def submit(self) -> Submitted:
        """Submits the job; the run directory is continued."""
        self.num_jobs += 1
        return submit(
            self.cluster,
            self.place / f"job-{self.num_jobs}",
            SCRIPT,
            *OVERRIDES,
            sbatch=("--nodes=2", "--time=2-0"),
            data=self.data,
            run=self.run,
            MLRA_PYTHON=str(interpreter(self.switches)),
        )

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Waits for something; the job may not end meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert not self.job.has_ended() or condition(), f"the job ended before {what}\n{self.tail()}"
            assert time.monotonic() < deadline, f"after {PATIENCE:.0f} s not: {what}\n{self.tail()}"
            time.sleep(POLL)

    def tail(self) -> str:
        """The end of the job's output."""
        return self.job.text()[-2000:]

    def num_attempts(self) -> int:
        """How often ranks were started."""
        return len(self.job.job_file()["attempts"]) if (self.run / "job.json").exists() else 0

    def num_trained(self, after: int) -> int:
        """How many attempts after the first ones have begun a step."""
        return sum(attempt["first_step_seconds"] is not None for attempt in self.job.job_file()["attempts"][after:])

    def be_ready(self) -> None:
        """Waits for new checkpoints."""
        wanted = len(reported_checkpoints(self.run)) + CHECKPOINTS_BETWEEN
        self.wait(lambda: len(reported_checkpoints(self.run)) >= wanted, f"{wanted} checkpoints")

    def rank_killed(self, node: str) -> None:
        self.job.signal_rank(node, signal.SIGKILL)

    def node_killed(self, node: str) -> None:
        self.cluster.kill_node(node)
        self.cluster.mark_down(node)

    def stopped(self, node: str) -> None:
        self.job.signal_rank(node, signal.SIGSTOP)
        time.sleep(PAUSE)
        self.job.signal_rank(node, signal.SIGCONT)

    def hung(self, node: str) -> None:
        self.job.signal_rank(node, signal.SIGSTOP)

    def agent_killed(self, node: str) -> None:
        kill(self.cluster, "mlra_scale.cluster.node", node)

    def job_killed(self, node: str) -> None:
        kill(self.cluster, "mlra_scale.cluster.job")
        wait_until(self.job.has_ended, PATIENCE, self.tail)
        self.job = self.submit()

    def at_time_limit(self, node: str) -> None:
        # The file asks for SIGUSR1 600 s before the time limit. From now on less is left; Slurm looks every 30 s.
        before, run_time = self.num_attempts(), self.cluster.job(self.job.job_id)["RunTime"].rpartition("-")[2]
        hours, minutes, _ = map(int, run_time.split(":"))
        self.update(f"TimeLimit={60 * hours + minutes + 9}")
        self.wait(lambda: self.num_attempts() > before, "a further attempt")
        self.update("TimeLimit=UNLIMITED")

    def update(self, change: str) -> None:
        """Changes the job's record in Slurm."""
        self.cluster.run("scontrol", "update", f"JobId={self.job.job_id}", change)

    def requeued(self, node: str) -> None:
        self.cluster.run("scontrol", "requeue", self.job.job_id)

    def preempted_twice(self, node: str) -> None:
        before = self.num_attempts()
        self.cluster.run("scancel", "--signal=TERM", self.job.job_id)
        self.wait(lambda: self.num_attempts() > before, "a further attempt")
        self.cluster.run("scancel", "--signal=TERM", self.job.job_id)

    def disk_full(self, node: str) -> None:
        before, number = len(self.job.text()), self.num_attempts()
        assert self.disk is not None
        file = fill(self.disk)
        try:
            # Only a save ends an attempt: the record waits for room. job.json may not tell, the output lies elsewhere.
            self.wait(lambda: f"attempt {number} ended" in self.job.text()[before:], "a save that failed")
        finally:
            file.unlink()
        assert "No space left on device" in self.job.text()[before:], "the reason is named"

    def frozen_files(self, node: str) -> None:
        assert self.frozen is not None
        self.frozen.freeze()
        try:
            time.sleep(PAUSE)
        finally:
            self.frozen.thaw()

    def checkpoint_damaged(self, node: str) -> None:
        newest = max((self.run / "checkpoints").glob("step-*"))
        flip(newest / "rank-00000.safetensors")
        before, known = self.num_attempts(), len(events(self.run))
        self.job.signal_rank(node, signal.SIGKILL)
        self.wait(lambda: self.num_trained(before), "an attempt that trains")
        since = events(self.run)[known:]
        named = any(newest.name in str(event) for event in since if event["event"] == "fallback")
        # A save that was under way may have completed a newer one just then.
        steps = [event["step"] for event in since if event["event"] == "resume"]
        assert named or steps[0] > int(newest.name[5:]), f"{newest.name} is damaged, resumed from {steps}"

    def without_controller(self, node: str) -> None:
        controller = self.cluster.processes("slurmctld")
        keeper.send(controller, signal.SIGSTOP)
        try:
            self.job.signal_rank(node, signal.SIGKILL)
            time.sleep(OUTAGE)
        finally:
            keeper.send(controller, signal.SIGCONT)

    def wrong_versions(self, node: str) -> None:
        (self.switches / f"versions-{node}").touch()
        before = self.num_attempts()
        try:
            self.job.signal_rank(node, signal.SIGKILL)
            self.wait(lambda: "bad_node" in self.job.ends()[before:], "the node is named")
        finally:
            (self.switches / f"versions-{node}").unlink()
        # The node is excluded while this job lives; a new one begins without exclusions, or no spare would be left.
        self.cluster.run("scancel", self.job.job_id)
        wait_until(self.job.has_ended, PATIENCE, self.tail)
        self.job = self.submit()

    def clock_moved(self, node: str) -> None:
        before = self.num_attempts()
        (self.switches / "clock").write_text("+400d")
        try:
            self.job.signal_rank(node, signal.SIGKILL)
            self.wait(lambda: self.num_trained(before), "an attempt that trains, in the future")
        finally:
            (self.switches / "clock").unlink()
        # And back again.
        self.job.signal_rank(node, signal.SIGKILL)

    def mend(self) -> None:
        """Puts right what a fault that was not survived has left, and sees that the job trains."""
        if self.frozen is not None:
            self.frozen.thaw()
        self.cluster.start_nodes(3)
        for node in ("n1", "n2", "n3"):
            keeper.send(self.job.rank_pids(node), signal.SIGCONT)
        if self.job.has_ended():
            self.job = self.submit()


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        done: What is done, in words.
        act: Does it to the job; gets a node of it.
        costs_attempt: Whether it ends an attempt, after which another one must train; else it may not.
        needs: "", "disk" or "fuse" for the run directory, or "faketime".
        is_again: Whether it ends with a fault of its own, after which an attempt must train once more.
    """

    done: str
    act: Callable[[Hour, str], None]
    costs_attempt: bool = True
    needs: str = ""
    is_again: bool = False


KINDS: Mapping[str, Kind] = {
    "rank kill": Kind("SIGKILL of a rank", Hour.rank_killed),
    "node kill": Kind("a node and all its processes are gone", Hour.node_killed),
    "stop": Kind(f"SIGSTOP of a rank, SIGCONT after {PAUSE:.0f} s", Hour.stopped, costs_attempt=False),
    "hang": Kind("SIGSTOP of a rank without end", Hour.hung),
    "agent kill": Kind("SIGKILL of the agent of a node", Hour.agent_killed),
    "job kill": Kind("SIGKILL of the job's process, and a new job", Hour.job_killed),
    "time limit": Kind("Slurm's signal before the time limit", Hour.at_time_limit),
    "requeue": Kind("scontrol requeue", Hour.requeued),
    "preemption twice": Kind("SIGTERM, and again as soon as the job is back", Hour.preempted_twice),
    "full disk": Kind("the tmpfs of the run is full until an attempt has failed", Hour.disk_full, needs="disk"),
    "frozen files": Kind(
        f"no access is answered for {PAUSE:.0f} s", Hour.frozen_files, costs_attempt=False, needs="fuse"
    ),
    "damaged checkpoint": Kind("a bit of the newest one flips, SIGKILL of a rank", Hour.checkpoint_damaged),
    "no controller": Kind(f"SIGKILL of a rank, slurmctld stopped for {OUTAGE:.0f} s", Hour.without_controller),
    "wrong versions": Kind("a node has another DeepSpeed; then a new job", Hour.wrong_versions),
    "moved clock": Kind("ranks restart 400 days later, and back", Hour.clock_moved, needs="faketime", is_again=True),
}
CHEAP = ("rank kill", "stop", "agent kill", "job kill", "damaged checkpoint", "requeue")
"""Kinds of the nightly test: no long waits, and no rights that a user lacks."""
