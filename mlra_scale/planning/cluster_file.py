"""Constants of a cluster that were measured on it, in a file that the planner reads. Imports no torch.

`sbatch slurm/check.sh` writes such a file. It is JSON, and may have been edited or copied from elsewhere: everything in
it is checked, and all faults are reported at once.

    {"format": "mlra-scale cluster 1", "measured": ["link_intra", ...], "cluster": {every field of Cluster}}

Fields that are not in `measured` are those of the named cluster that `source` names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlra_scale.config import ConfigError, Problem
from mlra_scale.config.json_text import printable, read_json_object
from mlra_scale.config.problems import REQUIRED, nearest, problems_of
from mlra_scale.config.section import Section
from mlra_scale.files import write_atomically
from mlra_scale.planning.cluster import Cluster

FORMAT = "mlra-scale cluster 1"
MAX_BYTES = 1 << 20
REMEDY = "write the file anew: sbatch slurm/check.sh"
_FIELDS = {field.name for field in fields(Cluster)}
_VALUES = TypeAdapter(Cluster)


def read_cluster_file(path: Path, source: str = "--cluster-file") -> Cluster:
    """Reads a cluster's constants; `source` says in messages what named the file.

    Raises:
        ConfigError: The file cannot be read or has wrong values; with every fault, its field and its value.
    """
    where = f"{source} {printable(str(path))}"
    try:
        content = read_json_object(path, MAX_BYTES)
    except ValueError as error:
        raise ConfigError([Problem(source, str(path), f"{error}; {REMEDY}")]) from None
    if problems := list(_problems(content)):
        raise ConfigError([Problem(f"{where}: {each.field}", each.value, each.remedy) for each in problems])
    return _VALUES.validate_python(content["cluster"])


def write_cluster_file(path: Path, cluster: Cluster, measured: Collection[str]) -> None:
    """Writes a cluster's constants, of which some fields were measured on it.

    Raises:
        OSError: It cannot be written.
        ConfigError: A constant is one that `read_cluster_file` would refuse.
    """
    content = {"format": FORMAT, "measured": sorted(measured), "cluster": asdict(cluster)}
    if problems := list(_problems(content)):
        raise ConfigError(problems)
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _problems(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields everything that is wrong with the content of a file."""
    if content.get("format") != FORMAT:
        yield Problem("format", content.get("format"), f"must be {FORMAT!r}; {REMEDY}")
        return
    yield from _key_problems("", content, {"format", "measured", "cluster"})
    cluster, measured = content.get("cluster"), content.get("measured", [])
    if not isinstance(measured, list) or not set(map(str, measured)) <= _FIELDS:
        yield Problem("measured", measured, f"must be a list of names of constants; {REMEDY}")
    if not isinstance(cluster, dict):
        yield Problem("cluster", cluster, f"must hold the constants; {REMEDY}")
        return
    yield from _key_problems("cluster.", cluster, _FIELDS)
    try:
        found = _VALUES.validate_python({name: value for name, value in cluster.items() if name in _FIELDS})
    except ValidationError as error:
        for problem in problems_of(error, Section):
            if problem.remedy != REQUIRED:
                yield Problem(f"cluster.{problem.field}", problem.value, problem.remedy)
    else:
        if found.reserved >= found.memory:
            yield Problem("cluster.reserved", found.reserved, f"must be less than cluster.memory, {found.memory}")


def _key_problems(section: str, given: Mapping[str, Any], known: Collection[str]) -> Iterator[Problem]:
    for name in sorted(given.keys() - set(known)):
        yield Problem(f"{section}{name}", given[name], f"is no field of such a file{nearest(name, known)}")
    for name in sorted(set(known) - given.keys()):
        yield Problem(f"{section}{name}", None, f"is missing; {REMEDY}")
