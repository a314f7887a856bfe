"""What a cluster can do, as far as the planner's estimates need it. Imports no torch.

Rates of matrix products and of the fast links are those by which low-rank plans are chosen (model/low_rank_plan.py):
one owner. Everything else of the named clusters stands here, with its source; nothing of it was measured by this
project. benchmarks/check.py measures these numbers for the machine it runs on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import AfterValidator, ConfigDict, Field, StrictBool

from mlra_scale.config import ConfigError, Problem
from mlra_scale.config.problems import nearest
from mlra_scale.model.low_rank_plan import CPU_CORE, H100

GIB = 2.0**30
FREE_SHARE = 0.1
"""Share of a device's memory that no plan uses: memory.py counts tensors, and not the allocator's fragments."""

_DEVICES = ("h200", "h100", "a100")
"""Words of a device's name that are the named cluster with such devices."""
_OTHER_PRODUCTS = {"pcie", "nvl", "mig"}
"""Words of a device's name that stand for another product: other peak or links, or a part of a device."""


def _zero_or_some(value: float) -> float:
    if 0 < value < 2.0**20:
        raise ValueError("must be 0, or at least 1048576")
    return value


def _printable(value: str) -> str:
    if not (0 < len(value) <= 2000 and value.isprintable()):
        raise ValueError("must be text of 1 to 2000 printable characters")
    return value


