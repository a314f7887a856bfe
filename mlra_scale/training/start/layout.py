"""The layout of a start: which cluster the planner plans for, and which layout it chooses. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlra_scale.config import Config, ConfigError, Named, Problem
from mlra_scale.config.json_text import printable
from mlra_scale.planning.choice import FIELDS, RECORD, LayoutChoice, choose
from mlra_scale.planning.cluster import GIB, Cluster, generation_of_device, named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file
from mlra_scale.planning.search import changed
from mlra_scale.training.start.device import Devices


def cluster_for(config: Config, devices: Devices) -> Cluster:
    """Returns the planner's constants, measured or of these devices, with the number of the devices.

    cluster.file, cluster.device and cluster.device_memory_gib override what is seen.

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
    given = config.cluster.device
    if given is not None and (given == "cpu") != (devices.kind == "cpu"):
        remedy = f"this is for {devices.kind} (train.device); name a device of that kind, or none"
        raise ConfigError([Problem("cluster.device", given, remedy)])
    if given is not None or devices.kind == "cpu":
        return named_cluster(given or "cpu")
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


def resolve_layout(config: Config, named: Named, devices: Devices) -> tuple[Config, LayoutChoice | None]:
    """Returns the configuration with its layout, and how the planner chose it; named fields stay as they are.

    Returns:
        The choice is None where there was nothing to choose: parallel.layout is manual, every field of the layout is
        named, or a cluster job has chosen for its ranks.

    Raises:
        ConfigError: No layout passes the validation, none fits, or a field of the cluster is wrong.
    """
    cluster = cluster_for(config, devices)
    if not is_layout_open(config, named):
        return config, None
    choice = choose(config, named, cluster)
    is_chosen = choice.kept != FIELDS or choice.chosen.config.deepspeed != config.deepspeed
    return choice.chosen.config, choice if is_chosen else None


def is_layout_open(config: Config, named: Named) -> bool:
    """Returns whether the planner has to choose: not where the layout is manual or was chosen for this start."""
    return config.parallel.layout == "auto" and not named.on_command_line >= {*FIELDS, RECORD}


def with_layout_of(chosen: Config, config: Config, named: Named) -> tuple[Config, Named]:
    """Returns a configuration with the layout of `chosen`, whose fields count as named from then on."""
    sections: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}, "deepspeed": chosen.deepspeed}
    for name in (*FIELDS, RECORD):
        section, _, field = name.partition(".")
        if field:
            sections[section][field] = getattr(getattr(chosen, section), field)
    return changed(config, sections), Named(named.on_command_line | {*FIELDS, RECORD}, named.in_file)


def best_layout(config: Config, devices: Devices) -> LayoutChoice:
    """Returns what the planner would choose if no field of the layout were named.

    Raises:
        ConfigError: No layout passes the validation, or none fits.
    """
    config = changed(config, {"parallel": {"named_layout_fields": None}})
    return choose(config, Named(), cluster_for(config, devices))
