"""Writing safetensors files tensor by tensor, and checkpoints of weights that come from elsewhere.

The safetensors library copies everything that goes into a file before it writes; here a file of any size needs the
memory of one piece of one tensor. The files are plain safetensors and open in every reader of that format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from mlra_scale.checkpoint import points
from mlra_scale.checkpoint.contents import (
    BUFFERS,
    json_bytes,
    library_versions,
    model_of,
    now,
    tensor_key,
    write_small_files,
)
from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.files import CHUNK_BYTES, FileEntry, faults_told, write_file
from mlra_scale.checkpoint.fragments import FRAGMENTS, joined, line_of
from mlra_scale.checkpoint.manifest import MANIFEST, Manifest, StoredParameter
from mlra_scale.config import stored_yaml, yaml_text
from mlra_scale.files import name_errors, sync
from mlra_scale.model.parameters import ParameterTable

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of the types that can be written."""

WEIGHTS_FILE_BYTES = 2**30
"""How large the files of a weights-only checkpoint become, unless a single tensor is larger."""

_LARGE_BYTES = 2**19

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
    before_chunk: Callable[[], None] = lambda: None,
) -> FileEntry:
    """Writes a new safetensors file in one pass and waits until it is on disk.

    Args:
        path: The file; it must not exist.
        specs: Type and shape of every tensor, in the order of the file. They make up the header, which comes first.
        tensors: The same names in the same order, each with its tensor; asked for one at a time.
        metadata: Text for the header.
        before_chunk: Called before each piece is written; may raise to end the writing.

    Returns:
        Size and checksum of what was written.

    Raises:
        OSError: The file cannot be written; what there is of it stays, for the caller to remove.
        ValueError: The tensors are not those that were announced.
    """
    header = _header(specs, metadata)
    announced = iter(specs.items())
    middle = len(header) + sum(map(num_bytes, specs.values())) // 2
    with name_errors(path), path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        points.reached("file-open")
        output = _Output(file, hashing, middle)
        output.write(memoryview(header))
        for name, tensor in tensors:
            expected = next(announced, None)
            if expected != (name, (tensor.dtype, tuple(tensor.shape))):
                raise ValueError(f"{path}: {expected} was announced, {name} {tensor.dtype} {tensor.shape} came")
            _write_tensor(output, tensor, before_chunk)
            del tensor  # before the next one comes
        if (missing := next(announced, None)) is not None:
            raise ValueError(f"{path}: {missing} was announced and did not come")
        os.fsync(file.fileno())
    return FileEntry(output.size, output.digest.hexdigest())


class _Output:
    """A file with the size and checksum of what has been written into it."""

    def __init__(self, file: FileIO, hashing: Executor, middle: int) -> None:
        self.file = file
        self.hashing = hashing
        self.middle = middle
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, piece: memoryview) -> None:
        """Writes all of it. The checksum of a large piece is computed meanwhile: both take about as long."""
        was_before_middle = self.size < self.middle
        self.size += len(piece)
        if len(piece) < _LARGE_BYTES:
            self.digest.update(piece)
            self._put(piece)
        else:
            hashed = self.hashing.submit(self.digest.update, piece)
            self._put(piece)
            hashed.result()
        if was_before_middle and self.size >= self.middle:
            points.reached("mid-file")

    def _put(self, piece: memoryview) -> None:
        while piece:  # the system may take less at a time
            piece = piece[self.file.write(piece) :]


def _write_tensor(output: _Output, tensor: torch.Tensor, before_chunk: Callable[[], None]) -> None:
    """Writes the tensor's bytes, a chunk at a time: what lies on a GPU comes over in chunks too."""
    flat = tensor.detach().reshape(-1)
    step = CHUNK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        before_chunk()
        output.write(flat[start : start + step].cpu().view(torch.uint8).numpy().data)


def num_bytes(spec: TensorSpec) -> int:
    """Returns the size of a tensor."""
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, filled up with spaces so that the first tensor is aligned for mapping."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in specs.items():
        stop = offset + num_bytes((dtype, shape))
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_weights(
    folder: Path,
    model_values: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer: Path | None,
    origin: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a checkpoint of weights alone (kind "weights"), the start of a new run; one process, streaming.

    Args:
        folder: The checkpoint to make; it must not exist. It appears when it is complete.
        model_values: The `model:` section of the configuration.
        tensors: Every parameter by canonical name, in the order of ParameterTable, of its global (padded) shape; asked
            for one at a time and stored as fp32.
        tokenizer: The folder of the tokenizer, to be copied; None where there is none.
        origin: Where the weights come from, as JSON values: `state["origin"]` of the checkpoint.
        buffers: Small tensors beside the parameters, by name.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder exists or cannot be written, or the tensors are not those of the model.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists; name a folder that does not")
    table = ParameterTable(model_of(dict(model_values), folder))
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    with faults_told("written", unfinished):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        try:
            save_id = uuid4().hex
            files = _write_parameters(unfinished, save_id, table, _checked(tensors, table))
            config_text = yaml_text.dump(stored_yaml.with_version({"model": dict(model_values)}))
            if buffers:
                specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in buffers.items()}
                metadata = {"save_id": save_id}
                files[BUFFERS] = write_safetensors(unfinished / BUFFERS, specs, buffers.items(), metadata)
            files |= write_small_files(unfinished, json_bytes({"origin": dict(origin)}), config_text, tokenizer)
            manifest = Manifest(
                save_id=save_id,
                kind="weights",
                step=0,
                created=now(),
                layout={"world_size": 1, "tensor": 1, "pipeline": 1, "data": 1, "precision": "fp32"},
                has_moments=False,
                versions=library_versions(),
                files=files,
                parameters={name: StoredParameter(info.shape, info.shard_dim) for name, info in table.items()},
            )
            write_file(unfinished / MANIFEST, manifest.to_json())
            sync(unfinished)
            unfinished.rename(folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder


def _write_parameters(
    folder: Path, save_id: str, table: ParameterTable, tensors: Iterator[tuple[str, torch.Tensor]]
) -> dict[str, FileEntry]:
    """Writes the files with the weights, one whole parameter after the other, and fragments.json."""
    files: dict[str, FileEntry] = {}
    lines = []
    for number, names in enumerate(_shares(table)):
        file = f"weights-{number:05d}.safetensors"
        specs = {tensor_key("weight", name, 0): (torch.float32, (table[name].numel(),)) for name in names}
        taken = islice(tensors, len(names))
        share = ((tensor_key("weight", name, 0), tensor.reshape(-1)) for name, tensor in taken)
        files[file] = write_safetensors(folder / file, specs, share, {"save_id": save_id})
        lines.append(line_of(file, 0, [(name, 0, table[name].numel()) for name in names]))
    next(tensors, None)  # lets _checked see whether there is more than the model has
    files[FRAGMENTS] = write_file(folder / FRAGMENTS, joined(lines))
    return files


def _shares(table: ParameterTable) -> Iterator[list[str]]:
    """The parameters of each file."""
    names: list[str] = []
    size = 0
    for name, info in table.items():
        if names and size + 4 * info.numel() > WEIGHTS_FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 4 * info.numel()
    yield names


def _checked(tensors: Iterable[tuple[str, torch.Tensor]], table: ParameterTable) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes the tensors on as fp32; raises CheckpointError where they are not those of the table."""
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
        raise CheckpointError(f"the weights go on with {extra[0]}, which the model section does not know")
