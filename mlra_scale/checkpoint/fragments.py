"""fragments.json: which elements of which parameter lie in which file.

One line per file, so that ranks can write their own lines and rank 0 only joins them:

    {"rank-00000.safetensors": {"tensor_rank": 0, "runs": [["embedding.weight", 0, 4096], ...]}, ...}

A run is a parameter, its first element in the tensor-parallel shard flattened row by row, and the number of elements.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.manifest import Manifest, StoredParameter
from mlra_scale.checkpoint.placement import shard_of
from mlra_scale.config.json_text import parse_json

FRAGMENTS = "fragments.json"
Run = tuple[str, int, int]


class StoredFragment(NamedTuple):
    """A run of elements of one parameter in one file; with ZeRO 3 there are millions on thousands of ranks.

    Attributes:
        file: Name of the file in the checkpoint's folder.
        name: Canonical parameter name.
        start: First element, counted in the tensor-parallel shard flattened row by row.
        numel: Number of elements, at least one.
        tensor_rank: Whose tensor-parallel shard it is; 0 where every rank holds the whole tensor.
    """

    file: str
    name: str
    start: int
    numel: int
    tensor_rank: int


def line_of(file: str, tensor_rank: int, runs: Sequence[Run]) -> bytes:
    """Returns the line of a file."""
    return f"{json.dumps(file)}: {json.dumps({'tensor_rank': tensor_rank, 'runs': runs})}".encode("ascii")


def joined(lines: Iterable[bytes]) -> bytes:
    """Returns the content of fragments.json."""
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def parse(content: bytes, manifest: Manifest, path: Path) -> list[StoredFragment]:
    """Reads fragments.json and checks that every element of every parameter is stored once.

    Args:
        content: The file's content.
        manifest: Of the checkpoint.
        path: The file, for errors.

    Raises:
        CheckpointError: It is not so.
    """
    found = []
    try:
        for file, entry in parse_json(content, "the file").items():
            if file not in manifest.files:
                raise ValueError(f"the manifest does not list {file}")
            tensor_rank = entry["tensor_rank"]
            for name, start, numel in entry["runs"]:
                if type(start) is not int or type(numel) is not int or type(tensor_rank) is not int:
                    raise ValueError(f"{name} has a run from {start!r} of {numel!r} elements")
                is_split = manifest.parameters[name].shard_dim is not None
                found.append(StoredFragment(file, name, start, numel, tensor_rank if is_split else 0))
        faults = _coverage_faults(found, manifest.parameters, manifest.tensor)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not sound ({type(error).__name__}: {error}); use another checkpoint"
        ) from error
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(f"{path} does not cover the model: {faults[0]}{more}; use another checkpoint")
    return found


def _coverage_faults(
    fragments: Iterable[StoredFragment], parameters: Mapping[str, StoredParameter], tensor: int
) -> list[str]:
    """What elements are missing or stored twice."""
    runs: dict[tuple[str, int], list[StoredFragment]] = defaultdict(list)
    for piece in fragments:
        runs[piece.name, piece.tensor_rank].append(piece)
    faults = []
    for name, parameter in parameters.items():
        for rank in range(1 if parameter.shard_dim is None else tensor):
            expected = shard_of(parameter.shape, parameter.shard_dim, tensor, rank).numel()
            if fault := _coverage_fault(runs.pop((name, rank), []), expected):
                faults.append(f"{name}, tensor rank {rank}: {fault}")
    return faults + [f"{name}, tensor rank {rank}: there is no such shard" for name, rank in runs]


def _coverage_fault(pieces: list[StoredFragment], expected: int) -> str | None:
    """Where runs of elements leave a gap, overlap or end too early or too late."""
    position = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start != position or piece.numel < 1:
            kind = "are missing" if piece.start > position else "are stored twice"
            low, high = sorted((piece.start, position))
            return f"elements {low} to {high - 1} {kind} ({piece.file})"
        position += piece.numel
    if position != expected:
        return f"{position} elements are stored, the shard has {expected}"
    return None
