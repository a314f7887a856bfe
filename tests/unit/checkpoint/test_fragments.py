"""The fragment arithmetic against brute force, on random shapes and layouts."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.checkpoint.fragments import Box, boxes_of, copy_overlaps, matrix_shape, overlaps, shard_of


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], int | None]:
    """(global shape, shard dim); what is sharded is divisible by 1, 2, 3 and 6."""
    num_dims = draw(st.integers(1, 2))
    shard_dim = draw(st.sampled_from([None, *range(num_dims)]))
    shape = [draw(st.integers(1, 7)) for _ in range(num_dims)]
    if shard_dim is not None:
        shape[shard_dim] = 6 * draw(st.integers(1, 3))
    return tuple(shape), shard_dim


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """A partition of 0..size into runs (start, numel) at random places."""
    places = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=5))})
    return [(start, stop - start) for start, stop in pairwise(places)]


def local_part(whole: np.ndarray, shard_dim: int | None, tensor_parallel: int, rank: int) -> np.ndarray:
    """What numpy says that a tensor-parallel rank holds, flattened."""
    return (whole if shard_dim is None else np.split(whole, tensor_parallel, axis=shard_dim)[rank]).ravel()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_layout_to_any_other(data: st.DataObject) -> None:
    shape, shard_dim = data.draw(shapes())
    whole = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    stored_parallel, wanted_parallel = (data.draw(st.sampled_from([1, 2, 3, 6])) for _ in range(2))
    stored = []
    for rank in range(1 if shard_dim is None else stored_parallel):
        local = torch.from_numpy(local_part(whole, shard_dim, stored_parallel, rank))
        shard = shard_of(shape, shard_dim, stored_parallel, rank)
        for start, numel in data.draw(cuts(local.numel())):
            stored.append((local[start : start + numel], boxes_of(shard, start, numel)))
    for rank in range(wanted_parallel):
        expected = local_part(whole, shard_dim, wanted_parallel, rank)
        shard = shard_of(shape, shard_dim, wanted_parallel, rank)
        for start, numel in data.draw(cuts(expected.size)):
            target = torch.zeros(numel)
            boxes = boxes_of(shard, start, numel)
            assert len(boxes) <= 3
            copied = sum(copy_overlaps(target, values, overlaps(boxes, of)) for values, of in stored)
            assert copied == numel
            np.testing.assert_array_equal(target.numpy(), expected[start : start + numel])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_boxes_are_the_elements_in_order(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    shard = Box(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5)), rows, columns)
    start = data.draw(st.integers(0, shard.numel))
    numel = data.draw(st.integers(0, shard.numel - start))
    elements: list[tuple[int, int]] = []
    for box in boxes_of(shard, start, numel):
        assert box.offset == len(elements)
        elements += [(box.row + i, box.column + j) for i in range(box.rows) for j in range(box.columns)]
    everything = [(shard.row + i, shard.column + j) for i in range(rows) for j in range(columns)]
    assert elements == everything[start : start + numel]


def test_a_vector_is_a_matrix_of_one_column() -> None:
    assert matrix_shape((12,)) == (12, 1)
    assert boxes_of(shard_of((12,), 0, 3, 1), 1, 2) == [Box(5, 0, 2, 1, 0)]
