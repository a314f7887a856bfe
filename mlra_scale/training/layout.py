"""The layout of a start: which devices the planner plans for, and what it chooses. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlra_scale.config import Config, ConfigError, Named, Problem
from mlra_scale.config.json_text import printable
from mlra_scale.planning.choice import FIELDS, RECORD, LayoutChoice, choose
from mlra_scale.planning.cluster import GIB, Cluster, cluster_of_device, generation_of_device, named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file
from mlra_scale.planning.search import changed


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
    """Returns the devices of a start that is planned on another machine: GPUs unless a field says cpu."""
    is_cpu = config.train.device == "cpu" or (config.train.device == "auto" and config.cluster.device == "cpu")
    return Devices(world_size, per_node, "cpu" if is_cpu else "cuda")


def memory_of_node() -> float:
    """Returns the bytes of this machine's memory that this process may use: what a container or a job leaves of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits_of_groups(Path("/"))]
    in_mib = os.environ.get("SLURM_MEM_PER_NODE", "")
    if in_mib.isdecimal() and int(in_mib) > 0:
        limits.append(int(in_mib) * 2**20)
    return float(min(limits))


def _limits_of_groups(root: Path) -> list[int]:
    """Returns the limits in bytes that the control groups of this process have (version 2), and those around them."""
    limits = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
        mounted = root / "sys/fs/cgroup"
        for folder in (mounted / own, *(mounted / own).parents):
            with contextlib.suppress(OSError, ValueError):  # the root has no limit, and `max` is none
                limits.append(int((folder / "memory.max").read_text()))
            if folder == mounted:
                break
    return limits


def cluster_for(config: Config, devices: Devices) -> Cluster:
    """Returns what the planner plans with: constants that were measured or those of these devices, and their number.

    Args:
        config: cluster.file, cluster.device and cluster.device_memory_gib win over what is seen.
        devices: What is there.

    Raises:
        ConfigError: cluster.file cannot be used, or cluster.device is of another kind than the devices.
    """
    cluster = _measured(config, devices.kind) if config.cluster.file is not None else _named(config, devices)
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


def _named(config: Config, devices: Devices) -> Cluster:
    asked = config.cluster.device
    if asked is not None and (asked == "cpu") != (devices.kind == "cpu"):
        remedy = f"this is for {devices.kind} (train.device); name a device of that kind, or none"
        raise ConfigError([Problem("cluster.device", asked, remedy)])
    if asked is not None or devices.kind == "cpu":
        return named_cluster(asked or "cpu")
    cluster = named_cluster("h100" if devices.name is None else generation_of_device(devices.name) or "h100")
    if devices.name is None or devices.is_known():
        return cluster
    name = f"{printable(devices.name)}, for which the planner has no constants: those of {cluster.name}"
    return replace(cluster, name=f"({name})")


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
        With parallel.layout=manual, and for the ranks of a job, which has chosen, the configuration as it is and None;
        where every field of the layout is named, None too.

    Raises:
        ConfigError: No layout is accepted by the validation, or none fits; or what is said of the cluster is wrong.
    """
    cluster = cluster_for(config, devices)
    if not is_open(config, named):
        return config, None
    choice = choose(config, named, cluster)
    is_chosen = choice.kept != FIELDS or choice.chosen.config.deepspeed != config.deepspeed
    return choice.chosen.config, choice if is_chosen else None


def is_open(config: Config, named: Named) -> bool:
    """Whether the planner has to look at the layout: not where it is manual, or has been chosen for this start."""
    return config.parallel.layout == "auto" and not named.on_command_line >= {*FIELDS, RECORD}


def kept_layout(config: Config, named: Named, chosen: Config) -> tuple[Config, Named]:
    """Returns a configuration with the layout of another one, and with it what counts as named: nothing is chosen.

    Args:
        config: As it was given.
        named: What of it was named.
        chosen: The configuration with a layout that the planner has chosen.
    """
    names = {name: name.partition(".") for name in (*FIELDS, RECORD) if name != "deepspeed"}
    sections: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}, "deepspeed": chosen.deepspeed}
    for section, _, field in names.values():
        sections[section][field] = getattr(getattr(chosen, section), field)
    return changed(config, sections), Named(named.on_command_line | {*FIELDS, RECORD}, named.in_file)


def best(config: Config, devices: Devices) -> LayoutChoice:
    """Returns what the planner would choose if nothing of the layout were named.

    Raises:
        ConfigError: No layout is accepted by the validation, or none fits.
    """
    config = changed(config, {"parallel": {"named_layout_fields": None}})
    return choose(config, Named(), cluster_for(config, devices))
