"""What a job asks of Slurm and tells it, through its own commands."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlra_scale.config import ConfigError, Problem

_PATIENCE_SECONDS, _SECONDS_BETWEEN = 300.0, 2.0
_PASSING = (
    *("Unable to contact", "timed out", "Connection refused", "Connection reset", "Communication", "Zero Bytes"),
    *("temporarily", "exit code -", "DB index is being set"),
)
"""What Slurm's commands say when its controller is busy or being restarted, or still at work on the job."""

_SLURMS_PREFIXES = (
    *("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "SCONTROL_", "SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_"),
    "PMI_",
)
_NAMES_THE_JOB = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_WORKING_CLUSTER", "SLURM_JWT")
"""Where the controller is, which job this is, and the key to it where munge is not used."""


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
    def of(cls, environment: Mapping[str, str], is_stop_asked: Callable[[], bool] = lambda: False) -> Allocation:
        """Reads the environment of a batch script.

        Args:
            environment: Of the batch script.
            is_stop_asked: See `_ask`.

        Raises:
            ConfigError: This is no Slurm job.
            SlurmError: Slurm does not say what job it is.
        """
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if name not in environment]
        if missing:
            remedy = "this is no Slurm job; submit slurm/*.sh with sbatch, or start python -m mlra_scale.train yourself"
            raise ConfigError([Problem(name, None, remedy) for name in missing])
        job_id = environment["SLURM_JOB_ID"]
        nodes = hostnames(environment["SLURM_JOB_NODELIST"], is_stop_asked)
        return cls(
            job_id=job_id,
            name=environment.get("SLURM_JOB_NAME", "mlra-scale"),
            nodes=tuple(nodes),
            here=environment.get("SLURMD_NODENAME", nodes[0]),
            # SLURM_RESTART_COUNT is set where it is not 0 only: a job that is submitted from a requeued one has its.
            num_requeues=number_of_restarts(job_fields(job_id, is_stop_asked)),
        )


def hostnames(node_list: str, is_stop_asked: Callable[[], bool] = lambda: False) -> list[str]:
    """Expands a node list such as n[1-3,7]."""
    return _ask("scontrol", "show", "hostnames", node_list, is_stop_asked=is_stop_asked).split()


def address(node: str, is_stop_asked: Callable[[], bool] = lambda: False) -> str:
    """Returns the address at which other nodes reach a node, as Slurm knows it."""
    fields = _fields(_ask("scontrol", "--oneliner", "show", "node", node, is_stop_asked=is_stop_asked))
    return fields.get("NodeAddr", node)


def job_fields(job_id: str, is_stop_asked: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """Returns what Slurm knows of a job: JobState, Reason, Restarts, ..."""
    return _fields(_ask("scontrol", "--oneliner", "show", "job", job_id, is_stop_asked=is_stop_asked))


def number_of_restarts(fields: Mapping[str, str]) -> int:
    """Returns how often a job was queued again, from its fields."""
    value = fields.get("Restarts", "0")
    return int(value) if value.isdecimal() else 0


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
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            _ask("scontrol", "update", f"JobId={job_id}", f"NodeList={','.join(nodes)}", folder=folder)
    except OSError as error:
        raise SlurmError(f"no temporary folder can be made: {error.strerror}") from error


def is_given_up(node: str) -> bool:
    """Returns whether Slurm has noticed that a node does not answer, and gives it to no job any more."""
    state = _fields(_ask("scontrol", "--oneliner", "show", "node", node)).get("State", "")
    return "*" in state or "DOWN" in state or "NOT_RESPONDING" in state


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment for Slurm's commands with none of Slurm's variables but those that name the job.

    srun takes most of these variables for options. Some describe the allocation as it was when the job began, and srun
    refuses them once a node is lost. Others belong to the shell that the job was submitted from, which may be inside
    another job (salloc): its memory, tasks per GPU and CPU binding are not those of this job. The options of a step
    are given on its command line instead. srun sets the variables of a step for its tasks anew.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in _NAMES_THE_JOB or not name.startswith(_SLURMS_PREFIXES)
    }


def step_command(nodes: Sequence[str], memory: str, cpu_bind: str, more: Sequence[str]) -> list[str]:
    """Returns the beginning of a command line that runs one task on each of some nodes of this job.

    A step without --cpus-per-task has all cores of the job on its nodes, and without --gres all its GPUs.

    Args:
        nodes: Their names, in the order of the tasks' ranks.
        memory: Of the task on each node; 0: all that the job has there.
        cpu_bind: The tasks' binding to cores.
        more: Further options; they win over those above.
    """
    number = str(len(nodes))
    command = [
        "srun",
        f"--nodes={number}",
        f"--ntasks={number}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(nodes)}",
    ]
    command += [f"--mem={memory}", f"--cpu-bind={cpu_bind}", "--overlap", "--input=none", "--export=ALL"]
    return [*command, *more]


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _ask(
    *command: str,
    folder: str | None = None,
    patience: float | None = None,
    is_stop_asked: Callable[[], bool] = lambda: False,
) -> str:
    """Runs a command of Slurm, again and again for a while where its controller does not answer.

    Args:
        command: Its words.
        folder: Where it runs; None: here.
        patience: Seconds for which it is repeated.
        is_stop_asked: Whether a signal has asked for a stop: it is then not repeated. The way back to the queue, which
            follows a stop, needs its answers all the same and does not give this.

    Raises:
        SlurmError: It failed.
    """
    deadline = time.monotonic() + (_PATIENCE_SECONDS if patience is None else patience)
    while True:
        try:
            return _ask_once(command, folder)
        except SlurmError as error:
            is_passing = any(word in str(error) for word in _PASSING)
            if not is_passing or time.monotonic() > deadline or is_stop_asked():
                raise
        time.sleep(_SECONDS_BETWEEN)


def _ask_once(command: Sequence[str], folder: str | None) -> str:
    try:
        result = subprocess.run(
            command,
            # Filters, formats and clusters that a user has set would change what is asked and parsed here.
            env=slurm_environment(os.environ),
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
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
