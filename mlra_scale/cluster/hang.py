"""Telling a hang from work, and the ranks that are to blame for it. Pure functions of what the ranks last told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlra_scale.cluster.pulse import Beat

SILENT_SECONDS = 10.0
"""A process that works, waits or computes sends a beat every second; after so many without one it stands still."""

_NAMED = 8
_MEETING = ("connecting", "checking")
_BEFORE_TRAINING = ("starting", *_MEETING, "preparing")


@dataclass(frozen=True)
class Seen:
    """The last of a rank, as its node has it.

    Attributes:
        node: Where it runs.
        beat: What it told last.
        silence: Seconds since then.
        state: Its process's state by the kernel: `T (stopped)`, `D (disk sleep)`, ...; empty: gone.
    """

    node: str
    beat: Beat
    silence: float
    state: str

    @property
    def idle(self) -> float:
        """Seconds since it began what it does."""
        return self.beat.seconds + self.silence


def hang_seconds(seen: Sequence[Seen]) -> tuple[float, bool]:
    """Returns for how long no rank has begun anything new, in seconds, and whether training has not begun yet."""
    if not seen:
        return 0.0, True
    return min(rank.idle for rank in seen), any(rank.beat.doing in _BEFORE_TRAINING for rank in seen)


def are_meeting(seen: Sequence[Seen], num_ranks: int) -> bool:
    """Returns whether all ranks are there and none does anything but wait for the network."""
    return len(seen) == num_ranks and all(rank.beat.doing in _MEETING for rank in seen)


def suspects(seen: Sequence[Seen]) -> dict[int, str]:
    """Finds the ranks that the others wait for.

    Returns:
        By rank, what marks it: it gives no sign of life; or it is at an earlier step; or it is the odd one out
        in what it does or where it is in the program. Empty where nothing tells one rank from another.
    """
    silent = {
        rank.beat.rank: f"no sign of life for {rank.silence:.0f} s (process {rank.beat.pid} on {rank.node}: "
        f"{rank.state or 'gone'}), last seen at {_where(rank.beat)}"
        for rank in seen
        if rank.silence > SILENT_SECONDS
    }
    if silent:
        return silent
    ahead = max((rank.beat.step for rank in seen), default=0)
    behind = {
        rank.beat.rank: f"is at {_where(rank.beat)} on {rank.node}, while others are at step {ahead}"
        for rank in seen
        if rank.beat.step < ahead
    }
    # Where most are behind, one has run ahead, and is not what they wait for.
    return behind if behind and 2 * len(behind) <= len(seen) else _odd(seen)


def _odd(seen: Sequence[Seen]) -> dict[int, str]:
    """Returns the ranks that do something else, or somewhere else in the program, than most of them."""
    counted = Counter((rank.beat.doing, rank.beat.place) for rank in seen).most_common(1)
    if not counted or 2 * counted[0][1] <= len(seen):
        return {}
    common, number = counted[0]
    return {
        rank.beat.rank: f"is at {_where(rank.beat)} on {rank.node}, while {number} others are at {common[1]}"
        for rank in seen
        if (rank.beat.doing, rank.beat.place) != common
    }


def _where(beat: Beat) -> str:
    return f"step {beat.step}, {beat.doing}, {beat.place}"


def describe(suspected: Mapping[int, str]) -> str:
    """Returns one line about all suspects."""
    if not suspected:
        return "no rank stands out: look at the stacks"
    named = sorted(suspected.items())
    more = [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return "; ".join([*(f"rank {rank} {text}" for rank, text in named[:_NAMED]), *more])
