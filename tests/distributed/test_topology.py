"""Every process group of an engine, DeepSpeed's own included, waits as long as the configuration says."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.layouts import Layout, layout_config, start
from tests.support.pool import WorkerPool


def timeouts(rank: int, world_size: int, config: Any) -> list[timedelta]:
    """Timeouts of all groups of this rank but the default one, which the pool has made."""
    start(config, world_size)
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(data=2, stage=3)], ids=str)
def test_all_groups_have_the_configured_timeout(worker_pool: Callable[[int], WorkerPool], layout: Layout) -> None:
    config = layout_config(layout, parallel__timeout_minutes=7.0)
    for found in worker_pool(2).run(timeouts, config):
        assert len(found) >= 5
        assert set(found) == {timedelta(minutes=7)}
