"""Hashes of blocks: whatever the pieces in which a file is written, and whichever stretch is read."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from mlra_scale.data import DataError
from mlra_scale.data.blocks import BLOCK_BYTES, BlockHasher, CheckedFile, hash_blocks

SIZES = [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 777]


@pytest.mark.parametrize("size", [0, *SIZES])
def test_the_table_is_the_sum_of_every_block(tmp_path: Path, size: int) -> None:
    content, draw = random.Random(size).randbytes(size), random.Random(1)
    expected = b"".join(
        hashlib.sha256(content[first : first + BLOCK_BYTES]).digest() for first in range(0, size, BLOCK_BYTES)
    )
    for largest in (1000, BLOCK_BYTES, 5 * BLOCK_BYTES):
        hasher, place = BlockHasher(), 0
        while place < size:
            length = draw.randint(0, largest)
            hasher.update(content[place : place + length])
            place += length
        assert hasher.table == expected and hasher.sha256 == hashlib.sha256(content).hexdigest()
    (tmp_path / "x.bin").write_bytes(content)
    assert hash_blocks(tmp_path / "x.bin").table == expected


def checked(folder: Path, content: bytes, damaged: int | None) -> CheckedFile:
    hasher = BlockHasher()
    hasher.update(content)
    (folder / "x.blocks").write_bytes(hasher.table)
    changed = bytearray(content)
    if damaged is not None:
        changed[damaged] ^= 1
    (folder / "x.bin").write_bytes(changed)
    return CheckedFile(folder / "x.bin", folder / "x.blocks")


@pytest.mark.parametrize("size", SIZES)
def test_exactly_the_stretches_that_touch_a_damaged_block_are_refused(tmp_path: Path, size: int) -> None:
    content, draw = random.Random(size).randbytes(size), random.Random(2)
    for _ in range(20):
        damaged = draw.randrange(size)
        block = damaged // BLOCK_BYTES
        file = checked(tmp_path, content, damaged)
        for _ in range(20):
            ends = sorted(draw.randint(0, size) for _ in range(6))
            begins, stops = np.array(ends[::2]), np.array(ends[1::2])
            touches = any(
                begin < stop and begin // BLOCK_BYTES <= block <= (stop - 1) // BLOCK_BYTES
                for begin, stop in zip(begins, stops, strict=True)
            )
            try:
                file.check(begins, stops)
                assert not touches
            except DataError as error:
                # An empty stretch inside a block may check it too.
                assert touches or any(begins == stops)
                assert f"offset {block * BLOCK_BYTES} differ" in str(error)
        with pytest.raises(DataError, match=f"offset {block * BLOCK_BYTES} differ"):
            file.check_all()


def test_a_block_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = checked(tmp_path, random.Random(0).randbytes(3 * BLOCK_BYTES), None)
    hashed: list[int] = []
    is_whole = CheckedFile._is_whole

    def counted(file: CheckedFile, block: int) -> bool:
        hashed.append(block)
        return is_whole(file, block)

    monkeypatch.setattr(CheckedFile, "_is_whole", counted)
    for _ in range(3):
        file.check(np.array([0, 70_000]), np.array([10, 140_000]))
    assert sorted(hashed) == [0, 1, 2]


def test_a_table_of_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    checked(tmp_path, bytes(BLOCK_BYTES), None)
    file.write_bytes(bytes(BLOCK_BYTES + 1))
    with pytest.raises(DataError, match=r"x\.blocks has 32 bytes, .*x\.bin needs 64"):
        CheckedFile(file, tmp_path / "x.blocks")
