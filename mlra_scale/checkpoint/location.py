"""Which checkpoint a path means: the checkpoint itself, or the newest complete one of a run."""

from __future__ import annotations

from pathlib import Path

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.manifest import MANIFEST
from mlra_scale.checkpoint.retention import newest_complete

CHECKPOINTS = "checkpoints"


def checkpoint_at(path: Path) -> Path:
    """Finds the checkpoint that a path means.

    Args:
        path: A checkpoint, a folder of checkpoints, or a run directory.

    Returns:
        The checkpoint's folder; of a run, the complete checkpoint that was saved last.

    Raises:
        CheckpointError: There is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint, or the run directory that it is in")
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / CHECKPOINTS, path):
        if (found := newest_complete(folder)) is not None:
            return found
    raise CheckpointError(
        f"{path} holds no complete checkpoint: neither {MANIFEST}, nor folders step-... with one, nor a folder "
        f"{CHECKPOINTS} with these"
    )
