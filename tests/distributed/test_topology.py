"""Every process group of an engine, DeepSpeed's own included, waits as long as the configuration says."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlra_scale.config import batch_plan
from mlra_scale.parallel import build_topology, destroy_topology, initialize_distributed
from tests.support.layouts import Layout, layout_config, start
from tests.support.pool import Pools


def timeouts(rank: int, world_size: int, config: Any) -> list[timedelta]:
    """Timeouts of all groups of this rank but the default one, which the pool has made."""
    start(config, world_size)
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.slow_except("tp1pp2dp1 zero0")
@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(data=2, stage=3)], ids=str)
def test_all_groups_have_the_configured_timeout(worker_pool: Pools, layout: Layout) -> None:
    config = layout_config(layout, parallel__timeout_minutes=7.0)
    for found in worker_pool(2).run(timeouts, config):
        assert len(found) >= 5
        assert set(found) == {timedelta(minutes=7)}


def control_groups(rank: int, world_size: int, config: Any) -> list[tuple[bool, str, int, list[Any]]]:
    """Builds and destroys the topology twice; what the control group is, and what is gathered over it."""
    plan = batch_plan(config, world_size)
    device = initialize_distributed("cpu", 1.0)
    found: list[tuple[bool, str, int, list[Any]]] = []
    for _ in range(2):
        topology = build_topology(plan, device, 1.0)
        group = topology.control_group
        others = (dist.group.WORLD, topology.tensor_group, topology.data_group, topology.pipeline_group)
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, {"rank": rank}, group=group)
        is_own = all(group is not other for other in others)
        found.append((is_own, dist.get_backend(group), dist.get_world_size(group), gathered))
        destroy_topology(topology)
        assert group not in dist.distributed_c10d._world.pg_map
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_control_group_is_one_of_its_own(worker_pool: Pools, world_size: int) -> None:
    everybody = [{"rank": rank} for rank in range(world_size)]
    for found in worker_pool(world_size).run(control_groups, layout_config(Layout(data=world_size))):
        assert found == [(True, "gloo", world_size, everybody)] * 2
