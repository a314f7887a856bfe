"""Where the elements of a fragment lie in the global tensor, and copying between fragments of any two layouts.

A fragment is a run of consecutive elements of one tensor-parallel rank's shard, flattened row by row. The shard is a
rectangle of the global tensor, seen as a matrix (a vector is a matrix of one column), so a run is at most three
rectangles: the end of its first row, whole rows, the beginning of its last row. What two fragments have in common is
therefore a handful of rectangles too, each of them one strided copy, whatever the two layouts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """The rectangle of the global matrix that one tensor-parallel rank holds.

    Attributes:
        row: Its first row in the global matrix.
        column: Its first column.
        rows: Number of rows.
        columns: Number of columns.
    """

    row: int
    column: int
    rows: int
    columns: int

    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Box:
    """A rectangle of the global matrix whose elements lie in a fragment one after the other, row by row.

    Attributes:
        row: Its first row in the global matrix.
        column: Its first column.
        rows: Number of rows.
        columns: Number of columns.
        offset: Where its first element lies in the fragment.
    """

    row: int
    column: int
    rows: int
    columns: int
    offset: int

    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns (rows, columns) of a tensor of one or two dimensions seen as a matrix."""
    assert 1 <= len(shape) <= 2, shape
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def shard_of(shape: Sequence[int], shard_dim: int | None, tensor_parallel: int, tensor_rank: int) -> Shard:
    """Returns what a tensor-parallel rank holds of a parameter.

    Args:
        shape: Global shape.
        shard_dim: The dimension that is split, or None where every rank holds the whole tensor.
        tensor_parallel: Number of tensor-parallel ranks.
        tensor_rank: The rank among them.
    """
    rows, columns = matrix_shape(shape)
    if shard_dim is None:
        return Shard(0, 0, rows, columns)
    assert shape[shard_dim] % tensor_parallel == 0, (shape, shard_dim, tensor_parallel)
    size = shape[shard_dim] // tensor_parallel
    if shard_dim == 0:
        return Shard(tensor_rank * size, 0, size, columns)
    return Shard(0, tensor_rank * size, rows, size)


def boxes_of(shard: Shard, start: int, numel: int) -> list[Box]:
    """Returns the rectangles that a fragment consists of, in the order of its elements.

    Args:
        shard: The shard it is cut from.
        start: First element in the flattened shard.
        numel: Number of elements.
    """
    assert 0 <= start <= start + numel <= shard.numel(), (shard, start, numel)
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


def copy_common(
    target: torch.Tensor, target_boxes: Iterable[Box], source: torch.Tensor, source_boxes: list[Box]
) -> int:
    """Copies the elements that two fragments have in common.

    Args:
        target: Values of the fragment to fill, 1-D.
        target_boxes: Its rectangles.
        source: Values of the fragment to read, 1-D.
        source_boxes: Its rectangles.

    Returns:
        How many elements were copied.
    """
    copied = 0
    for to in target_boxes:
        for of in source_boxes:
            row, column = max(to.row, of.row), max(to.column, of.column)
            rows = min(to.row + to.rows, of.row + of.rows) - row
            columns = min(to.column + to.columns, of.column + of.columns) - column
            if rows > 0 and columns > 0:
                _window(target, to, row, column, rows, columns).copy_(_window(source, of, row, column, rows, columns))
                copied += rows * columns
    return copied


def have_common_rows(one: Sequence[Box], other: Sequence[Box]) -> bool:
    """Returns whether two fragments touch a row together; a quick way to pass by those that do not."""
    return one[0].row < other[-1].row + other[-1].rows and other[0].row < one[-1].row + one[-1].rows


def _window(values: torch.Tensor, box: Box, row: int, column: int, rows: int, columns: int) -> torch.Tensor:
    """The part of a fragment's box that begins at a row and a column of the global matrix, as a view."""
    whole = values[box.offset : box.offset + box.numel()].view(box.rows, box.columns)
    return whole[row - box.row : row - box.row + rows, column - box.column : column - box.column + columns]
