"""Batches: a pure function of seed and sample index, with documents and positions as configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.data import DataError
from mlra_scale.data.mix import Mix, SampleOrder
from mlra_scale.data.one_epoch import OneEpoch
from mlra_scale.data.stream import Batch, SampleStream
from tests.unit.data.builders import random_documents, whole_range, write_documents


def epoch_of(folder: Path, count: int = 60, seed: int = 0, length: int = 16) -> OneEpoch:
    prefix = write_documents(folder / f"set-{count}-{seed}", random_documents(count, 12, seed))
    return OneEpoch(whole_range(prefix), length)


def stream_of(*parts: OneEpoch, seed: int | None = None, vocabulary_size: int = 500, **options: Any) -> SampleStream:
    """A stream over data sets in a fixed order or, with a seed, shuffled."""
    names = tuple(map(str, range(len(parts))))
    order = SampleOrder([Mix(names, names, options.pop("weights", (1.0,)))])
    return SampleStream(parts, order, seed, vocabulary_size, **options)


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in Batch.__dataclass_fields__)


def joined(batches: list[Batch]) -> Batch:
    return Batch(**{name: torch.cat([getattr(b, name) for b in batches]) for name in Batch.__dataclass_fields__})


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> SampleStream:
    folder = tmp_path_factory.mktemp("blend")
    parts = [epoch_of(folder, 60, 0), epoch_of(folder, 10, 1), epoch_of(folder, 33, 2)]
    return stream_of(*parts, seed=5, end_of_document_token=0, weights=(6, 3, 1))


def test_a_batch_has_the_fields_of_the_model(tmp_path: Path) -> None:
    part = epoch_of(tmp_path)
    stream = stream_of(part, end_of_document_token=0)
    batch = stream.batch(3, 4)
    rows = part.token_rows(np.arange(3, 7))
    assert batch.tokens_BS.tolist() == rows[:, :-1].tolist() and batch.targets_BS.tolist() == rows[:, 1:].tolist()
    assert batch.positions_BS.tolist() == [list(range(16))] * 4
    assert batch.sample_ids_B.tolist() == [3, 4, 5, 6]
    for name in Batch.__dataclass_fields__:
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64 and tensor.device.type == "cpu" and tensor.is_contiguous()


@pytest.mark.parametrize("reset", [False, True])
def test_documents_and_positions_follow_the_end_of_document_token(tmp_path: Path, reset: bool) -> None:
    part = epoch_of(tmp_path)
    stream = stream_of(part, end_of_document_token=0, reset_positions=reset)
    batch = stream.batch(0, len(part))
    seen = 0
    for tokens, documents, positions in zip(batch.tokens_BS, batch.documents_BS, batch.positions_BS, strict=True):
        document, position = 0, 0
        for place, token in enumerate(tokens.tolist()):
            assert int(documents[place]) == document
            assert int(positions[place]) == (position if reset else place)
            position += 1
            if token == 0:  # it belongs to the document that it ends
                document, position = document + 1, 0
        seen += document
    assert seen > 20


def test_without_a_known_end_there_is_one_document(tmp_path: Path) -> None:
    batch = stream_of(epoch_of(tmp_path)).batch(0, 5)
    assert not batch.documents_BS.any() and batch.positions_BS.tolist() == [list(range(16))] * 5


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    part = epoch_of(tmp_path)
    size = len(part)
    stream = stream_of(part, seed=9)
    assert stream.samples_per_epoch == size
    _, rows = stream.locate(np.arange(3 * size))
    epochs = rows.reshape(3, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    other = stream_of(part, seed=10).locate(np.arange(size))[1]
    assert not (other == epochs[0]).all()


def test_the_validation_order_is_fixed_and_starts_over(tmp_path: Path) -> None:
    part = epoch_of(tmp_path)
    stream = stream_of(part)
    _, rows = stream.locate(np.arange(2 * len(part) + 3))
    assert rows.tolist() == [i % len(part) for i in range(2 * len(part) + 3)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**7), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_batch_does_not_depend_on_how_it_is_cut(blend: SampleStream, first: int, counts: list[int]) -> None:
    cut, place = [], first
    for count in counts:
        cut.append(blend.batch(place, count))
        place += count
    assert equal(joined(cut), blend.batch(first, sum(counts)))


def test_a_blend_runs_every_part_through_its_own_epochs(blend: SampleStream) -> None:
    assert blend.samples_per_epoch == int(blend._sizes.sum())
    parts, rows = blend.locate(np.arange(20_000))
    shares = np.bincount(parts) / len(parts)
    assert np.allclose(shares, [0.6, 0.3, 0.1], atol=2e-4)
    for part, size in enumerate(blend._sizes):
        mine = rows[parts == part]
        whole = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(whole) > 10 and (np.sort(whole, axis=1) == np.arange(size)).all()


def test_a_foreign_token_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    stream = stream_of(epoch_of(tmp_path), vocabulary_size=400)
    with pytest.raises(DataError, match=r"set-60-0\.bin holds a token outside the model's vocabulary"):
        for first in range(0, 40, 8):
            stream.batch(first, 8)
