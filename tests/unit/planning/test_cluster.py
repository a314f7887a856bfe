from dataclasses import replace

import pytest

from mlra_scale.config import ConfigError
from mlra_scale.model.low_rank_plan import CPU_CORE, H100
from mlra_scale.planning.cluster import named_cluster


def test_rates_have_one_owner() -> None:
    """By the same numbers low-rank plans are chosen."""
    h100, cpu = named_cluster("h100"), named_cluster("cpu")
    assert h100.flops == pytest.approx(H100.flops) and h100.link_intra == H100.bandwidth
    assert cpu.flops == CPU_CORE.flops and cpu.link_intra == CPU_CORE.bandwidth


def test_a_group_within_a_node_uses_the_fast_link() -> None:
    cluster = replace(named_cluster("h100"), nodes=2, devices_per_node=4, link_intra=100.0, link_inter=10.0)
    assert cluster.world_size == 8
    assert cluster.link([0, 1, 2, 3])[0] == 100.0
    assert cluster.link([0, 4])[0] == 10.0, "one rank per node: one link to the network"
    assert cluster.link([0, 1, 4, 5])[0] == 20.0
    assert replace(cluster, link_inter=60.0).link([0, 1, 4, 5])[0] == 100.0, "no more than a node carries"
    assert cluster.link([0, 4])[1] == cluster.latency_inter


def test_an_unknown_cluster_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--cluster = 'h10': is no named cluster.*h100"):
        named_cluster("h10")
