"""Hangs and the ranks that are to blame for them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.cluster.hang import SILENT_SECONDS, Seen, are_meeting, describe, hang_seconds, suspects
from mlra_scale.cluster.pulse import Beat

WAITING = "train_batch (engine.py:9) > all_reduce (distributed.py:7)"


def seen(
    rank: int,
    step: int = 5,
    doing: str = "training",
    seconds: float = 100.0,
    place: str = WAITING,
    silence: float = 0.5,
    state: str = "S (sleeping)",
) -> Seen:
    return Seen(f"n{rank // 2}", Beat(rank, rank % 2, 1000 + rank, doing, step, seconds, place), silence, state)


@st.composite
def worlds(draw: st.DrawFn) -> list[Seen]:
    ranks = draw(st.lists(st.integers(0, 40), unique=True, max_size=8))
    return [
        seen(
            rank,
            draw(st.integers(0, 2)),
            draw(st.sampled_from(["starting", "preparing", "training", "saving"])),
            draw(st.floats(0, 1e4)),
            draw(st.sampled_from([WAITING, "read (feed.py:3)", ""])),
            draw(st.sampled_from([0.0, 1.0, SILENT_SECONDS, SILENT_SECONDS + 0.1, 1e4])),
            draw(st.sampled_from(["S (sleeping)", "T (stopped)", ""])),
        )
        for rank in ranks
    ]


def test_no_rank_is_no_hang_of_training() -> None:
    assert hang_seconds([]) == (0.0, True)
    assert suspects([]) == {}


def test_one_rank_that_begins_something_is_progress() -> None:
    assert hang_seconds([seen(0, seconds=100), seen(1, seconds=3)]) == (3.5, False)


def test_seconds_without_a_beat_count() -> None:
    """A rank that stands still goes on waiting, though it cannot say so any more."""
    assert hang_seconds([seen(0, seconds=10, silence=200), seen(1, seconds=205, silence=1)]) == (206, False)


@pytest.mark.parametrize("doing", ["starting", "connecting", "checking", "preparing"])
def test_training_has_not_begun_before_all_ranks_train(doing: str) -> None:
    assert hang_seconds([seen(0), seen(1, doing=doing)])[1]


@pytest.mark.parametrize("doing", ["training", "evaluating", "saving", "ending"])
def test_what_counts_as_training(doing: str) -> None:
    assert not hang_seconds([seen(0), seen(1, doing=doing)])[1]


def test_ranks_meet_when_all_are_there() -> None:
    ranks = [seen(0, doing="connecting"), seen(1, doing="checking")]
    assert are_meeting(ranks, 2) and not are_meeting(ranks, 3)
    assert not are_meeting([*ranks, seen(2, doing="preparing")], 3)


def test_a_silent_rank_is_named_with_its_process() -> None:
    """Though another one is behind, and a third one elsewhere."""
    ranks = [seen(0), seen(1, silence=42.4, state="T (stopped)"), seen(2, step=4), seen(3, place="read (feed.py:3)")]
    assert suspects(ranks) == {
        1: "no sign of life for 42 s (process 1001 on n0: T (stopped)), last seen at " + f"step 5, training, {WAITING}"
    }


def test_a_silent_rank_without_a_process_is_gone() -> None:
    assert "(process 1001 on n0: gone)" in suspects([seen(0), seen(1, silence=42, state="")])[1]


def test_short_silence_is_none() -> None:
    assert suspects([seen(0), seen(1, silence=SILENT_SECONDS)]) == {}


def test_ranks_behind_are_named() -> None:
    """Not the one that is elsewhere in the program: it is the earlier step that the others wait for."""
    found = suspects([seen(0, step=7), seen(1, step=6), seen(2, step=7, place="read (feed.py:3)"), seen(3, step=6)])
    assert [*found] == [1, 3]
    assert found[1] == f"is at step 6, training, {WAITING} on n0, while others are at step 7"


def test_one_rank_that_runs_ahead_does_not_make_suspects_of_all_others() -> None:
    assert suspects([seen(0, step=7), seen(1, step=6), seen(2, step=6), seen(3, step=6)]) == {}


def test_a_description_of_many_names_some() -> None:
    text = describe(dict.fromkeys(range(1000), "is late"))
    assert text.startswith("rank 0 is late; rank 1 is late") and text.endswith("; and 992 more") and len(text) < 300


def test_the_odd_one_out_is_named() -> None:
    found = suspects([seen(0), seen(1), seen(2, place="read (feed.py:3)"), seen(3)])
    assert found == {2: f"is at step 5, training, read (feed.py:3) on n1, while 3 others are at {WAITING}"}


def test_what_a_rank_does_tells_it_from_others_too() -> None:
    assert [*suspects([seen(0), seen(1), seen(2, doing="saving")])] == [2]


@pytest.mark.parametrize(
    "places",
    [["a", "a", "a"], ["a", "b"], ["a", "a", "b", "b"], ["a", "a", "b", "c"]],
)
def test_without_a_majority_nobody_is_named(places: list[str]) -> None:
    assert suspects([seen(rank, place=place) for rank, place in enumerate(places)]) == {}


def test_without_suspects_the_stacks_are_what_is_left() -> None:
    assert "stacks" in describe({})


def test_a_description_is_in_order_of_ranks() -> None:
    assert describe({10: "is late", 2: "is silent"}) == "rank 2 is silent; rank 10 is late"


@settings(deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_suspects_are_ranks_and_do_not_depend_on_the_order(world: list[Seen], random: object) -> None:
    found = suspects(world)
    assert set(found) <= {rank.beat.rank for rank in world}
    shuffled = list(world)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert suspects(shuffled) == found == suspects(world)
    assert hang_seconds(shuffled) == hang_seconds(world)
    silent = {rank.beat.rank for rank in world if rank.silence > SILENT_SECONDS}
    assert not silent or set(found) == silent
    behind = {rank.beat.rank for rank in world if rank.beat.step < max(other.beat.step for other in world)}
    assert silent or not behind or 2 * len(behind) > len(world) or set(found) == behind
    if world and not silent:
        assert len(found) < len(world), "somebody must be waiting"
    assert "\n" not in describe(found)


@settings(deadline=None)
@given(worlds())
def test_a_hang_is_as_long_as_the_latest_beginning_is_ago(world: list[Seen]) -> None:
    seconds, _ = hang_seconds(world)
    assert seconds == min((rank.beat.seconds + rank.silence for rank in world), default=0.0)
