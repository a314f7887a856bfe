"""Engines of different layouts can follow each other in the same processes."""

import gc
import os
from pathlib import Path

import pytest

from mlra_scale.config import Config
from tests.distributed import steps
from tests.distributed.oracle_runs import Pools, in_layout
from tests.support.layouts import Layout, canonical_weights, layout_config

LAYOUTS = [
    *(Layout(data=4), Layout(tensor=2, pipeline=2, stage=1), Layout(tensor=2, data=2, stage=3)),
    *(Layout(pipeline=2, data=2), Layout(tensor=4, stage=1), Layout(pipeline=4, stage=1), Layout(data=4, stage=2)),
]


def train(rank: int, world_size: int, config: Config) -> tuple[list[float], int, int]:
    """Losses of two steps, and how many file descriptors and tensors the process holds before they begin."""
    import torch

    descriptors = len(os.listdir("/proc/self/fd"))
    tensors = sum(torch.is_tensor(thing) for thing in gc.get_objects())
    record = steps.train(rank, world_size, config, 2, canonical_weights(config.model))
    return record.losses, descriptors, tensors


@pytest.mark.slow
def test_layouts_follow_each_other_and_leave_nothing_behind(worker_pool: Pools) -> None:
    pool = worker_pool(4)
    expected = worker_pool(1).run(train, in_layout(Layout()))[0][0]
    pids = None
    held = []
    for _ in range(2):
        for layout in LAYOUTS:
            results = pool.run(train, in_layout(layout))
            for losses, _, _ in results:
                assert losses == pytest.approx(expected, rel=1e-6), layout
            held.append([result[1:] for result in results])
            pids = pids or pool.pids
    assert pool.pids == pids
    print("descriptors and tensors before each case, rank 0:", [rank_0 for rank_0, *_ in held])
    first, second = held[: len(LAYOUTS)], held[len(LAYOUTS) :]
    for rank in range(4):
        descriptors = [max(case[rank][0] for case in cases) for cases in (first, second)]
        tensors = max(case[rank][1] for case in second)
        # One leaked engine would add more than this to every later case.
        assert descriptors[1] <= descriptors[0] + 4 and tensors < 30, (rank, descriptors, tensors)


def threads_of_groups(rank: int, world_size: int) -> int:
    """Threads that gloo runs for the process groups of this process."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith(("gloo", "pt_gloo")) for name in names)


@pytest.mark.parametrize("layout", [Layout(stage=3), Layout(engine="pipeline")], ids=str)
def test_process_groups_end_with_their_case(worker_pool: Pools, layout: Layout) -> None:
    """Each has threads that wake up a hundred times a second: groups of old cases would slow down all that follow."""
    pool, config = worker_pool(1), layout_config(layout)
    found = []
    for _ in range(4):
        pool.run(steps.train, config, 1, canonical_weights(config.model))
        found += pool.run(threads_of_groups)
    # The groups of one engine have twelve; one group may take a moment longer to end.
    assert max(found) - min(found) < 12, found


def linear_map(rank: int, world_size: int) -> str:
    """Where torch's linear map comes from in this process."""
    import torch

    return str(torch.nn.functional.linear.__module__)


def test_what_zero_3_replaces_in_torch_is_put_back(worker_pool: Pools) -> None:
    """A layout whose turn comes later would otherwise round as ZeRO 3 does, and not as it does alone."""
    pool, config = worker_pool(1), layout_config(Layout(stage=3))
    pool.run(steps.train, config, 1, canonical_weights(config.model))
    assert "deepspeed" not in pool.run(linear_map)[0]
