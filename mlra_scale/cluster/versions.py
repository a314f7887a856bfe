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
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return {**found, "mlra_scale": digest.hexdigest()[:12]}


def odd_ones(of_nodes: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Finds the nodes whose versions are not those of most of them.

    Args:
        of_nodes: What `versions` returned on each node; where no two agree, the first node counts as right.

    Returns:
        By node, what differs.
    """
    common = Counter(tuple(sorted(found.items())) for found in of_nodes.values()).most_common(1)[0][0]
    right = dict(common)
    return {
        node: "has " + ", ".join(f"{name} {found.get(name)} instead of {right[name]}" for name in differing)
        for node, found in of_nodes.items()
        if (differing := [name for name in right if found.get(name) != right[name]])
    }
