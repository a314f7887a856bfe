"""A function on several processes: results by rank, and every way to fail is told."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.processes import on_processes


def summed(offset: float) -> tuple[int, float]:
    values = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(values)
    return dist.get_rank(), float(values)


def fails_on(rank: int, how: str) -> None:
    if dist.get_rank() == rank:
        if how == "raises":
            raise ValueError("no good")
        if how == "dies":
            os._exit(3)
    time.sleep(60.0)


def test_results_come_by_rank() -> None:
    assert on_processes(2, summed, 0.5, timeout_s=60.0) == [(0, 2.0), (1, 2.0)]


@pytest.mark.slow_except("dies-died")
@pytest.mark.parametrize(("how", "message"), [("raises", "no good"), ("dies", "died"), ("hangs", "not done after 8 s")])
def test_a_failure_is_told_and_nothing_is_left(how: str, message: str) -> None:
    others = set(multiprocessing.active_children())
    ranks = 2 if how == "hangs" else 1  # a process costs seconds to start
    with pytest.raises(RuntimeError, match=message):
        on_processes(ranks, fails_on, ranks - 1, how, timeout_s=8.0 if how == "hangs" else 50.0)
    assert set(multiprocessing.active_children()) <= others
