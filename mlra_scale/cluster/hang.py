"""Telling a hang from work, and the ranks that are to blame for it. Pure functions of what the ranks last told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlra_scale.cluster.pulse import Beat

SILENT_SECONDS = 10.0
"""A process that works, waits or computes sends a beat every second; after so many without one it stands still."""

_NAMED = 8
_BEFORE_TRAINING = ("starting", "connecting", "checking", "preparing")


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


def suspects(seen: Sequence[Seen]) -> dict[int, str]:
    """Finds the ranks that the others wait for.

    Returns:
        By rank, what marks it: it gives no sign of life; or it is at another step than most; or it is the odd one out
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
    by_step = _odd(seen, [f"step {rank.beat.step}" for rank in seen])
    return by_step or _odd(seen, [f"{rank.beat.doing}, {rank.beat.place}" for rank in seen])


def _odd(seen: Sequence[Seen], places: Sequence[str]) -> dict[int, str]:
    """Returns the ranks that are elsewhere than most of them."""
    counted = Counter(places).most_common(1)
    if not counted or counted[0][1] == len(seen) or 2 * counted[0][1] <= len(seen):
        return {}
    common, number = counted[0]
    return {
        rank.beat.rank: f"is at {_where(rank.beat)} on {rank.node}, while {number} others are at {common}"
        for rank, place in zip(seen, places, strict=True)
        if place != common
    }


def _where(beat: Beat) -> str:
    return f"step {beat.step}, {beat.doing}, {beat.place}"


def describe(suspected: Mapping[int, str]) -> str:
    """Returns one line about all suspects."""
    if not suspected:
        return "all ranks stand at the same place; look at the stacks of any of them"
    named = sorted(suspected.items())
    more = [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return "; ".join([*(f"rank {rank} {text}" for rank, text in named[:_NAMED]), *more])
