"""Writing a safetensors file tensor by tensor.

The safetensors library copies everything that goes into a file before it writes; here a file of any size needs the
memory of one piece of one tensor. The files are plain safetensors and open in every reader of that format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from mlra_scale.checkpoint import failpoints
from mlra_scale.checkpoint.files import FileEntry
from mlra_scale.files import name_errors

CHUNK_BYTES = 8 * 2**20
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""
NamedTensors = list[tuple[str, torch.Tensor]]


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
        specs: Every tensor of the file, in order; with `metadata` they make up the header, which comes first.
        tensors: The same names in the same order, each with its tensor; asked for one at a time.
        metadata: Text for the header.
        before_chunk: Called before each piece is written; may raise to end the writing.

    Raises:
        OSError: The file cannot be written; the caller removes the part of it that was.
        ValueError: The tensors are not those of `specs`.
    """
    header = _header(specs, metadata)
    announced = iter(specs.items())
    middle = len(header) + sum(map(num_bytes, specs.values())) // 2
    with name_errors(path), path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        failpoints.reached("file-open")
        output = _HashedFile(file, hashing, middle)
        output.write(memoryview(header))
        for name, tensor in tensors:
            expected = next(announced, None)
            if expected != (name, (tensor.dtype, tuple(tensor.shape))):
                raise ValueError(f"{path}: {expected} was announced, {name} {tensor.dtype} {tensor.shape} came")
            flat = tensor.detach().reshape(-1)
            step = CHUNK_BYTES // flat.element_size()
            for start in range(0, flat.numel(), step):  # in pieces: a tensor on a GPU is copied to the host in pieces
                before_chunk()
                output.write(flat[start : start + step].cpu().view(torch.uint8).numpy().data)
            del tensor, flat  # before the next one is made
        if (missing := next(announced, None)) is not None:
            raise ValueError(f"{path}: {missing} was announced and did not come")
        os.fsync(file.fileno())
    return FileEntry(output.size, output.digest.hexdigest())


def num_bytes(spec: TensorSpec) -> int:
    """Returns the size of a tensor."""
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Returns the spec of a tensor."""
    return tensor.dtype, tuple(tensor.shape)


class _HashedFile:
    """A file with the size and checksum of what has been written into it."""

    def __init__(self, file: FileIO, hashing: ThreadPoolExecutor, middle: int) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._file, self._hashing, self._middle = file, hashing, middle

    def write(self, piece: memoryview) -> None:
        """Writes all of it. The checksum is computed meanwhile: both take about as long."""
        was_before_middle = self.size < self._middle
        self.size += len(piece)
        hashed = self._hashing.submit(self.digest.update, piece)
        while piece:  # the system may take less at a time
            piece = piece[self._file.write(piece) :]
        hashed.result()
        if was_before_middle and self.size >= self._middle:
            failpoints.reached("mid-file")


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, filled up with spaces so that the first tensor is aligned for mapping."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in specs.items():
        stop = offset + num_bytes((dtype, shape))
        entries[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
