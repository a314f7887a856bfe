"""A real Slurm cluster on one machine, for tests: its own munged, one slurmctld and several slurmd.

Nothing outside a given directory is touched, no running munge or Slurm is used, and every process belongs to a keeper
(``keeper.py``), so that a node can be killed like a machine and nothing is left at the end. Nodes claim 64 CPUs and
8 GPUs each, without any behind them, so that scripts for real machines are accepted and several jobs share a node.
"""

import getpass
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType

from tests.slurm import keeper

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
# Daemons are not in a user's PATH everywhere.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin"])
MAX_NODES = 16  # defined in the configuration; only those that were started answer
NODE_HARDWARE = "CPUs=64 RealMemory=1000000 Gres=gpu:8"
SOCKET_PATH_LIMIT = 107
NODE_STATES = ("sinfo", "--Node", "--noheader", "--format=%N %T")
FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"})

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is how long a requeued job waits before it starts again (120 s unless set).
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
# No cgroups, no accounting, no MPI: none of it is there on an arbitrary machine.
# All processes of a step get every signal. With cgroup, as on most machines, only the batch script and the tasks
# themselves do, and all get SIGKILL.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
# Memory is given out too, and a job that asks for none gets the partition's default, as on most clusters.
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout=15
MessageTimeout=10
InactiveLimit=0
# A finished job can be looked at for as long as the tests run.
MinJobAge=36000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_resolution=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def slurm_missing() -> str | None:
    """Why Slurm cannot run here, or None where it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm's daemons need Linux"
    missing = [name for name in BINARIES if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        return "not installed: " + ", ".join(missing)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return "the user has no name, which munge and Slurm need"
    # Without support for several slurmd on one host the option is unknown (and the program ends with an error).
    options = subprocess.run([_binary("slurmd"), "-h"], capture_output=True, text=True, timeout=30, check=False)
    if "-N node" not in options.stdout + options.stderr:
        return "this slurmd was built without --enable-multiple-slurmd"
    return None


def _binary(name: str) -> str:
    path = shutil.which(name, path=SEARCH_PATH)
    if path is None:
        raise FileNotFoundError(name)
    return path


def _is_daemon(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith(("slurm", "munge"))
    except OSError:  # it has ended meanwhile
        return True


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the range from which the kernel gives out ports by itself."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(12000, 32000), 4000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


def _node_states(text: str) -> dict[str, str]:
    return {name: state for name, _, state in (line.partition(" ") for line in text.splitlines())}


def wait_until(condition: Callable[[], bool], timeout: float, what: Callable[[], str]) -> None:
    """Polls until the condition holds; a TimeoutError says what was there instead."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout:.0f} s: {what()}")
        time.sleep(0.1)


def parse_record(line: str) -> dict[str, str]:
    """The fields of a line of ``scontrol --oneliner show``; values may hold blanks and equals signs."""
    fields = re.findall(r"(?:^|(?<=\s))([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", line.strip())
    return dict(fields)


