"""Which checkpoint a path means: the checkpoint itself, or the newest complete one of a run."""

from __future__ import annotations

import re
from pathlib import Path

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.manifest import MANIFEST

_NAME = re.compile(r"step-\d{8,}")


def checkpoint_at(path: Path) -> Path:
    """Finds the checkpoint that a path means.

    Args:
        path: A checkpoint, a folder of checkpoints, or a run directory.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: There is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint, or the run directory that it is in")
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        # A checkpoint gets its name when it is complete.
        complete = [
            entry for entry in folder.glob("step-*") if _NAME.fullmatch(entry.name) and (entry / MANIFEST).is_file()
        ]
        if complete:
            return max(complete, key=lambda entry: int(entry.name.removeprefix("step-")))
    raise CheckpointError(
        f"{path} holds no complete checkpoint: neither {MANIFEST}, nor folders step-... with one, nor a folder "
        "checkpoints with these"
    )
