"""Large indices of an epoch (one_epoch.py) in a folder beside the data: built once, checked at every start."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.config.json_text import read_json_object
from mlra_scale.data.blocks import sha256_of_file
from mlra_scale.files import lock, sync_tree

_NAMES = ("documents.npy", "samples.npy")
_SUMS = "sha256.json"

Indices = tuple[NDArray, NDArray]
"""Document index and sample index of an epoch."""


def cached_indices(cache: Path, identity: str, build: Callable[[], Indices]) -> Indices | None:
    """Returns the indices of `identity` memory-mapped from a folder; builds them where they are missing or damaged.

    On a file system without locks several builders may do the same work; the first rename wins.

    Returns:
        The indices; None where the folder cannot be used, so that they stay in memory.
    """
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:24]
    try:
        if _damaged(folder):
            cache.mkdir(exist_ok=True)
            with open(cache / "lock", "wb") as stream:
                lock(stream.fileno(), math.inf)
                if _damaged(folder):  # else: another process built them meanwhile
                    _write(folder, build())
        documents, samples = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in _NAMES)
    except (OSError, ValueError):  # a read-only or full disk
        return None
    return documents, samples


def damaged_caches(cache: Path) -> list[Path]:
    """Returns the files of finished indices in a cache that are damaged; a later start builds them anew."""
    # Folders without sums are unfinished, or of an earlier version: they are built anew as well.
    folders = sorted(path.parent for path in cache.glob(f"*/{_SUMS}") if not path.parent.name.startswith("building-"))
    return [folder / name for folder in folders for name in _damaged(folder)]


def _damaged(folder: Path) -> list[str]:
    """Names of the files that are not, or are not known to be, what was written."""
    try:
        sums = read_json_object(folder / _SUMS)
        return [name for name in _NAMES if sha256_of_file(folder / name) != sums[name]]
    except (OSError, ValueError, LookupError):
        return [_SUMS]


def _write(folder: Path, indices: Indices) -> None:
    """Writes the indices so that `folder` appears whole or not at all; a damaged one is replaced, a whole one stays."""
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent, ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        temporary.chmod(0o755)
        for file, array in zip(_NAMES, indices, strict=True):
            np.save(temporary / file, array, allow_pickle=False)
        sums = {file: sha256_of_file(temporary / file) for file in _NAMES}
        (temporary / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
        sync_tree(temporary)
        if _damaged(folder):  # a whole one stays: another process may have mapped it
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.rename(temporary, folder)
            except OSError:
                if _damaged(folder):  # else: another process was faster
                    raise