class SlurmCluster:
    """A cluster with nodes n1, n2, ...; use it as a context manager.

    Args:
        directory: an empty directory of its own, with a path short enough for sockets.
        nodes: how many nodes run from the start.
        kill_wait: seconds between SIGTERM and SIGKILL where Slurm ends a job.
    """

    def __init__(self, directory: Path, nodes: int = 3, kill_wait: int = 20) -> None:
        self.directory = directory.resolve()
        self.environment = {"SLURM_CONF": str(self.directory / "slurm.conf")}
        self._first_nodes = nodes
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: set[str] = set()
        longest = self.directory / f"spool.n{MAX_NODES}" / f"n{MAX_NODES}_1000.4294967295"
        if len(str(longest)) > SOCKET_PATH_LIMIT:
            raise ValueError(f"the path of {self.directory} is too long for Slurm's sockets")
        ports = _free_ports(MAX_NODES + 1)
        host = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {NODE_HARDWARE}"
            + ("" if number <= nodes else " State=DOWN")
            for number, port in enumerate(ports[1:], start=1)
        ]
        self._configuration = CONFIGURATION.format(
            host=host,
            controller_port=ports[0],
            user=getpass.getuser(),
            directory=self.directory,
            kill_wait=kill_wait,
            nodes="\n".join(lines),
            names=f"n[1-{MAX_NODES}]",
        )

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start_cluster()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_cluster(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "state").mkdir()
        (self.directory / "slurm.conf").write_text(self._configuration)
        # slurmd drops a GPU without a device file; any device will do, since nothing confines jobs to theirs.
        for index in range(8):
            (self.directory / f"gpu{index}").symlink_to("/dev/null")
        (self.directory / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.directory}/gpu[0-7]\n")
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        munge_socket = self.directory / "munge.socket"
        options = [f"--{use}-file={self.directory}/munge.{use}" for use in ("key", "pid", "log", "seed")]
        # --force: a directory that only this user may enter is an error otherwise.
        self._keep("munged", "--foreground", "--force", f"--socket={munge_socket}", *options)
        wait_until(munge_socket.exists, 30, lambda: self._log("munge"))
        self._keep("slurmctld", "-D", "-i")
        self.start_nodes(self._first_nodes)

    def _keep(self, name: str, *arguments: str, node: str | None = None) -> None:
        """Starts a daemon in the foreground below a keeper of its own."""
        command = [sys.executable, "-I", keeper.__file__, _binary(name), *arguments]
        with open(self.directory / f"{node or name}.output", "ab") as output:
            self._keepers[node or name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self.process_environment(),
                start_new_session=True,  # a signal to the test run's process group is not for the keeper
            )

    def _end(self, name: str) -> None:
        """Lets a keeper kill all that it keeps."""
        process = self._keepers.pop(name, None)
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            keeper.send([*keeper.descendants(process.pid), process.pid], signal.SIGKILL)
            process.wait(timeout=30)

    def _log(self, name: str) -> str:
        """The last lines of a daemon's output and log."""
        texts = [path.read_text(errors="replace") for path in sorted(self.directory.glob(f"*{name}.*[gt]"))]
        return "\n".join(line for text in texts for line in text.splitlines()[-15:])

    def stop(self) -> None:
        """Kills every process of the cluster and of its jobs, and no other; may be called twice."""
        # Nodes first: jobs then see a dead machine rather than a dead controller.
        for name in [name for name in self._keepers if name not in ("slurmctld", "munged")]:
            self._end(name)
        self._end("slurmctld")
        self._end("munged")

    def process_environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment for a command on the cluster, without variables of an outer Slurm and of wandb."""
        outer = re.compile(r"(WANDB|SLURM|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SCANCEL|SCONTROL|MUNGE)[A-Z]*_")
        kept = {name: value for name, value in os.environ.items() if not outer.match(name)}
        return kept | {"PATH": SEARCH_PATH} | self.environment | dict(extra or {})

    def run(
        self,
        *command: str,
        timeout: float = 60,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as a user of the cluster; a failure raises with the command's output unless check is off."""
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env=self.process_environment(env),
            cwd=cwd or self.directory,
            check=False,
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def query(self, *command: str) -> str:
        """The output of a command that changes nothing, tried again: about one call in thousands loses its answer."""
        for _ in range(2):
            result = self.run(*command, check=False)
            if result.returncode == 0:
                return result.stdout
            time.sleep(0.5)
        return self.run(*command).stdout

    def sbatch(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submits a job and returns its number."""
        return self.run("sbatch", "--parsable", *arguments, env=env, cwd=cwd).stdout.strip().partition(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by its own names: JobState, Restarts, NodeList, ExitCode, ..."""
        return parse_record(self.query("scontrol", "--oneliner", "show", "job", job_id))

    def wait_for(self, job_id: str, states: str | Collection[str], timeout: float = 60) -> dict[str, str]:
        """Waits until the job is in one of the states, and returns its record.

        A final state that was not waited for is an AssertionError at once.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        while True:
            record = self.job(job_id)
            if record["JobState"] in wanted:
                return record
            if record["JobState"] in FINAL_STATES:
                raise AssertionError(f"job {job_id} is {record['JobState']}, not {sorted(wanted)}: {record}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is not {sorted(wanted)} after {timeout} s: {record}")
            time.sleep(0.2)

    def cancel_all(self, timeout: float = 60) -> None:
        """Ends all jobs, without the time to clean up that a cancelled job has, and waits until the queue is empty."""
        self.run("scancel", f"--user={getpass.getuser()}")
        # A job is completing until its dead node is DOWN.
        for node in self._killed:
            self.mark_down(node)
        queue = [""]

        def is_empty() -> bool:
            # Slurm has no such command (a KILL sent with scancel starts with TERM); its own daemons must live on.
            for node in list(self._keepers):
                keeper.send([pid for pid in self.processes(node) if not _is_daemon(pid)], signal.SIGKILL)
            queue[0] = self.query("squeue", "--noheader", "--format=%i %T %N").strip()
            return not queue[0]

        wait_until(is_empty, timeout, lambda: f"jobs are left: {queue[0]}")

    def processes(self, node: str) -> list[int]:
        """Every process of a running node: slurmd, step daemons, and the jobs' processes."""
        return keeper.descendants(self._keepers[node].pid) if node in self._keepers else []

    def kill_node(self, node: str) -> None:
        """A machine that fails: slurmd, its steps and all their processes are gone at once.

        The kernel closes its sockets, which a machine without power does not do. Slurm finds it out after 25 s or more,
        unless mark_down tells it. A node that comes back before is no reboot to Slurm, and the jobs that it ran stay
        RUNNING without a process.
        """
        self._end(node)
        self._killed.add(node)

    def mark_down(self, node: str) -> None:
        """Tells Slurm now that a killed node is DOWN."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def start_nodes(self, number: int, timeout: float = 60) -> None:
        """Starts those of n1, n2, ... that do not run, and waits until jobs can run on all of them."""
        nodes = [f"n{index + 1}" for index in range(number)]
        for node in nodes:
            if node not in self._keepers:
                self._keep("slurmd", "-D", "-N", node, node=node)
                self._killed.discard(node)
        states: dict[str, str] = {}

        def are_up() -> bool:
            # The controller itself may just be starting.
            states.update(_node_states(self.run(*NODE_STATES, check=False).stdout))
            return all(states.get(node) in ("idle", "mixed", "allocated", "completing") for node in nodes)

        wait_until(are_up, timeout, lambda: f"{states}\n{self._log('slurmctld')}\n{self._log(nodes[0])}")
