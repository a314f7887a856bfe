"""Checkpoints: one format for every layout, safe to write at any moment. The format is in docs/checkpoints.md."""

from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.loading import load_checkpoint
from mlra_scale.checkpoint.reader import Store
from mlra_scale.checkpoint.retention import (
    checkpoint_at,
    checkpoint_name,
    complete_checkpoints,
    latest,
    newest_complete,
    prune,
)
from mlra_scale.checkpoint.safetensors_file import write_safetensors
from mlra_scale.checkpoint.saver import FinishedSave, Saver
from mlra_scale.checkpoint.weights import write_weights

__all__ = [
    "CheckpointError",
    "FinishedSave",
    "Saver",
    "Store",
    "checkpoint_at",
    "checkpoint_name",
    "complete_checkpoints",
    "latest",
    "load_checkpoint",
    "newest_complete",
    "prune",
    "write_safetensors",
    "write_weights",
]
