"""Indexed files are read as Megatron reads them, and every defect is one clear error."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from mlra_scale.data import DataError
from mlra_scale.data.indexed import open_indexed
from tests.unit.data.builders import random_documents, write_documents


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_reads_what_megatron_wrote(tmp_path: Path, dtype: type) -> None:
    documents = random_documents(50, 20, vocabulary=120)
    prefix = str(write_documents(tmp_path / "set", documents, dtype))
    files, theirs = open_indexed(prefix), IndexedDataset(prefix)
    assert files.dtype == dtype and files.num_documents == 50
    assert (files.sequence_lengths == theirs.sequence_lengths).all()
    assert (files.document_borders == theirs.document_indices).all()
    assert files.tokens().tolist() == [token for document in documents for token in document]
    assert files.num_tokens(3, 7) == sum(map(len, documents[3:7]))
    assert (files.document_ends() == 0).all() and len(files.document_ends(limit=10)) == 10
    assert files.token_sample(chunks=3, length=5).shape == (15,)


def damaged(folder: Path, suffix: str, change: bytes | int) -> str:
    """A data set one of whose files starts with other bytes (bytes given) or lost its end (int given)."""
    prefix = write_documents(folder / "set", random_documents(20, 10))
    file = Path(f"{prefix}{suffix}")
    content = file.read_bytes()
    file.write_bytes(change + content[len(change) :] if isinstance(change, bytes) else content[:change])
    return str(prefix)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", -1, "set.bin is truncated"),
        (".bin", 0, "set.bin is truncated"),
        (".idx", -1, "set.idx is truncated"),
        (".idx", 20, "set.idx is truncated"),
        (".idx", 0, "not a Megatron index"),
        (".idx", b"PAR1PAR1", "not a Megatron index"),
        (".idx", b"TNTIDX\x00\x00", "old 'lazy' or 'cached' kind"),
        (".idx", b"MMIDIDX\x00\x00\x07", "version 7"),
        (".idx", b"MMIDIDX\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x06", "token type code 6"),
        (".idx", b"MMIDIDX\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x08\x0a\x00\x00", "is damaged"),
    ],
)
def test_defects_are_refused(tmp_path: Path, suffix: str, change: bytes | int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_indexed(damaged(tmp_path, suffix, change))


def written(
    folder: Path, lengths: Sequence[int], pointers: Sequence[int], borders: Sequence[int], extra: int = 0
) -> str:
    """A pair of uint16 tokens 0, 1, 2, ... whose index holds just these arrays."""
    prefix = str(folder / "set")
    np.arange(sum(max(0, length) for length in lengths) + extra, dtype=np.uint16).tofile(f"{prefix}.bin")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(borders))
    arrays: list[np.ndarray] = [np.array(lengths, np.int32), np.array(pointers, np.int64), np.array(borders, np.int64)]
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    return prefix


COUNT, LENGTH = 100, 70
POINTERS = np.arange(COUNT) * LENGTH * 2
BORDERS = np.arange(COUNT + 1)


def replaced(array: np.ndarray, places: slice | int, values: Any) -> np.ndarray:
    changed = array.astype(np.int64)
    changed[places] = values
    return changed


WRONG_POINTERS: dict[str, tuple[np.ndarray, str]] = {
    "negative": ((POINTERS + 4096) % 8192 - 4096, r"set.idx is damaged: sequence 30 \(offset -3992, .* has a negative"),
    "wrapped": (replaced(POINTERS, slice(60, None), POINTERS[:40]), r"sequence 60 \(offset 0, 70 tokens\) overlaps"),
    "overlaps by one token": (replaced(POINTERS, 7, 978), r"sequence 7 \(offset 978, 70 tokens\) overlaps"),
    "inside a token": (replaced(POINTERS, 50, 7001), r"sequence 50 \(offset 7001, 70 tokens\) starts inside"),
    "far beyond": (replaced(POINTERS, 50, 10**9), r"sequence 50 \(offset 1000000000, .* the .bin file has 14000"),
    "one token beyond": (replaced(POINTERS, 99, 13862), r"sequence 99 .* ends at byte 14002"),
    "beyond 64 bits": (replaced(POINTERS, 50, 2**63 - 2), r"sequence 50 \(offset 9223372036854775806"),
}
WRONG_BORDERS: dict[str, tuple[np.ndarray, str]] = {
    "that restart": (
        np.array([*range(51), *range(1, 50), COUNT]),
        "set.idx is damaged: document 51 starts at sequence 1, the one before it at sequence 50 of 100",
    ),
    "beyond": (replaced(BORDERS, -2, 10**6), "document 99 starts at sequence 1000000, .* at sequence 98 of 100"),
    "negative": (replaced(BORDERS, 3, -4), "document 3 starts at sequence -4"),
    "that begin late": (replaced(BORDERS, 0, 1), "first document does not start at sequence 0"),
    "that end early": (BORDERS[:-1], "last document ends at sequence 99, it has 100"),
    "none": (BORDERS[:0], "first document does not start at sequence 0"),
}
WRONG = [(pointers, BORDERS, message) for pointers, message in WRONG_POINTERS.values()]
WRONG += [(POINTERS, borders, message) for borders, message in WRONG_BORDERS.values()]


@pytest.mark.parametrize("chunk", [1 << 20, 16])
@pytest.mark.parametrize(("pointers", "borders", "message"), WRONG, ids=[*WRONG_POINTERS, *WRONG_BORDERS])
def test_every_entry_of_an_index_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointers: np.ndarray, borders: np.ndarray, message: str, chunk: int
) -> None:
    monkeypatch.setattr("mlra_scale.data.indexed._AT_ONCE", chunk)
    with pytest.raises(DataError, match=message):
        open_indexed(written(tmp_path, [LENGTH] * COUNT, pointers.tolist(), borders.tolist()))


def test_the_checks_take_memory_for_a_part_of_the_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlra_scale.data.indexed._AT_ONCE", 1000)
    count = 200_000
    prefix = written(tmp_path, [1] * count, range(0, 2 * count, 2), range(count + 1))
    tracemalloc.start()
    open_indexed(prefix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Not even a byte per sequence or document border: the index itself has 20 bytes per sequence.
    assert peak < count


def test_a_negative_length_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sequence 2 \(offset 8, -3 tokens\) has a negative length"):
        open_indexed(written(tmp_path, [2, 2, -3, 2], [0, 4, 8, 8], [0, 4]))


@pytest.mark.parametrize(
    ("lengths", "pointers", "borders", "extra"),
    [
        ([10, 20, 30], [0, 20, 60], [0, 3], 0),  # a document of three sequences
        ([10, 0, 30], [0, 20, 20], [0, 1, 2, 3], 0),  # an empty sequence
        ([10, 30], [0, 20], [0, 1, 1, 1, 2, 2], 0),  # documents without sequences
        ([10, 30], [40, 60], [0, 1, 2], 20),  # a gap, and a .bin that holds more
        ([10, 0, 30], [60, 60, 0], [0, 1, 2, 3], 0),  # another order, one of them empty
        ([0, 0], [0, 0], [0, 2], 0),
        ([], [], [0], 0),
    ],
)
def test_legal_layouts_open(
    tmp_path: Path, lengths: list[int], pointers: list[int], borders: list[int], extra: int
) -> None:
    files = open_indexed(written(tmp_path, lengths, pointers, borders, extra))
    assert files.sequence_lengths.tolist() == lengths and files.sequence_pointers.tolist() == pointers
    assert files.document_borders.tolist() == borders


def test_what_megatron_merges_and_marks_opens(tmp_path: Path) -> None:
    parts = [
        str(write_documents(tmp_path / name, random_documents(20, 10, seed=seed))) for seed, name in enumerate("ab")
    ]
    merged = IndexedDatasetBuilder(str(tmp_path / "merged.bin"), dtype=np.uint16)
    for part in parts:
        merged.add_index(part)
    merged.finalize(str(tmp_path / "merged.idx"))
    files = open_indexed(str(tmp_path / "merged"))
    assert files.num_documents == 40
    assert files.tokens().tolist() == [token for part in parts for token in open_indexed(part).tokens()]
    marked = IndexedDatasetBuilder(str(tmp_path / "marked.bin"), dtype=np.uint16, multimodal=True)
    marked.add_document(np.arange(30), [10, 20], [0, 1])
    marked.finalize(str(tmp_path / "marked.idx"))
    assert open_indexed(str(tmp_path / "marked")).sequence_lengths.tolist() == [10, 20]
