"""Which elements of which parameter lie in which file, and copying between fragments of any two layouts.

A fragment is a run of consecutive elements of one tensor-parallel rank's shard, flattened row by row. The shard is a
rectangle of the global tensor, seen as a matrix (a vector is a matrix of one column), so a run is at most three
rectangles: the end of its first row, whole rows, the beginning of its last row. What two fragments have in common is
therefore a few rectangles too, each of them one strided copy, whatever the two layouts are.

fragments.json has one line per file, so that each rank can write its own line and rank 0 only joins them:

    {"rank-00000.safetensors": {"tensor_rank": 0, "runs": [["embedding.weight", 0, 4096], ...]}, ...}

A run is a parameter, its first element in the flattened shard, and the number of elements.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.manifest import Manifest, StoredParameter
from mlra_scale.config.json_text import parse_json

if TYPE_CHECKING:
    from mlra_scale.parallel.fragments import Fragment

FRAGMENTS = "fragments.json"

Part = Literal["weight", "exp_avg", "exp_avg_sq"]
PARTS: tuple[Part, ...] = ("weight", "exp_avg", "exp_avg_sq")
"""What is stored of a parameter: the weight, and in a checkpoint with moments those that its optimizer keeps."""
ElementRun = tuple[str, int, int]
"""Parameter, first element, number of elements: an entry of `runs` in fragments.json."""


def parts_of(fragment: Fragment) -> Iterator[tuple[Part, torch.Tensor]]:
    """Yields the weight of a fragment, and those of its moments that it has."""
    for part, tensor in zip(PARTS, (fragment.values, fragment.exp_avg, fragment.exp_avg_sq), strict=True):
        if tensor is not None:
            yield part, tensor


def tensor_key(part: Part, name: str, start: int) -> str:
    """Returns the name of a fragment's tensor in its safetensors file."""
    return f"{part}/{name}/{start}"


class StoredFragment(NamedTuple):
    """A run of elements of one parameter in one file; with ZeRO 3 there are millions on thousands of ranks.

    `tensor_rank` says whose shard `start` counts in; it is 0 where every rank holds the whole tensor.
    """

    file: str
    name: str
    start: int
    numel: int
    tensor_rank: int


class Box(NamedTuple):
    """A rectangle of the global matrix, `rows` x `columns` from (`row`, `column`) on.

    Its elements lie one after the other in a tensor, row by row, from `offset` on.
    """

    row: int
    column: int
    rows: int
    columns: int
    offset: int = 0

    @property
    def end_row(self) -> int:
        """One past its last row."""
        return self.row + self.rows

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns (rows, columns) of a tensor of one or two dimensions seen as a matrix."""
    assert 1 <= len(shape) <= 2, shape
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def shard_of(shape: Sequence[int], shard_dim: int | None, tensor_parallel: int, tensor_rank: int) -> Box:
    """Returns the rectangle that a tensor-parallel rank holds of a parameter of this global shape."""
    rows, columns = matrix_shape(shape)
    if shard_dim is None:
        return Box(0, 0, rows, columns)
    assert shape[shard_dim] % tensor_parallel == 0, (shape, shard_dim, tensor_parallel)
    size = shape[shard_dim] // tensor_parallel
    if shard_dim == 0:
        return Box(tensor_rank * size, 0, size, columns)
    return Box(0, tensor_rank * size, rows, size)


def boxes_of(shard: Box, start: int, numel: int) -> list[Box]:
    """Returns the rectangles of the elements start, start + 1, ... of a flattened shard, in their order."""
    assert 0 <= start <= start + numel <= shard.numel, (shard, start, numel)
    boxes: list[Box] = []
    position, stop = start, start + numel
    while position < stop:
        row, column = divmod(position, shard.columns)
        if column == 0 and stop - position >= shard.columns:
            rows, columns = (stop - position) // shard.columns, shard.columns
        else:
            rows, columns = 1, min(shard.columns - column, stop - position)
        boxes.append(Box(shard.row + row, shard.column + column, rows, columns, position - start))
        position += rows * columns
    return boxes


def overlaps(one: Sequence[Box], other: Sequence[Box]) -> list[tuple[Box, Box, Box]]:
    """Returns a box of the one, a box of the other, and the rectangle that they have in common, for all such pairs."""
    found: list[tuple[Box, Box, Box]] = []
    if not one or not other or one[0].row >= other[-1].end_row or other[0].row >= one[-1].end_row:
        return found  # most pairs of fragments have no row in common
    for mine in one:
        for theirs in other:
            row, column = max(mine.row, theirs.row), max(mine.column, theirs.column)
            rows = min(mine.end_row, theirs.end_row) - row
            columns = min(mine.column + mine.columns, theirs.column + theirs.columns) - column
            if rows > 0 and columns > 0:
                found.append((mine, theirs, Box(row, column, rows, columns)))
    return found


def copy_overlaps(target: torch.Tensor, source: torch.Tensor, common: Iterable[tuple[Box, Box, Box]]) -> int:
    """Copies what two fragments (1-D) have in common: `overlaps` of their boxes. Returns the number of elements."""
    copied = 0
    for to, of, box in common:
        _view(target, to, box).copy_(_view(source, of, box))
        copied += box.numel
    return copied


def _view(values: torch.Tensor, box: Box, part: Box) -> torch.Tensor:
    whole = values[box.offset : box.offset + box.numel].view(box.rows, box.columns)
    row, column = part.row - box.row, part.column - box.column
    return whole[row : row + part.rows, column : column + part.columns]


def line_of(file: str, tensor_rank: int, runs: Sequence[ElementRun]) -> bytes:
    """Returns the line of fragments.json for a file."""
    return f"{json.dumps(file)}: {json.dumps({'tensor_rank': tensor_rank, 'runs': runs})}".encode("ascii")


def join_lines(lines: Iterable[bytes]) -> bytes:
    """Returns the content of fragments.json."""
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def parse_fragments(content: bytes, manifest: Manifest, path: Path) -> list[StoredFragment]:
    """Reads fragments.json and checks that every element of every parameter is stored exactly once.

    Raises:
        CheckpointError: It is damaged, or elements are missing or stored twice; names `path`.
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
    runs: dict[tuple[str, int], list[StoredFragment]] = defaultdict(list)
    for piece in fragments:
        runs[piece.name, piece.tensor_rank].append(piece)
    faults = []
    for name, parameter in parameters.items():
        for rank in range(1 if parameter.shard_dim is None else tensor):
            expected = shard_of(parameter.shape, parameter.shard_dim, tensor, rank).numel
            if fault := _coverage_fault(runs.pop((name, rank), []), expected):
                faults.append(f"{name}, tensor rank {rank}: {fault}")
    return faults + [f"{name}, tensor rank {rank}: there is no such shard" for name, rank in runs]


def _coverage_fault(pieces: list[StoredFragment], expected: int) -> str | None:
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
