"""Checkpoints: one format for every layout, safe to write at any moment. The format is in docs/checkpoints.md."""

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.reader import Store
from mlra_scale.checkpoint.writer import write_safetensors, write_weights

__all__ = ["CheckpointError", "Store", "write_safetensors", "write_weights"]
