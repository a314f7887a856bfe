import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.config import BatchPlan
from mlra_scale.data import SampleStream
from mlra_scale.training.loop.batches import Prefetcher, first_samples, read_batches


def plan_of(data: int, micro_batch_size: int, accumulation_steps: int) -> BatchPlan:
    size = data * micro_batch_size * accumulation_steps
    return BatchPlan(data, 1, 1, data, micro_batch_size, accumulation_steps, size, 16, size * 16)


class Stream(SampleStream):
    """Gives the range of samples instead of tensors, and remembers which thread asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def batch(self, first: int, count: int) -> Any:
        self.asked.append((first, threading.current_thread().name))
        if first < 0:
            raise IndexError("no such sample")
        return range(first, first + count)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_a_step_reads_each_sample_once_over_all_ranks(data: int, micro: int, accumulation: int, consumed: int) -> None:
    plan = plan_of(data, micro, accumulation)
    read = [
        sample
        for rank in range(data)
        for first in first_samples(plan, rank, consumed)
        for sample in range(first, first + micro)
    ]
    assert sorted(read) == list(range(consumed, consumed + plan.global_batch_size))
    assert len({len(first_samples(plan, rank, consumed)) for rank in range(data)}) == 1
    assert first_samples(plan_of(3, 2, 2), 1, 100) == [102, 108], "micro-batches interleave the ranks"


def test_the_next_step_is_read_ahead_in_another_thread() -> None:
    plan, stream = plan_of(2, 2, 2), Stream()
    with Prefetcher(stream, plan, 1) as prefetcher:
        for step in range(5):
            assert prefetcher.next_batches(step * 8) == read_batches(Stream(), plan, 1, step * 8)
    firsts = [first for first, _ in stream.asked]
    assert firsts == sorted(set(firsts)), "each sample is read once"
    assert len(firsts) <= 2 * 6, "one step ahead, not more"
    assert all(name.startswith("prefetch") for _, name in stream.asked)


def test_any_step_may_be_asked_for_and_an_error_in_the_thread_reaches_the_loop() -> None:
    with Prefetcher(Stream(), plan_of(1, 2, 1), 0) as prefetcher:
        for consumed in (0, 40, 42, 6):
            assert prefetcher.next_batches(consumed) == [range(consumed, consumed + 2)]
        with pytest.raises(IndexError, match="no such sample"):
            prefetcher.next_batches(-2)
