"""Hashes of the blocks of a .bin file, so that what is read of a large file is checked without reading all of it.

PREFIX.blocks holds the SHA-256 (32 bytes) of every 64 KiB of PREFIX.bin, in order; the last block may be shorter.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data import DataError

BLOCK_BYTES = 1 << 16
_DIGEST_BYTES = 32
_SHOWN = 5


class BlockHasher:
    """Hashes a file as a whole and block by block while it is written or read."""

    def __init__(self) -> None:
        self._whole, self._block, self._room = hashlib.sha256(), hashlib.sha256(), BLOCK_BYTES
        self._digests = bytearray()

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes of the file."""
        self._whole.update(data)
        rest = memoryview(data)
        while len(rest) >= self._room:
            self._block.update(rest[: self._room])
            rest = rest[self._room :]
            self._digests += self._block.digest()
            self._block, self._room = hashlib.sha256(), BLOCK_BYTES
        self._block.update(rest)
        self._room -= len(rest)

    @property
    def sha256(self) -> str:
        """SHA-256 of all bytes so far, as hexadecimal text."""
        return self._whole.hexdigest()

    @property
    def table(self) -> bytes:
        """The digests of all blocks so far, the unfinished last one included."""
        return bytes(self._digests) + (self._block.digest() if self._room < BLOCK_BYTES else b"")


def table_bytes(file_bytes: int) -> int:
    """Returns the size of the table of a file of so many bytes."""
    return -(-file_bytes // BLOCK_BYTES) * _DIGEST_BYTES


class CheckedFile:
    """A .bin file, not empty, each block of which is compared with its hash in a .blocks file when it is first read.

    Threads may share it: at worst both check the same block.

    Raises:
        DataError: The table has not one digest per block.
    """

    def __init__(self, path: Path, table: Path) -> None:
        self._path = path
        self._bytes = np.asarray(np.memmap(path, mode="r"))
        digests = np.asarray(np.memmap(table, mode="r"))
        if len(digests) != (wanted := table_bytes(len(self._bytes))):
            raise DataError(f"{table} has {len(digests)} bytes, {path} needs {wanted}; prepare it again")
        self._digests = digests.reshape(-1, _DIGEST_BYTES)
        self._is_checked = np.zeros(len(self._digests), dtype=np.bool_)

    def check(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Checks the blocks of the stretches [begin, end) of bytes, shape [n], that were not checked before.

        Raises:
            DataError: A block is not what was prepared; the message names its offset.
        """
        first = begins // BLOCK_BYTES
        counts = np.maximum((ends - 1) // BLOCK_BYTES - first + 1, 0)
        before = np.cumsum(counts) - counts
        blocks = np.repeat(first - before, counts) + np.arange(counts.sum())
        for block in np.unique(blocks[~self._is_checked[blocks]]):
            if not self._is_whole(int(block)):
                raise self._damaged([int(block)])
            self._is_checked[block] = True

    def check_all(self) -> None:
        """Checks every block.

        Raises:
            DataError: Some are not what was prepared; the message names their offsets.
        """
        if damaged := [block for block in range(len(self._digests)) if not self._is_whole(block)]:
            raise self._damaged(damaged)
        self._is_checked[:] = True

    def _is_whole(self, block: int) -> bool:
        content = self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        return hashlib.sha256(content.data).digest() == self._digests[block].tobytes()

    def _damaged(self, blocks: list[int]) -> DataError:
        shown = ", ".join(str(block * BLOCK_BYTES) for block in blocks[:_SHOWN])
        more = f" and {len(blocks) - _SHOWN} more" if len(blocks) > _SHOWN else ""
        return DataError(
            f"{self._path} is damaged: its blocks of {BLOCK_BYTES} bytes at offset {shown}{more} differ from what was "
            "prepared; copy the file from where it is whole, or prepare the data again"
        )


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content as hexadecimal text."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_blocks(path: Path) -> BlockHasher:
    """Reads a file and hashes it as a whole and block by block."""
    hasher = BlockHasher()
    with open(path, "rb") as stream:
        while data := stream.read(16 * BLOCK_BYTES):
            hasher.update(data)
    return hasher
