"""What a job asks of Slurm and orders from it, by Slurm's own commands, and how it starts and ends a step."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from mlra_scale.config import ConfigError, Problem

_PATIENCE_SECONDS, _SECONDS_BETWEEN = 300.0, 2.0
_GIVEN_UP_SECONDS = 30.0
"""How long Slurm may take to notice that a node is dead; until then it would give it to the job again."""
_PASSING = (
    *("Unable to contact", "timed out", "Connection refused", "Connection reset", "Communication", "Zero Bytes"),
    *("temporarily", "exit code -", "DB index is being set"),
)
"""Words of Slurm's commands when its controller is busy, is being restarted, or still works on the job."""
_SLURMS_PREFIXES = (
    *("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "SCONTROL_", "SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_"),
    "PMI_",
)
_NAMES_THE_JOB = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_WORKING_CLUSTER", "SLURM_JWT")
"""Where the controller is, which job this is, and the key to it where munge is not used."""


class SlurmError(RuntimeError):
    """A command of Slurm failed; the text is what it printed."""


def _never() -> bool:
    return False


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
    def of(cls, environment: Mapping[str, str], is_stop_asked: Callable[[], bool] = _never) -> Allocation:
        """Reads the environment of a batch script.

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
            # Not SLURM_RESTART_COUNT: a job that was submitted from inside another one has that of the other.
            num_requeues=_number_of_restarts(show("job", job_id, is_stop_asked)),
        )


def hostnames(node_list: str, is_stop_asked: Callable[[], bool] = _never) -> list[str]:
    """Expands a node list such as n[1-3,7]."""
    return _ask("scontrol", "show", "hostnames", node_list, is_stop_asked=is_stop_asked).split()


def address(node: str, is_stop_asked: Callable[[], bool] = _never) -> str:
    """Returns the address at which other nodes reach a node, as Slurm knows it."""
    return show("node", node, is_stop_asked).get("NodeAddr", node)


def show(kind: Literal["job", "node"], name: str, is_stop_asked: Callable[[], bool] = _never) -> dict[str, str]:
    """Returns what Slurm knows of a job or a node: JobState, Restarts, NodeAddr, ..."""
    line = _ask("scontrol", "--oneliner", "show", kind, name, is_stop_asked=is_stop_asked)
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _number_of_restarts(fields: Mapping[str, str]) -> int:
    value = fields.get("Restarts", "0")
    return int(value) if value.isdecimal() else 0


def jobs_of_user() -> dict[str, tuple[str, str]]:
    """Returns Slurm's state and reason of each job of this user that it still knows, by number."""
    # Not --jobs: one job that Slurm does not know any more makes squeue fail. %A is what a job of an array finds in
    # SLURM_JOB_ID, and --all shows the partitions that are hidden otherwise.
    answer = _ask("squeue", "--noheader", "--me", "--all", "--states=all", "--format=%A %T %r", patience=0.0)
    words = [line.split(maxsplit=2) for line in answer.splitlines()]
    return {line[0]: (line[1], line[2] if len(line) > 2 else "") for line in words if len(line) > 1}


def how_slurm_ends_it(allocation: Allocation) -> Literal["requeued", "cancelled"] | None:
    """Returns how Slurm is ending the job already, and whether it will start it again; None: it is not ending it."""
    fields = show("job", allocation.job_id)
    if fields.get("JobState") in ("RUNNING", "TIMEOUT"):
        return None
    # While its processes end, a job in the queue and a cancelled one are both COMPLETING, also where it was cancelled
    # after it had been queued again. Only the end time of one that will not run any more is past: that of a job in the
    # queue is at least a minute ahead, or Unknown.
    is_over = False
    with contextlib.suppress(ValueError):
        is_over = datetime.fromisoformat(fields.get("EndTime", "")) < datetime.now() + timedelta(seconds=30)
    has_restarted = _number_of_restarts(fields) > allocation.num_requeues
    return "requeued" if has_restarted and not is_over else "cancelled"


def put_back(
    allocation: Allocation,
    lost: Collection[str],
    usable: Sequence[str],
    excluded: Collection[str],
    say: Callable[[str], None],
) -> None:
    """Puts the job back into the queue; Slurm then ends this process's batch script.

    Args:
        allocation: The job.
        lost: Nodes of it that are dead.
        usable: Nodes of it that can still be used.
        excluded: Nodes that it must not get again.
        say: Prints a line for the user.

    Raises:
        SlurmError: Slurm refuses it, as for a job that was submitted with --no-requeue.
    """
    if lost:
        # Slurm would queue the job again only after it has given up on every dead node of it, which takes minutes, and
        # Slurm 22.05 would then start it without its GPUs.
        try:
            shrink(allocation.job_id, usable)
            deadline = time.monotonic() + _GIVEN_UP_SECONDS
            with contextlib.suppress(SlurmError):
                while time.monotonic() < deadline and not all(map(is_given_up, lost)):
                    time.sleep(1.0)
        except (SlurmError, OSError) as error:
            say(f"the lost node stays in the job until Slurm has given it up ({error})")
    requeue(allocation.job_id)
    if excluded:
        try:
            exclude(allocation.job_id, list(excluded))
        except SlurmError as error:
            say(f"Slurm may give the bad nodes to the job again ({error})")


def requeue(job_id: str) -> None:
    """Sends a job back to the queue."""
    _ask("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Adds nodes to those that a job in the queue must not get."""
    before = show("job", job_id).get("ExcNodeList", "(null)")
    all_nodes = set(nodes) | set([] if before == "(null)" else hostnames(before))
    _ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(sorted(all_nodes))}")


def shrink(job_id: str, nodes: Sequence[str]) -> None:
    """Gives back all nodes of a running job but these."""
    # scontrol leaves a script for the job's shell in the current directory.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _ask("scontrol", "update", f"JobId={job_id}", f"NodeList={','.join(nodes)}", folder=folder)


def is_given_up(node: str) -> bool:
    """Returns whether Slurm has noticed that a node does not answer, and gives it to no job any more."""
    state = show("node", node).get("State", "")
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
    """Returns the beginning of a command line that runs one task on each of some nodes of this job, in their order.

    `memory` (0: all that the job has there) and `cpu_bind` are the task's, as srun takes them; the options in `more`
    win. A step without --cpus-per-task has all cores of the job on its nodes, and without --gres all its GPUs.
    """
    command = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    command += [f"--nodelist={','.join(nodes)}", f"--mem={memory}", f"--cpu-bind={cpu_bind}"]
    return [*command, "--overlap", "--input=none", "--export=ALL", *more]


def end_process(process: subprocess.Popen[Any], seconds: float) -> None:
    """Ends a child, by force if it takes longer than so many seconds; one that has ended already is left alone."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ask(
    *command: str,
    folder: str | None = None,
    patience: float | None = None,
    is_stop_asked: Callable[[], bool] = _never,
) -> str:
    """Runs a command of Slurm in a folder, and repeats it for `patience` seconds while the controller does not answer.

    A stop that is asked for ends the repeating. The way back to the queue, which follows a stop, needs its answers: it
    does not pass `is_stop_asked`.
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
        printed = " ".join((result.stderr.strip() or result.stdout.strip()).split())
        raise SlurmError(f"{' '.join(command)}: {printed or f'exit code {result.returncode}'}")
    return result.stdout
