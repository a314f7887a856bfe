"""The worker pool itself: failures are reported, never waited out, and layouts can follow each other."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.ranks import RanksFailed
from tests.support.pool import Pools, WorkerPool
from tests.support.waiting import all_end


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """A pool that tests may break, apart from the session's."""
    pool = WorkerPool(2, grace=2.0)
    yield pool
    pool.close()


def add_ranks(rank: int, world_size: int, start: float) -> torch.Tensor:
    total = torch.tensor([start + rank])
    dist.all_reduce(total)
    return total


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise RuntimeError("the third wheel")
    dist.barrier()


def fail_everywhere(rank: int, world_size: int) -> None:
    raise KeyError(f"key {rank}")


def hang_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def start_child_and_hang(rank: int, world_size: int, pid_file: str) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    with open(f"{pid_file}{rank}", "w") as file:
        file.write(str(child))
    time.sleep(600)


def change_process_state(rank: int, world_size: int) -> None:
    os.environ["POOL_TEST_LEFTOVER"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    gc.disable()


def read_process_state(rank: int, world_size: int) -> tuple[Any, ...]:
    leftover = os.environ.get("POOL_TEST_LEFTOVER")
    return leftover, os.getcwd() == "/", torch.get_default_dtype(), torch.is_grad_enabled(), gc.isenabled()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank_from_the_same_processes(worker_pool: Pools, world_size: int) -> None:
    pool = worker_pool(world_size)
    first = pool.run(add_ranks, 10.0)
    pids = pool.pids
    second = pool.run(add_ranks, 20.0)
    ranks = world_size * (world_size - 1) / 2
    assert first == [torch.tensor([10.0 * world_size + ranks])] * world_size
    assert second == [torch.tensor([20.0 * world_size + ranks])] * world_size
    assert worker_pool(world_size) is pool and pool.pids == pids and len(set(pids)) == world_size


def test_exception_comes_back_with_its_traceback(own_pool: WorkerPool) -> None:
    with pytest.raises(RanksFailed) as failure:
        own_pool.run(fail_on_rank_1)
    assert "the third wheel" in failure.value.problems[1] and "in fail_on_rank_1" in failure.value.problems[1]
    assert "the third wheel" in str(failure.value)


def test_pool_survives_an_exception_on_all_ranks(own_pool: WorkerPool) -> None:
    own_pool.run(add_ranks, 0.0)
    pids = own_pool.pids
    with pytest.raises(RanksFailed, match="key 1") as failure:
        own_pool.run(fail_everywhere)
    assert set(failure.value.problems) == {0, 1}
    assert own_pool.run(add_ranks, 1.0) == [torch.tensor([3.0])] * 2
    assert own_pool.pids == pids


def test_hang_fails_with_the_stack_and_the_pool_is_rebuilt(own_pool: WorkerPool) -> None:
    own_pool.run(add_ranks, 0.0)
    pids, start = own_pool.pids, time.monotonic()
    with pytest.raises(RanksFailed, match="hung") as failure:
        own_pool.run(hang_on_rank_1, timeout=2.0)
    assert time.monotonic() - start < 6.0
    assert "in hang_on_rank_1" in failure.value.problems[1]
    assert all_end(pids, 0.0) and own_pool.pids == []
    assert own_pool.run(add_ranks, 1.0) == [torch.tensor([3.0])] * 2


def test_death_in_a_case_is_reported_at_once(own_pool: WorkerPool) -> None:
    own_pool.run(add_ranks, 0.0)
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 died \(killed by signal SIGKILL\)") as failure:
        own_pool.run(die_on_rank_1)
    assert time.monotonic() - start < 2.0
    assert "last words" in failure.value.problems[1]


@pytest.mark.slow
def test_death_between_cases_is_reported(own_pool: WorkerPool) -> None:
    own_pool.run(add_ranks, 0.0)
    os.kill(own_pool.pids[0], signal.SIGKILL)
    with pytest.raises(RanksFailed, match="rank 0 died"):
        own_pool.run(add_ranks, 1.0)
    assert own_pool.run(add_ranks, 1.0) == [torch.tensor([3.0])] * 2


def test_children_of_workers_are_killed_too(own_pool: WorkerPool, tmp_path: Any) -> None:
    with pytest.raises(RanksFailed, match="hung"):
        own_pool.run(start_child_and_hang, str(tmp_path / "pid"), timeout=6.0)
    children = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert all_end(children, 5.0)


def test_process_state_does_not_leak_into_the_next_case(worker_pool: Pools) -> None:
    pool = worker_pool(1)
    pool.run(change_process_state)
    assert pool.run(read_process_state) == [(None, False, torch.float32, True, True)]
