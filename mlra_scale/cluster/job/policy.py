"""The decisions of a job as pure functions.

From the last heartbeats: whether ranks hang, and which of them the others wait for. From the end of an attempt: what
follows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlra_scale.cluster.messages import RankFailure, RankStatus
from mlra_scale.config import ClusterConfig
from mlra_scale.training.exit_codes import ExitCode

SILENT_SECONDS = 10.0
"""A process that works, waits or computes sends a heartbeat every second; after so many without one it stands still."""
_NAMED = 8
_MEETING = ("connecting", "checking")
_BEFORE_TRAINING = ("waiting", "starting", *_MEETING, "preparing")


def hang_seconds(ranks: Sequence[RankStatus]) -> tuple[float, bool]:
    """Returns for how long no rank has begun anything new, in seconds, and whether training has not begun yet.

    A rank that gives no sign of life does not count as starting: it may have trained since its last one.
    """
    if not ranks:
        return 0.0, True
    alive = [rank for rank in ranks if rank.silence <= SILENT_SECONDS]
    return min(rank.idle for rank in ranks), any(rank.heartbeat.phase in _BEFORE_TRAINING for rank in alive)


def are_meeting(ranks: Sequence[RankStatus], num_ranks: int) -> bool:
    """Returns whether all ranks have started and each only waits for the network."""
    return len(ranks) == num_ranks and all(rank.heartbeat.phase in _MEETING for rank in ranks)


def suspects(ranks: Sequence[RankStatus]) -> dict[int, str]:
    """Returns the ranks that the others wait for, each with what marks it; empty where nothing does.

    A rank is marked if it gives no sign of life; else if it is at an earlier step; else if its phase or its location
    differs from those of most ranks.
    """
    silent = {
        rank.heartbeat.rank: f"no sign of life for {rank.silence:.0f} s (process {rank.heartbeat.pid} on {rank.node}: "
        f"{rank.state or 'gone'}), last seen at {_where(rank)}"
        for rank in ranks
        if rank.silence > SILENT_SECONDS
    }
    if silent:
        return silent
    ahead = max((rank.heartbeat.step for rank in ranks), default=0)
    behind = {
        rank.heartbeat.rank: f"is at {_where(rank)} on {rank.node}, while others are at step {ahead}"
        for rank in ranks
        if rank.heartbeat.step < ahead
    }
    # Where most are behind, one has run ahead, and is not what they wait for.
    return behind if behind and 2 * len(behind) <= len(ranks) else _odd_ones(ranks)


def _odd_ones(ranks: Sequence[RankStatus]) -> dict[int, str]:
    """Returns the ranks whose phase or location is not that of most of them."""
    counted = Counter((rank.heartbeat.phase, rank.heartbeat.location) for rank in ranks).most_common(1)
    if not counted or 2 * counted[0][1] <= len(ranks):
        return {}
    common, number = counted[0]
    return {
        rank.heartbeat.rank: f"is at {_where(rank)} on {rank.node}, while {number} others are at {common[1]}"
        for rank in ranks
        if (rank.heartbeat.phase, rank.heartbeat.location) != common
    }


def _where(rank: RankStatus) -> str:
    return f"step {rank.heartbeat.step}, {rank.heartbeat.phase}, {rank.heartbeat.location}"


def describe(suspected: Mapping[int, str]) -> str:
    """Returns one line about all suspects."""
    if not suspected:
        return "no rank stands out: look at the stacks"
    named = sorted(suspected.items())
    more = [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return "; ".join([*(f"rank {rank} {text}" for rank, text in named[:_NAMED]), *more])


EndKind = Literal[
    "done",  # all steps are done
    "bad_input",  # the message says what to change
    "non_finite",  # running again gives the same end
    "unstable",  # the guard has given up
    "export_failed",  # all steps are done and saved
    "preempted",  # a signal asked for it; a checkpoint was saved if `reason` does not deny it
    "bad_node",  # the checks before the first step named a node, or a step was computed wrong
    "lost_node",  # the job no longer hears a node
    "hung",  # no progress
    "failed",  # a rank ended with an error or was killed
]
Action = Literal["finish", "fail", "requeue", "restart"]

RETRIED: tuple[EndKind, ...] = ("bad_node", "lost_node", "hung", "failed")
"""Ends that count as failures."""
_FINAL: dict[ExitCode, EndKind] = {
    ExitCode.BAD_INPUT: "bad_input",
    ExitCode.NON_FINITE: "non_finite",
    ExitCode.UNSTABLE: "unstable",
    ExitCode.EXPORT_FAILED: "export_failed",
}
"""Exit codes of ranks after which another attempt would end alike."""
_WAITS = (0.0, 0.0, 60.0, 300.0)
"""Seconds before a restart, by the number of failures in a row."""


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
        kind, reason: Of what kind, and in words that name rank and node where they are known.
        bad_nodes: Nodes that must not be used again, by name, with the reason.
        failures: How single ranks ended, the cause first.
    """

    kind: EndKind
    reason: str
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    failures: tuple[str, ...] = ()


