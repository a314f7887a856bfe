"""What a job does when an attempt has ended: a pure function, so that every case is a line in a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

EndKind = Literal[
    "done",  # all steps are done
    "bad_input",  # the message says what to change
    "non_finite",  # running again gives the same end
    "unstable",  # the guard has given up
    "preempted",  # a signal asked for it; a checkpoint was saved if `reason` does not deny it
    "bad_node",  # the checks before the first step named a node
    "lost_node",  # a node was heard no more
    "hung",  # no progress
    "failed",  # a rank ended with an error or was killed
]
Action = Literal["finish", "fail", "requeue", "restart"]

RETRIED: tuple[EndKind, ...] = ("bad_node", "lost_node", "hung", "failed")
"""Ends that count as failures."""
_WAITS = (0.0, 0.0, 60.0, 300.0)
"""Seconds before a restart, by the number of failures in a row."""


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
        kind: Of what kind.
        reason: In words, naming rank and node where they are known.
        has_progressed: Whether a checkpoint was completed in it.
        bad_nodes: Nodes that must not be used again, by name, with the reason.
    """

    kind: EndKind
    reason: str
    has_progressed: bool
    bad_nodes: Mapping[str, str]


@dataclass(frozen=True)
class Decision:
    """What is done next.

    Attributes:
        action: finish: the run is done. fail: the job ends and is not queued again. requeue: it goes back to the queue.
            restart: it goes on in this allocation.
        reason: Why.
        nodes: For a restart, its nodes.
    """

    action: Action
    reason: str
    nodes: tuple[str, ...] = ()


def in_a_row(ends: Sequence[tuple[str, bool]], kinds: Sequence[str]) -> int:
    """Counts the attempts that ended in one of these kinds since the last one that completed a checkpoint.

    Failures and preemptions are counted apart, and neither interrupts the other's row: the one is a fault of the run or
    its nodes, the other the cluster's doing.

    Args:
        ends: (kind, has_progressed) of all attempts, the newest last.
        kinds: What counts.
    """
    number = 0
    for kind, has_progressed in reversed(ends):
        if has_progressed:
            break
        number += kind in kinds
    return number


def seconds_before_restart(ends: Sequence[tuple[str, bool]]) -> float:
    """Returns how long to wait before ranks start again: a file system or a network may need time to recover."""
    return _WAITS[min(in_a_row(ends, RETRIED), len(_WAITS) - 1)]


def decide(
    end: End,
    earlier: Sequence[tuple[str, bool]],
    nodes: Sequence[str],
    used: int,
    can_run_on: Callable[[int], bool],
    is_elastic: bool,
    max_failures: int,
    max_preemptions: int,
    is_stopping: bool,
) -> Decision:
    """Decides what follows an attempt.

    Args:
        end: How it ended.
        earlier: (kind, has_progressed) of the attempts before it.
        nodes: Nodes of the allocation that can still be used.
        used: Number of nodes that the attempt had.
        can_run_on: Whether the configuration divides over so many nodes.
        is_elastic: Whether fewer nodes will do.
        max_failures: So many failures in a row without a newer checkpoint end the job.
        max_preemptions: So many preemptions in a row without one do too.
        is_stopping: Whether the job itself was asked to stop: it must not begin anything in this allocation.
    """
    if end.kind == "done":
        return Decision("finish", end.reason)
    if end.kind in ("bad_input", "non_finite", "unstable"):
        return Decision("fail", end.reason)
    ends = [*earlier, (end.kind, end.has_progressed)]
    for what, kinds, limit in (
        ("failures", RETRIED, max_failures),
        ("preemptions", ("preempted",), max_preemptions),
    ):
        number = in_a_row(ends, kinds)
        if end.kind in kinds and number >= limit:
            reason = f"{number} {what} in a row without a newer checkpoint (cluster.max_{what}); last: {end.reason}"
            return Decision("fail", reason)
    if end.kind == "preempted" or is_stopping:
        return Decision("requeue", end.reason)
    if len(nodes) >= used:
        return Decision("restart", end.reason, tuple(nodes[:used]))
    if is_elastic:
        fitting = next((number for number in range(len(nodes), 0, -1) if can_run_on(number)), 0)
        if fitting:
            return Decision("restart", f"{end.reason}; {fitting} of {used} nodes go on", tuple(nodes[:fitting]))
    return Decision("requeue", end.reason)
