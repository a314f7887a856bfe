"""The way back to the queue: what is asked of Slurm when a job shall go on later, on other nodes perhaps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from mlra_scale.cluster import slurm

_GIVEN_UP_SECONDS = 30.0
"""How long Slurm is given to notice that a node is dead; until then it would give it to the job again."""


@dataclass(frozen=True)
class EndedBySlurm:
    """A job that Slurm is ending already.

    Attributes:
        name: Slurm's name of its state.
        is_queued_again: Whether it will be started again: requeued by Slurm itself, or by hand.
    """

    name: str
    is_queued_again: bool


def ended_by_slurm(allocation: slurm.Allocation) -> EndedBySlurm | None:
    """Returns how Slurm is ending the job; None: it is not.

    Raises:
        SlurmError: Slurm does not say.
    """
    fields = slurm.job_fields(allocation.job_id)
    if fields.get("JobState") in ("RUNNING", "TIMEOUT"):
        return None
    has_requeued = slurm.number_of_restarts(fields) > allocation.num_requeues
    # While its processes end, a job in the queue and a cancelled one are both COMPLETING, also where it was cancelled
    # after it had been queued again; only that of one which will not run any more has an end that is past.
    return EndedBySlurm(fields.get("JobState", "unknown"), has_requeued and not _is_past(fields.get("EndTime", "")))


def _is_past(time: str) -> bool:
    """Returns whether a time of Slurm's is past; that of a job in the queue is at least a minute ahead, or Unknown."""
    try:
        return datetime.fromisoformat(time) < datetime.now() + timedelta(seconds=30)
    except ValueError:
        return False


def put_back(
    allocation: slurm.Allocation,
    lost: Collection[str],
    usable: Sequence[str],
    excluded: Collection[str],
    say: Callable[[str], None],
) -> None:
    """Puts the job back into the queue; Slurm then ends this process's batch script.

    Args:
        allocation: The job.
        lost: Nodes of it that are dead.
        usable: Those that can still be used.
        excluded: Nodes that it must not get again.
        say: Tells the user something.

    Raises:
        SlurmError: Slurm refuses.
    """
    if lost:
        _give_back(allocation.job_id, lost, usable, say)
    slurm.requeue(allocation.job_id)
    if excluded:
        try:
            slurm.exclude(allocation.job_id, list(excluded))
        except slurm.SlurmError as error:
            say(f"Slurm may give the bad nodes to the job again ({error})")


def _give_back(job_id: str, lost: Collection[str], usable: Sequence[str], say: Callable[[str], None]) -> None:
    """Frees the job of nodes that are dead, for which it would have to wait, and sees that it gets them no more."""
    try:
        slurm.shrink(job_id, usable)
    except slurm.SlurmError as error:
        say(f"the lost node stays in the job until Slurm has given it up ({error})")
        return
    deadline = time.monotonic() + _GIVEN_UP_SECONDS
    with contextlib.suppress(slurm.SlurmError):
        while time.monotonic() < deadline and not all(map(slurm.is_given_up, lost)):
            time.sleep(1.0)
