"""What must be the same on all nodes of a job; without importing any of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

_LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy", "safetensors", "pydantic")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that compute, and a digest of this package's own files."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    digest = hashlib.sha256()
    folder = Path(__file__).resolve().parents[1]
    for path in sorted(folder.rglob("*.py")):
        try:
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
        except OSError as error:
            return {**found, "mlra_scale": f"unreadable ({path.name}: {error.strerror})"}
    return {**found, "mlra_scale": digest.hexdigest()[:12]}


def odd_ones(of_nodes: Mapping[str, Mapping[str, str]], mine: Mapping[str, str]) -> dict[str, str]:
    """Returns what differs on nodes whose versions are not those of most of them, by node.

    Where as many nodes have the versions of the job itself (`mine`) as any others, those are right.
    """
    counted = Counter(tuple(sorted(found.items())) for found in of_nodes.values())
    own = tuple(sorted(mine.items()))
    right = dict(max(counted.items(), key=lambda item: (item[1], item[0] == own))[0])
    return {
        node: "has " + ", ".join(f"{name} {found.get(name)} instead of {right[name]}" for name in differing)
        for node, found in of_nodes.items()
        if (differing := [name for name in right if found.get(name) != right[name]])
    }
