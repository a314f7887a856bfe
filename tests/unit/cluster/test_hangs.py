"""Which state of the ranks is a hang, and which ranks the others wait for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.cluster.job.policy import SILENT_SECONDS, are_meeting, describe, hang_seconds, suspects
from mlra_scale.cluster.messages import Heartbeat, RankStatus

WAITING = "train_batch (engine.py:9) > all_reduce (distributed.py:7)"


def status(
    rank: int,
    step: int = 5,
    phase: str = "training",
    seconds: float = 100.0,
    location: str = WAITING,
    silence: float = 0.5,
    state: str = "sleeping",
) -> RankStatus:
    heartbeat = Heartbeat(
        rank=rank, local_rank=rank % 2, pid=1000 + rank, phase=phase, step=step, seconds=seconds, location=location
    )
    return RankStatus(node=f"n{rank // 2}", heartbeat=heartbeat, silence=silence, state=state)


@st.composite
def worlds(draw: st.DrawFn) -> list[RankStatus]:
    ranks = draw(st.lists(st.integers(0, 40), unique=True, max_size=8))
    return [
        status(
            rank,
            draw(st.integers(0, 2)),
            draw(st.sampled_from(["starting", "preparing", "training", "saving"])),
            draw(st.floats(0, 1e4)),
            draw(st.sampled_from([WAITING, "read (feed.py:3)", ""])),
            draw(st.sampled_from([0.0, 1.0, SILENT_SECONDS, SILENT_SECONDS + 0.1, 1e4])),
            draw(st.sampled_from(["sleeping", "stopped", ""])),
        )
        for rank in ranks
    ]


def test_ranks_meet_when_all_are_there() -> None:
    ranks = [status(0, phase="connecting"), status(1, phase="checking")]
    assert are_meeting(ranks, 2) and not are_meeting(ranks, 3)
    assert not are_meeting([*ranks, status(2, phase="preparing")], 3)


def test_ranks_behind_are_named() -> None:
    """Not the one that is elsewhere in the program: it is the earlier step that the others wait for."""
    found = suspects(
        [status(0, step=7), status(1, step=6), status(2, step=7, location="read (feed.py:3)"), status(3, step=6)]
    )
    assert [*found] == [1, 3]
    assert found[1] == f"is at step 6, training, {WAITING} on n0, while others are at step 7"


@pytest.mark.parametrize(
    ("phase", "is_starting"),
    [
        *((name, True) for name in ("starting", "connecting", "checking", "preparing")),
        *((name, False) for name in ("training", "evaluating", "saving", "ending")),
    ],
)
def test_training_has_begun_when_all_ranks_have(phase: str, is_starting: bool) -> None:
    assert hang_seconds([status(0), status(1, phase=phase)])[1] == is_starting
    assert hang_seconds([]) == (0.0, True) and suspects([]) == {}
    stopped = status(1, phase=phase, silence=SILENT_SECONDS + 1.0)
    assert not hang_seconds([status(0), stopped])[1], "it may have been stopped right after its first step"


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([status(0), status(1), status(2, location="read (feed.py:3)"), status(3)], [2]),
        ([status(0), status(1), status(2, phase="saving")], [2]),
        ([status(0), status(1, silence=SILENT_SECONDS)], []),
        # One that runs ahead does not make suspects of all others.
        ([status(0, step=7), status(1, step=6), status(2, step=6), status(3, step=6)], []),
        # Without a majority no rank stands out.
        *(
            ([status(rank, location=location) for rank, location in enumerate(locations)], [])
            for locations in ("aaa", "ab", "aabb", "aabc")
        ),
    ],
)
def test_ranks_that_stand_out_are_named(ranks: list[RankStatus], named: list[int]) -> None:
    assert [*suspects(ranks)] == named


def test_a_suspect_is_described() -> None:
    """A silent rank goes before one that is behind, and that before one elsewhere in the program."""
    ranks = [
        status(0),
        status(1, silence=42.4, state="stopped"),
        status(2, step=4),
        status(3, location="read (feed.py:3)"),
    ]
    where = f"step 5, training, {WAITING}"
    silent = f"no sign of life for 42 s (process 1001 on n0: stopped), last seen at {where}"
    assert suspects(ranks) == {1: silent}
    assert "(process 1001 on n0: gone)" in suspects([status(0), status(1, silence=42, state="")])[1]
    odd = suspects([status(0), status(1), status(2, location="read (feed.py:3)"), status(3)])
    assert odd == {2: f"is at step 5, training, read (feed.py:3) on n1, while 3 others are at {WAITING}"}


def test_a_description_is_in_order_of_ranks_and_short() -> None:
    assert "stacks" in describe({})
    assert describe({10: "is late", 2: "is silent"}) == "rank 2 is silent; rank 10 is late"
    text = describe(dict.fromkeys(range(1000), "is late"))
    assert text.startswith("rank 0 is late; rank 1 is late") and text.endswith("; and 992 more") and len(text) < 300


@settings(deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_suspects_are_ranks_and_do_not_depend_on_the_order(world: list[RankStatus], random: object) -> None:
    found = suspects(world)
    assert set(found) <= {rank.heartbeat.rank for rank in world}
    shuffled = list(world)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert suspects(shuffled) == found == suspects(world)
    assert hang_seconds(shuffled) == hang_seconds(world)
    silent = {rank.heartbeat.rank for rank in world if rank.silence > SILENT_SECONDS}
    assert not silent or set(found) == silent
    behind = {
        rank.heartbeat.rank for rank in world if rank.heartbeat.step < max(other.heartbeat.step for other in world)
    }
    assert silent or not behind or 2 * len(behind) > len(world) or set(found) == behind
    if world and not silent:
        assert len(found) < len(world), "somebody must be waiting"
    assert "\n" not in describe(found)


@settings(deadline=None)
@given(worlds())
def test_a_hang_is_as_long_as_the_latest_beginning_is_ago(world: list[RankStatus]) -> None:
    seconds, _ = hang_seconds(world)
    assert seconds == min((rank.heartbeat.seconds + rank.silence for rank in world), default=0.0)
