"""Python's garbage collector, in step on all ranks."""

import gc
from collections.abc import Iterator

import pytest

from mlra_scale.training.garbage import GarbageCollection


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """Generations of the collections that begin."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.enable()


def make_objects() -> None:
    """More than those after which Python collects by itself."""
    kept = [[index] for index in range(200_000)]
    assert kept


def test_it_runs_every_so_many_steps_and_at_no_other_time(collected: list[int]) -> None:
    with GarbageCollection(3) as garbage:
        del collected[:]
        steps = []
        for step in range(1, 10):
            make_objects()
            garbage.after(step)
            if collected:
                steps.append(step)
                assert collected == [2], "a whole collection"
                del collected[:]
        assert steps == [3, 6, 9]
        assert gc.get_freeze_count() > 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_leaves_it_to_python(collected: list[int]) -> None:
    with GarbageCollection(0) as garbage:
        assert gc.isenabled()
        make_objects()
        garbage.after(1)
    assert collected