Count = Annotated[int, Field(strict=True, ge=1, le=10**6)]
Bytes = Annotated[float, Field(strict=True, ge=2.0**20, le=2.0**60)]
Rate = Annotated[float, Field(strict=True, ge=1e3, le=1e21)]
Seconds = Annotated[float, Field(strict=True, ge=0.0, le=1e3)]
Label = Annotated[str, Field(strict=True), AfterValidator(_printable)]
"""Bounds of a file's constants, far beyond any device: outside of them estimates over- or underflow."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. Types have the bounds that are checked where a file is read (cluster_file.py)."""

    __pydantic_config__: ClassVar = ConfigDict(allow_inf_nan=False)

    name: Label  # its name in reports
    source: Label  # where the numbers are from
    nodes: Count  # number of nodes
    devices_per_node: Count  # devices (ranks) of a node
    memory: Bytes  # of one device
    # Memory of it that tensors cannot have: context, libraries, communication buffers.
    reserved: Annotated[float, Field(strict=True, ge=0.0, le=2.0**60), AfterValidator(_zero_or_some)]
    peak_flops: Rate  # peak of one device in FLOP/s, the denominator of MFU
    # Share of the peak that matrix products of usual sizes reach.
    utilization: Annotated[float, Field(strict=True, ge=1e-6, le=1.0)]
    memory_bandwidth: Rate  # bytes per second that a device reads and writes in norms, GELU, sums and softmax
    update_bandwidth: Rate  # bytes per second of the optimizer's update and of sums of gradients
    link_intra: Rate  # bytes per second that a device sends to another of its node
    link_inter: Rate  # bytes per second that a device sends to another node
    latency_intra: Seconds  # smallest time of a message within a node
    latency_inter: Seconds  # smallest time of a message between nodes
    block_overhead: Seconds  # launching one block's operations, forward and backward together
    # ZeRO's bookkeeping for one block, forward and backward together, by stage 0 to 3.
    zero_overhead: tuple[Seconds, Seconds, Seconds, Seconds]
    pipeline_overhead: Seconds  # the pipeline engine's work per micro-batch, beside that of any engine
    micro_batch_overhead: Seconds  # an engine's own work per micro-batch
    step_overhead: Seconds  # an engine's own work per step
    launch: Seconds  # time in which the host starts one operation
    wait: Seconds  # time that a wait of the host for the device costs, such as `.item()`
    # Whether the host launches while the device computes: overhead then counts only where it is longer than the
    # computation, and reductions overlap with it (GPUs).
    runs_ahead: StrictBool

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return self.nodes * self.devices_per_node

    @property
    def flops(self) -> float:
        """Sustained rate of matrix products of one device, FLOP/s."""
        return self.peak_flops * self.utilization

    @property
    def usable_memory(self) -> float:
        """Bytes of one device that a plan may give to tensors; FREE_SHARE of the device stays free."""
        return (1.0 - FREE_SHARE) * self.memory - self.reserved

    def link(self, group: Sequence[int]) -> tuple[float, float]:
        """Returns bandwidth (bytes/s that each rank sends) and latency (s) of collectives of a group of ranks.

        Over several nodes every rank brings its own link to the network, so that a group with k ranks on a node has k
        of them, up to what the node itself carries.

        Args:
            group: Global ranks; rank r is on node r // devices_per_node.
        """
        ranks_of_nodes = Counter(rank // self.devices_per_node for rank in group)
        if len(ranks_of_nodes) == 1:
            return self.link_intra, self.latency_intra
        per_node = min(ranks_of_nodes.values())
        return min(self.link_intra, per_node * self.link_inter), self.latency_inter


def named_clusters() -> dict[str, Cluster]:
    """Returns the clusters that a name stands for, of one node; `replace` gives them other sizes."""
    a100 = Cluster(
        name="a100",
        source="NVIDIA A100 datasheet: 312 TFLOP/s dense bf16, 80 GB at 2.0 TB/s, NVLink 3 of 600 GB/s in both "
        "directions; 200 Gbit/s network per GPU. Assumed: half the peak in matrix products, 0.78 of a link, overheads",
        nodes=1,
        devices_per_node=8,
        memory=80e9,
        reserved=4 * GIB,
        peak_flops=312e12,
        utilization=0.5,
        memory_bandwidth=1.6e12,
        update_bandwidth=1.6e12,
        link_intra=2.34e11,
        link_inter=2e10,
        latency_intra=1e-5,
        latency_inter=2e-5,
        block_overhead=4e-4,
        zero_overhead=(0.0, 3e-4, 5e-4, 4e-3),
        pipeline_overhead=1e-3,
        micro_batch_overhead=1e-3,
        step_overhead=5e-3,
        launch=5e-6,
        wait=3e-5,
        runs_ahead=True,
    )
    h100 = replace(
        a100,
        name="h100",
        source="NVIDIA H100 SXM datasheet: 989 TFLOP/s dense bf16, 80 GB at 3.35 TB/s, NVLink 4 of 900 GB/s in both "
        "directions; 400 Gbit/s network per GPU. Assumed: half the peak in matrix products, 0.78 of a link, overheads",
        peak_flops=989e12,
        utilization=H100.flops / 989e12,
        memory_bandwidth=2.7e12,
        update_bandwidth=2.7e12,
        link_intra=H100.bandwidth,
        link_inter=4e10,
    )
    h200 = replace(
        h100,
        name="h200",
        source="NVIDIA H200 SXM datasheet: 989 TFLOP/s dense bf16, 141 GB at 4.8 TB/s, NVLink 4 of 900 GB/s in both "
        "directions; 400 Gbit/s network per GPU. Assumed: half the peak in matrix products, 0.78 of a link, overheads",
        memory=141e9,
        memory_bandwidth=3.85e12,
        update_bandwidth=3.85e12,
    )
    cpu = Cluster(
        name="cpu",
        source="orders of magnitude of one core in fp32 and gloo on one machine; benchmarks/check.py measures them",
        nodes=1,
        devices_per_node=2,
        memory=8 * GIB,
        reserved=1 * GIB,
        peak_flops=CPU_CORE.flops,
        utilization=1.0,
        memory_bandwidth=3e9,
        update_bandwidth=6e9,
        link_intra=CPU_CORE.bandwidth,
        link_inter=1e9,
        latency_intra=1e-4,
        latency_inter=2e-4,
        block_overhead=1e-3,
        zero_overhead=(0.0, 2e-4, 5e-4, 3e-3),
        pipeline_overhead=2e-3,
        micro_batch_overhead=2e-3,
        step_overhead=5e-3,
        launch=0.0,
        wait=0.0,
        runs_ahead=False,
    )
    return {cluster.name: cluster for cluster in (h100, a100, h200, cpu)}


def named_cluster(name: str) -> Cluster:
    """Returns a cluster by its name.

    Raises:
        ConfigError: There is no such cluster.
    """
    clusters = named_clusters()
    if name not in clusters:
        raise ConfigError([Problem("--cluster", name, "is no named cluster" + nearest(name, clusters))])
    return clusters[name]


def cluster_of_device(name: str) -> str | None:
    """Returns the named cluster with devices that the driver calls so, such as "NVIDIA H200"; None: there is none."""
    return None if _words(name) & _OTHER_PRODUCTS else generation_of_device(name)


def generation_of_device(name: str) -> str | None:
    """Returns the named cluster with devices of the same generation, though of another product; None: there is none."""
    return next((device for device in _DEVICES if device in _words(name)), None)


def _words(name: str) -> set[str]:
    return set(name.lower().replace("-", " ").split())
