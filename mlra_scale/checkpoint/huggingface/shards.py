"""Writes an export's tensors into one safetensors file or several with an index, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import FileEntry, write_file
from mlra_scale.checkpoint.huggingface.tensors import ExportTensor
from mlra_scale.checkpoint.writer import num_bytes, write_safetensors

INDEX = "model.safetensors.index.json"
# transformers refuses files that do not say which library their tensors are for.
_METADATA = {"format": "pt"}


def write_shards(
    folder: Path, tensors: Sequence[ExportTensor], dtype: torch.dtype, max_bytes: int
) -> dict[str, FileEntry]:
    """Writes the weights of an export.

    Args:
        folder: Where the files go.
        tensors: What to write; each is made when its turn comes and dropped afterwards.
        dtype: The written type.
        max_bytes: Largest size of a file's tensors, unless a single tensor is larger.

    Returns:
        Size and checksum of every file, by name.

    Raises:
        OSError: A file cannot be written.
        CheckpointError: A weight is larger than the type can tell.
    """
    shards = list(_divided(tensors, dtype, max_bytes))
    files: dict[str, FileEntry] = {}
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = {tensor.name: (dtype, tensor.shape) for tensor in shard}
        made = ((tensor.name, _in_type(tensor, dtype)) for tensor in shard)
        files[name] = write_safetensors(folder / name, specs, made, _METADATA)
        places |= dict.fromkeys(specs, name)
    if len(shards) > 1:
        size = sum(num_bytes((dtype, tensor.shape)) for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        files[INDEX] = write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return files


def _in_type(tensor: ExportTensor, dtype: torch.dtype) -> torch.Tensor:
    """Makes a tensor in the written type. No text touches every weight, so that an infinite one might go unseen."""
    values = tensor.make()
    written = values.to(dtype)
    if dtype.itemsize < 4:
        limits, largest = torch.stack(written.aminmax()), torch.finfo(dtype).max
        if limits.isinf().any() and not torch.stack(values.aminmax()).isinf().any():
            raise CheckpointError(f"{tensor.name} has values beyond {largest:g}, where {dtype} ends; use another type")
    return written


def _divided(tensors: Sequence[ExportTensor], dtype: torch.dtype, max_bytes: int) -> Iterator[list[ExportTensor]]:
    shard: list[ExportTensor] = []
    filled = 0
    for tensor in tensors:
        size = num_bytes((dtype, tensor.shape))
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += size
    yield shard
