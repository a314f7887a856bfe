"""Constants of a cluster that were measured on it, in a file that the planner reads. Imports no torch.

`sbatch slurm/check.sh` writes such a file. It is JSON, and may have been edited or copied from elsewhere: everything in
it is checked, and all that is wrong is reported at once.

    {"format": "mlra-scale cluster 1", "measured": ["link_intra", ...], "cluster": {every field of Cluster}}

Fields that are not in `measured` are those of the named cluster that `source` names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlra_scale.config import ConfigError, Problem
from mlra_scale.config.json_text import printable, read_json_object
from mlra_scale.config.problems import nearest
from mlra_scale.planning.cluster import Cluster

FORMAT = "mlra-scale cluster 1"
MAX_BYTES = 1 << 20
LONGEST_TEXT = 2000
REMEDY = "write the file anew: sbatch slurm/check.sh"

_MAY_BE_ZERO = {
    *("reserved", "latency_intra", "latency_inter", "block_overhead", "zero_overhead", "pipeline_overhead"),
    *("micro_batch_overhead", "step_overhead", "launch", "wait"),
}
"""Numbers that may be 0; all others are divided by."""
_BYTES, _RATES, _SECONDS = (2.0**20, 2.0**60), (1e3, 1e21), (0.0, 1e3)
_BOUNDS = {
    **dict.fromkeys(("memory", "reserved"), _BYTES),
    **dict.fromkeys(("peak_flops", "memory_bandwidth", "update_bandwidth", "link_intra", "link_inter"), _RATES),
    "utilization": (1e-6, 1.0),
}
"""Smallest and largest value by field, far beyond any device; outside of them estimates over- or underflow. All other
numbers are seconds. Those of _MAY_BE_ZERO may be 0 as well."""


def read_cluster_file(path: Path, source: str = "--cluster-file") -> Cluster:
    """Reads a cluster's constants.

    Args:
        path: A file of `write_cluster_file`.
        source: What named the file, for messages.

    Raises:
        ConfigError: The file cannot be read, or says what cannot be; with every fault, its field and its value.
    """
    where = f"{source} {printable(str(path))}"
    try:
        content = read_json_object(path, MAX_BYTES)
    except ValueError as error:
        raise ConfigError([Problem(source, str(path), f"{error}; {REMEDY}")]) from None
    problems = list(_problems(content))
    if problems:
        raise ConfigError([Problem(f"{where}: {each.field}", each.value, each.remedy) for each in problems])
    values = {name: _as_field(value) for name, value in content["cluster"].items()}
    return Cluster(**values)


def write_cluster_file(path: Path, cluster: Cluster, measured: Collection[str]) -> None:
    """Writes a cluster's constants.

    Args:
        path: The file.
        cluster: What it holds.
        measured: Names of the fields that were measured on it.

    Raises:
        OSError: It cannot be written.
        ConfigError: A constant is one that `read_cluster_file` would refuse.
    """
    content = {"format": FORMAT, "measured": sorted(measured), "cluster": asdict(cluster)}
    text = json.dumps(content, indent=2) + "\n"
    problems = list(_problems(json.loads(text)))
    if problems:
        raise ConfigError(problems)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _as_field(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _problems(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields everything that is wrong with the content of a file."""
    if content.get("format") != FORMAT:
        yield Problem("format", content.get("format"), f"must be {FORMAT!r}; {REMEDY}")
        return
    yield from _problems_of_keys("", content, {"format", "measured", "cluster"})
    cluster, measured = content.get("cluster"), content.get("measured", [])
    kinds = {field.name: str(field.type) for field in fields(Cluster)}
    if not isinstance(measured, list) or any(name not in kinds for name in map(str, measured)):
        yield Problem("measured", measured, f"must be a list of names of constants; {REMEDY}")
    if not isinstance(cluster, dict):
        yield Problem("cluster", cluster, f"must hold the constants; {REMEDY}")
        return
    yield from _problems_of_keys("cluster.", cluster, kinds)
    sound = set()
    for name, kind in kinds.items():
        if name in cluster:
            remedy = _fault(name, kind, cluster[name])
            if remedy is None:
                sound.add(name)
            else:
                yield Problem(f"cluster.{name}", cluster[name], remedy)
    if {"memory", "reserved"} <= sound and cluster["reserved"] >= cluster["memory"]:
        yield Problem("cluster.reserved", cluster["reserved"], f"must be less than cluster.memory, {cluster['memory']}")


def _problems_of_keys(section: str, given: Mapping[str, Any], known: Collection[str]) -> Iterator[Problem]:
    for name in sorted(given.keys() - set(known)):
        yield Problem(f"{section}{name}", given[name], f"is no field of such a file{nearest(name, known)}")
    for name in sorted(set(known) - given.keys()):
        yield Problem(f"{section}{name}", None, f"is missing; {REMEDY}")


def _fault(name: str, kind: str, value: Any) -> str | None:
    """Says what a constant must be; None where it is."""
    if kind == "str":
        is_text = isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()
        return None if is_text else f"must be text of 1 to {LONGEST_TEXT} printable characters"
    if kind == "bool":
        return None if isinstance(value, bool) else "must be true or false"
    if kind == "int":
        is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10**6
        return None if is_count else "must be a whole number from 1 to 1000000"
    least = "0 or more" if name in _MAY_BE_ZERO else "above 0"
    low, high = _BOUNDS.get(name, _SECONDS)
    if kind.startswith("tuple"):
        length = kind.count("float")
        is_row = isinstance(value, list) and len(value) == length
        is_row = is_row and all(_is_number(each, name) for each in value)
        is_row = is_row and all(_is_within(each, low, high) for each in value)
        return None if is_row else f"must be a list of {length} finite numbers, each {least} and at most {high:g}"
    if name == "utilization":
        is_share = _is_number(value, name) and _is_within(value, low, high)
        return None if is_share else f"must be a number above 0 and at most 1, and no less than {low:g}"
    if not _is_number(value, name):
        return f"must be a finite number {least}"
    return None if _is_within(value, low, high) else f"must be from {low:g} to {high:g}"


def _is_within(value: float, low: float, high: float) -> bool:
    return value == 0 or low <= value <= high


def _is_number(value: Any, name: str) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return value >= 0 if name in _MAY_BE_ZERO else value > 0
