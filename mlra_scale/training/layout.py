"""The layout of a start: which devices the planner plans for, and what it chooses. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mlra_scale.config import Config, ConfigError, Named, Problem
from mlra_scale.planning.choice import FIELDS, LayoutChoice, choose
from mlra_scale.planning.cluster import GIB, Cluster, cluster_of_device, named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file


@dataclass(frozen=True)
class Devices:
    """The devices of a start.

    Attributes:
        number: Of all of them, and of the ranks.
        per_node: Of a node; None: as many as the planner's cluster has, if they divide the ranks.
        kind: `cuda` or `cpu`.
        name: What the driver calls them; None: they cannot be seen from here.
        memory: Bytes of one; None: it cannot be seen from here.
    """

    number: int
    per_node: int | None
    kind: str
    name: str | None = None
    memory: float | None = None

    def is_known(self) -> bool:
        """Whether the planner has constants for them."""
        return self.name is not None and cluster_of_device(self.name) is not None


def devices_unseen(config: Config, world_size: int, per_node: int | None = None) -> Devices:
    """Returns the devices of a start that is planned on another machine: GPUs unless train.device is cpu."""
    return Devices(world_size, per_node, "cpu" if config.train.device == "cpu" else "cuda")


def memory_of_node() -> float:
    """Returns the bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def cluster_for(config: Config, devices: Devices) -> Cluster:
    """Returns what the planner plans with: constants that were measured or those of these devices, and their number.

    Args:
        config: cluster.file, cluster.device and cluster.device_memory_gib win over what is seen.
        devices: What is there.

    Raises:
        ConfigError: cluster.file cannot be used.
    """
    if config.cluster.file is not None:
        cluster = _measured(config, devices.kind)
    else:
        seen = None if devices.name is None else cluster_of_device(devices.name)
        name = config.cluster.device or seen or ("cpu" if devices.kind == "cpu" else "h100")
        cluster = named_cluster(name)
    per_node = devices.per_node or cluster.devices_per_node
    per_node = max(number for number in range(1, per_node + 1) if devices.number % number == 0)
    given = config.cluster.device_memory_gib
    memory = devices.memory if given is None else given * GIB
    return replace(
        cluster,
        nodes=devices.number // per_node,
        devices_per_node=per_node,
        memory=cluster.memory if memory is None else memory,
    )


def _measured(config: Config, kind: str) -> Cluster:
    assert config.cluster.file is not None
    cluster = read_cluster_file(Path(config.cluster.file), "cluster.file")
    remedy = None
    if config.cluster.device is not None:
        remedy = f"holds the constants of a device, and so does cluster.device={config.cluster.device}; leave one out"
    elif cluster.runs_ahead != (kind == "cuda"):
        others = "GPUs" if cluster.runs_ahead else "CPUs"
        remedy = f"was measured on {others}, and this is planned for {kind}; name a file of such devices, or none"
    if remedy is not None:
        raise ConfigError([Problem("cluster.file", config.cluster.file, remedy)])
    return cluster


def settled(config: Config, named: Named, devices: Devices) -> tuple[Config, LayoutChoice | None]:
    """Returns the configuration with its layout, and how that was chosen.

    Args:
        config: As it was given.
        named: What of it was named: those fields stay.
        devices: What is there.

    Returns:
        With parallel.layout=manual, or where every field of the layout is named, the configuration as it is and None.

    Raises:
        ConfigError: No layout is accepted by the validation, or none fits.
    """
    fixed = named.on_command_line | named.in_file
    if config.parallel.layout == "manual" or fixed >= set(FIELDS):
        return config, None
    choice = choose(config, named, cluster_for(config, devices))
    return choice.chosen.config, choice


def best(config: Config, devices: Devices) -> LayoutChoice:
    """Returns what the planner would choose if nothing of the layout were named.

    Raises:
        ConfigError: No layout is accepted by the validation, or none fits.
    """
    return choose(config, Named(), cluster_for(config, devices))
