"""Checkpoints of weights alone (kind "weights"): the start of a new run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from mlra_scale.checkpoint.files import CheckpointError, FileEntry, system_errors, write_file
from mlra_scale.checkpoint.fragments import FRAGMENTS, join_lines, line_of, tensor_key
from mlra_scale.checkpoint.manifest import MANIFEST, Manifest, library_versions, now, stored_parameters
from mlra_scale.checkpoint.safetensors_file import write_safetensors
from mlra_scale.checkpoint.state_contents import json_bytes, parse_model, write_small_files
from mlra_scale.config import stored_yaml, yaml_text
from mlra_scale.files import new_folder
from mlra_scale.model.parameters import ParameterTable

FILE_BYTES = 2**30
"""How large the files become, unless a single tensor is larger."""


def write_weights(
    folder: Path,
    model_values: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer: Path | None,
    origin: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a checkpoint of weights alone, and returns its folder; one process, one tensor in memory at a time.

    Args:
        folder: The checkpoint to make; it must not exist. It appears when it is complete.
        model_values: The `model:` section of the configuration.
        tensors: Every parameter in the order of ParameterTable, of its global (padded) shape; stored as fp32.
        tokenizer: A tokenizer's folder, to be copied.
        origin: Where the weights come from, as JSON values: `state["origin"]` of the checkpoint.
        buffers: Small tensors beside the parameters, by name.

    Raises:
        CheckpointError: The folder exists or cannot be written, or the tensors are not those of the model.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists; name a folder that does not")
    table = ParameterTable(parse_model(dict(model_values), folder))
    busy = CheckpointError(f"{folder} is being written by another process; wait for it or name another folder")
    with system_errors("written", folder), new_folder(folder, busy) as unfinished:
        save_id = uuid4().hex
        files = _write_parameters(unfinished, save_id, table, _checked(tensors, table))
        config_text = yaml_text.dump(stored_yaml.with_version({"model": dict(model_values)}))
        state, small = json_bytes({"origin": dict(origin)}), list((buffers or {}).items())
        files |= write_small_files(unfinished, save_id, state, small, config_text, tokenizer)
        manifest = Manifest(
            save_id=save_id,
            kind="weights",
            step=0,
            created=now(),
            layout={"world_size": 1, "tensor": 1, "pipeline": 1, "data": 1, "precision": "fp32"},
            has_moments=False,
            versions=library_versions(),
            files=files,
            parameters=stored_parameters(table),
        )
        write_file(unfinished / MANIFEST, manifest.to_json())
    return folder


def _write_parameters(
    folder: Path, save_id: str, table: ParameterTable, tensors: Iterator[tuple[str, torch.Tensor]]
) -> dict[str, FileEntry]:
    """Writes the files with the weights, one whole parameter after the other, and fragments.json."""
    files: dict[str, FileEntry] = {}
    lines = []
    for number, names in enumerate(_names_of_files(table)):
        file = f"weights-{number:05d}.safetensors"
        specs = {tensor_key("weight", name, 0): (torch.float32, (table[name].numel(),)) for name in names}
        taken = islice(tensors, len(names))
        flat = ((tensor_key("weight", name, 0), tensor.reshape(-1)) for name, tensor in taken)
        files[file] = write_safetensors(folder / file, specs, flat, {"save_id": save_id})
        lines.append(line_of(file, 0, [(name, 0, table[name].numel()) for name in names]))
    next(tensors, None)  # lets _checked see whether there is more than the model has
    files[FRAGMENTS] = write_file(folder / FRAGMENTS, join_lines(lines))
    return files


def _names_of_files(table: ParameterTable) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, info in table.items():
        if names and size + 4 * info.numel() > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * info.numel()
    yield names


def _checked(tensors: Iterable[tuple[str, torch.Tensor]], table: ParameterTable) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors as fp32; raises CheckpointError where they are not those of the table."""
    incoming = iter(tensors)
    for name, info in table.items():
        came, tensor = next(incoming, (None, None))
        if tensor is None:
            raise CheckpointError(f"the weights end before {name}, which the model section asks for")
        if came != name or tuple(tensor.shape) != info.shape:
            shape = tuple(tensor.shape)
            raise CheckpointError(f"the model section asks for {name} {info.shape}, given is {came} {shape}")
        yield name, tensor.to(torch.float32)
    if (extra := next(incoming, None)) is not None:
        raise CheckpointError(f"the weights continue with {extra[0]}, which the model section does not know")
