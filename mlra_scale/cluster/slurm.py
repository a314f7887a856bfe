"""What a job asks of Slurm and tells it, through its own commands."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlra_scale.config import ConfigError, Problem

_PATIENCE_SECONDS, _SECONDS_BETWEEN = 300.0, 2.0
_PASSING = (
    *("Unable to contact", "timed out", "Connection refused", "Connection reset", "Communication", "Zero Bytes"),
    *("temporarily", "exit code -", "DB index is being set"),
)
"""What Slurm's commands say when its controller is busy or being restarted, or still at work on the job."""


class SlurmError(RuntimeError):
    """A command of Slurm failed; the text is what it said."""


@dataclass(frozen=True)
class Allocation:
    """The job as Slurm describes it to its batch script.

    Attributes:
        job_id: Its number.
        name: Its name.
        nodes: Names of its nodes, in Slurm's order; the batch script runs on the first.
        here: The node that this process runs on.
        num_requeues: How often it was started before.
    """

    job_id: str
    name: str
    nodes: tuple[str, ...]
    here: str
    num_requeues: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Allocation:
        """Reads the environment of a batch script.

        Raises:
            ConfigError: This is no Slurm job.
        """
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if name not in environment]
        if missing:
            remedy = "this is no Slurm job; submit slurm/*.sh with sbatch, or start python -m mlra_scale.train yourself"
            raise ConfigError([Problem(name, None, remedy) for name in missing])
        nodes = hostnames(environment["SLURM_JOB_NODELIST"])
        return cls(
            job_id=environment["SLURM_JOB_ID"],
            name=environment.get("SLURM_JOB_NAME", "mlra-scale"),
            nodes=tuple(nodes),
            here=environment.get("SLURMD_NODENAME", nodes[0]),
            num_requeues=int(environment.get("SLURM_RESTART_COUNT", "0")),
        )


def hostnames(node_list: str) -> list[str]:
    """Expands a node list such as n[1-3,7]."""
    return _ask("scontrol", "show", "hostnames", node_list).split()


def address(node: str) -> str:
    """Returns the address at which other nodes reach a node, as Slurm knows it."""
    fields = _fields(_ask("scontrol", "--oneliner", "show", "node", node))
    return fields.get("NodeAddr", node)


def job_fields(job_id: str) -> dict[str, str]:
    """Returns what Slurm knows of a job: JobState, Reason, Restarts, ..."""
    return _fields(_ask("scontrol", "--oneliner", "show", "job", job_id))


def requeue(job_id: str) -> None:
    """Sends a job back to the queue; Slurm then ends this batch script.

    Raises:
        SlurmError: It refuses; the job was submitted with --no-requeue, for example.
    """
    _ask("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Adds nodes to those that a job in the queue must not get."""
    before = job_fields(job_id).get("ExcNodeList", "(null)")
    all_nodes = set(nodes) | set([] if before == "(null)" else hostnames(before))
    _ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(sorted(all_nodes))}")


def jobs_of_user() -> dict[str, tuple[str, str]]:
    """Returns Slurm's state and reason of each job of this user that it still knows.

    Raises:
        SlurmError: It does not answer.
    """
    # Not --jobs: one job that Slurm does not know any more makes squeue fail. %A is what a job of an array finds in
    # SLURM_JOB_ID, and --all shows the partitions that are hidden otherwise.
    answer = _ask("squeue", "--noheader", "--me", "--all", "--states=all", "--format=%A %T %r", patience=0.0)
    words = [line.split(maxsplit=2) for line in answer.splitlines()]
    return {line[0]: (line[1], line[2] if len(line) > 2 else "") for line in words if len(line) > 1}


def shrink(job_id: str, nodes: Sequence[str]) -> None:
    """Gives back all nodes of a running job but these.

    Slurm would not queue a job again before it has given up on every node of it that is dead, which takes minutes; and
    22.05 then lets it start without its GPUs.
    """
    # It leaves a script for the job's shell in the current directory.
    with tempfile.TemporaryDirectory() as folder:
        _ask("scontrol", "update", f"JobId={job_id}", f"NodeList={','.join(nodes)}", folder=folder)


def is_given_up(node: str) -> bool:
    """Returns whether Slurm has noticed that a node does not answer, and gives it to no job any more."""
    state = _fields(_ask("scontrol", "--oneliner", "show", "node", node)).get("State", "")
    return "*" in state or "DOWN" in state or "NOT_RESPONDING" in state


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment for srun without what Slurm said of the allocation when the job began.

    srun takes these for options, and refuses them once a node is lost.
    """
    dropped = {"NTASKS", "NPROCS", "NNODES", "NODELIST", "NTASKS_PER_NODE", "TASKS_PER_NODE", "DISTRIBUTION"}
    dropped |= {"JOB_NUM_NODES", "JOB_NODELIST", "JOB_CPUS_PER_NODE", "GPUS"}
    names = {f"SLURM_{name}" for name in dropped}
    return {name: value for name, value in environment.items() if name not in names}


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _ask(*command: str, folder: str | None = None, patience: float | None = None) -> str:
    """Runs a command of Slurm, again and again for a while where its controller does not answer."""
    deadline = time.monotonic() + (_PATIENCE_SECONDS if patience is None else patience)
    while True:
        try:
            return _ask_once(command, folder)
        except SlurmError as error:
            is_passing = any(word in str(error) for word in _PASSING)
            if not is_passing or time.monotonic() > deadline:
                raise
        time.sleep(_SECONDS_BETWEEN)


def _ask_once(command: Sequence[str], folder: str | None) -> str:
    # Filters and formats that a user has set would change what is parsed here.
    set_by_user = ("SCONTROL_", "SQUEUE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(set_by_user)}
    try:
        result = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{' '.join(command)}: {error}") from error
    if result.returncode != 0:
        said = " ".join((result.stderr.strip() or result.stdout.strip()).split())
        raise SlurmError(f"{' '.join(command)}: {said or f'exit code {result.returncode}'}")
    return result.stdout