def end_of_ranks(failures: Sequence[RankFailure], logs: Path) -> End | None:
    """Returns how an attempt ended by the exit codes of its ranks; None where they do not say it.

    Args:
        failures: The cause first.
        logs: The folder that messages name.
    """
    refused = [failure for failure in failures if failure.code == ExitCode.BAD_INPUT]
    if refused and all(failure.rank != 0 for failure in refused):
        # The first node has found nothing wrong: a file or a device is missing on these only.
        bad = {failure.node: f"{failure}; see its log in {logs}" for failure in refused}
        return End("bad_node", "; ".join(bad.values()), bad)
    for code, kind in _FINAL.items():
        if found := [str(failure) for failure in failures if failure.code == code]:
            return End(kind, found[0])
    if any(failure.code == ExitCode.PREEMPTED for failure in failures):
        return End("preempted", "stopped by a signal, with a checkpoint")
    return None


@dataclass(frozen=True)
class Decision:
    """What follows an end.

    finish: the run is done. fail: the job ends and is not queued again. requeue: it goes back to the queue. restart:
    the next attempt starts on `nodes` of this allocation.
    """

    action: Action
    reason: str
    nodes: tuple[str, ...] = ()


def in_a_row(ends: Sequence[tuple[str, bool]], kinds: Sequence[str]) -> int:
    """Counts the attempts that ended in one of these kinds since the last one that completed a checkpoint.

    Failures come from the run or its nodes and preemptions from the cluster: neither interrupts the other's row. `ends`
    holds (kind, has_progressed) of all attempts, the newest last.
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
    ends: Sequence[tuple[str, bool]],
    nodes: Sequence[str],
    used: int,
    can_run_on: Callable[[int], bool],
    cluster: ClusterConfig,
    is_stopping: bool,
) -> Decision:
    """Decides what follows an attempt.

    Args:
        end: How it ended.
        ends: (kind, has_progressed) of all attempts, this one last.
        nodes: Nodes of the allocation that can still be used.
        used: Number of nodes that the attempt had.
        can_run_on: Whether the configuration divides over so many nodes.
        cluster: Says whether fewer nodes will do, and how many failures and preemptions in a row end the job.
        is_stopping: Whether the job itself was asked to stop: it must not begin anything in this allocation.
    """
    if end.kind == "done":
        return Decision("finish", end.reason)
    if end.kind in _FINAL.values():
        return Decision("fail", end.reason)
    for what, kinds, limit in (
        ("failures", RETRIED, cluster.max_failures),
        ("preemptions", ("preempted",), cluster.max_preemptions),
    ):
        number = in_a_row(ends, kinds)
        if end.kind in kinds and number >= limit:
            reason = f"{number} {what} in a row without a newer checkpoint (cluster.max_{what}); last: {end.reason}"
            return Decision("fail", reason)
    if end.kind == "preempted" or is_stopping:
        return Decision("requeue", end.reason)
    if len(nodes) >= used:
        return Decision("restart", end.reason, tuple(nodes[:used]))
    numbers = range(len(nodes), 0, -1) if cluster.elastic else ()
    if fitting := next((number for number in numbers if can_run_on(number)), 0):
        return Decision("restart", f"{end.reason}; continues on {fitting} of {used} nodes", tuple(nodes[:fitting]))
    return Decision("requeue", end.reason)
