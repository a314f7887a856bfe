"""Reads and checks the two files of a Megatron indexed data set (PREFIX.bin, PREFIX.idx) without importing Megatron.

Megatron's own reader asserts, or reads past the end later; here every defect of a foreign, truncated or unfinished
file becomes one sentence before anything is started.

Layout of .idx (version 1, little endian): magic "MMIDIDX" and two zero bytes, uint64 version, uint8 dtype code, uint64
number of sequences, uint64 number of document borders (documents + 1), then the int32 length of every sequence, its
int64 byte offset, and the int64 borders. Usually every document is one sequence.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True, eq=False)
class IndexedFiles:
    """An indexed data set that was found to be whole.

    Attributes:
        prefix: Path of the two files without their suffix.
        dtype: Type of the tokens in the .bin file.
        sequence_lengths: Tokens of every sequence, int32, memory-mapped.
        sequence_pointers: Byte offset of every sequence in the .bin file, int64, memory-mapped.
        document_borders: Sequence index where each document starts, and the number of sequences at the end.
        bin_bytes: Size of the .bin file.
    """

    prefix: str
    dtype: np.dtype
    sequence_lengths: NDArray[np.int32]
    sequence_pointers: NDArray[np.int64]
    document_borders: NDArray[np.int64]
    bin_bytes: int

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_borders) - 1

    def tokens(self) -> NDArray:
        """Returns the .bin file as one memory-mapped array of tokens."""
        count = self.bin_bytes // self.dtype.itemsize
        if not count:  # the system cannot map an empty file
            return np.empty(0, dtype=self.dtype)
        return np.memmap(self.prefix + ".bin", dtype=self.dtype, mode="r", shape=(count,))

    def num_tokens(self, first: int, stop: int) -> int:
        """Returns the number of tokens in the sequences [first, stop)."""
        return int(self.sequence_lengths[first:stop].sum(dtype=np.int64))

    @cached_property
    def index_sha256(self) -> str:
        """SHA-256 of the .idx file."""
        return sha256_of_file(Path(self.prefix + ".idx"))

    def token_sample(self, chunks: int = 64, length: int = 4096) -> NDArray:
        """Returns evenly spaced stretches of the .bin file, joined, as a cheap sample of its content."""
        tokens = self.tokens()
        if len(tokens) <= chunks * length:
            return np.asarray(tokens)
        starts = np.linspace(0, len(tokens) - length, chunks).astype(np.int64)
        return np.concatenate([tokens[start : start + length] for start in starts])

    def document_ends(self, limit: int = 1000) -> NDArray:
        """Returns the last token of up to `limit` non-empty sequences that end a document, evenly spaced."""
        last = self.document_borders[1:] - 1
        chosen = last[np.unique(np.linspace(0, len(last) - 1, min(limit, len(last))).astype(np.int64))]
        chosen = chosen[(chosen >= 0) & (self.sequence_lengths[chosen] > 0)]
        ends = self.sequence_pointers[chosen] // self.dtype.itemsize + self.sequence_lengths[chosen] - 1
        return self.tokens()[ends]


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content as hexadecimal text."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_indexed(prefix: str) -> IndexedFiles:
    """Opens PREFIX.bin and PREFIX.idx and checks that they are whole and belong together.

    Args:
        prefix: Path of the files without their suffix.

    Returns:
        The data set's index, memory-mapped.

    Raises:
        DataError: A file is missing, foreign, truncated or empty.
    """
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise DataError(f"{prefix}{suffix} does not exist; a Megatron data set is a pair PREFIX.bin, PREFIX.idx")
    index_path = prefix + ".idx"
    try:
        size, bin_bytes = os.path.getsize(index_path), os.path.getsize(prefix + ".bin")
        with open(index_path, "rb") as stream:
            head = stream.read(_HEADER.size)
        buffer = np.memmap(index_path, mode="r") if size else np.empty(0, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{index_path} cannot be read: {error.strerror}") from error
    if head.startswith(_OLD_MAGIC):
        raise DataError(f"{index_path} is of Megatron's old 'lazy' or 'cached' kind; write it again with the mmap kind")
    if not head.startswith(_MAGIC):
        raise DataError(f"{index_path} is not a Megatron index (it does not start with MMIDIDX)")
    if len(head) < _HEADER.size:
        raise DataError(f"{index_path} is truncated: {size} bytes are less than its header")
    _, version, code, num_sequences, num_borders = _HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{index_path} has version {version} of Megatron's index; only version 1 is known")
    if code not in _DTYPES:
        raise DataError(f"{index_path} has token type code {code}; integer tokens have {sorted(_DTYPES)}")
    dtype = np.dtype(_DTYPES[code])
    if size < _HEADER.size + 12 * num_sequences + 8 * num_borders:
        raise DataError(f"{index_path} is truncated: it announces {num_sequences} sequences but has only {size} bytes")
    lengths_end = _HEADER.size + 4 * num_sequences
    pointers_end = lengths_end + 8 * num_sequences
    lengths = buffer[_HEADER.size : lengths_end].view(np.int32)
    pointers = buffer[lengths_end:pointers_end].view(np.int64)
    borders = buffer[pointers_end : pointers_end + 8 * num_borders].view(np.int64)
    if num_borders == 0 or borders[0] != 0 or borders[-1] != num_sequences:
        raise DataError(f"{index_path} is damaged: its document borders do not span its {num_sequences} sequences")
    if num_sequences:
        needed = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
        if int(lengths.min()) < 0 or int(pointers[0]) < 0 or int(pointers[-1]) % dtype.itemsize:
            raise DataError(f"{index_path} is damaged: it holds negative lengths or offsets")
        if bin_bytes < needed:
            raise DataError(f"{prefix}.bin is truncated: it has {bin_bytes} bytes, its index describes {needed}")
    return IndexedFiles(prefix, dtype, lengths, pointers, borders, bin_bytes)
