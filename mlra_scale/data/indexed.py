"""Reads and checks the two files of a Megatron indexed data set (PREFIX.bin, PREFIX.idx) without importing Megatron.

Every defect of a foreign, truncated or unfinished file is one clear error, where Megatron's own reader fails by an
assertion, or later by reading past the end.

Layout of .idx (version 1, little endian): magic "MMIDIDX" and two zero bytes, uint64 version, uint8 dtype code, uint64
number of sequences, uint64 number of document borders (documents + 1), then the int32 length of every sequence, its
int64 byte offset, and the int64 borders. Usually every document is one sequence.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data import DataError
from mlra_scale.data.blocks import CheckedFile, sha256_of_file

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
WHOLE_BYTES = 64_000_000
"""A .bin file up to this size is checked as a whole at every start; of a larger one each block when it is read."""
_AT_ONCE = 1 << 20
"""Sequences or document borders that are checked together: bounds the memory for them."""
_DTYPES: dict[int, type] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True, eq=False)
class IndexedFiles:
    """An indexed data set whose index was checked.

    Attributes:
        prefix: Path of the two files without their suffix.
        dtype: Type of the tokens in the .bin file.
        sequence_lengths: Tokens of every sequence, int32, memory-mapped.
        sequence_pointers: Byte offset of every sequence in the .bin file, int64, memory-mapped.
        document_borders: Sequence index where each document starts, and the number of sequences at the end.
        bin_bytes: Size of the .bin file.
        table: File with the hashes of the .bin file's blocks (blocks.py); None: there is none.
    """

    prefix: str
    dtype: np.dtype
    sequence_lengths: NDArray[np.int32]
    sequence_pointers: NDArray[np.int64]
    document_borders: NDArray[np.int64]
    bin_bytes: int
    table: Path | None = None

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_borders) - 1

    def tokens(self) -> NDArray:
        """Returns the .bin file as one memory-mapped array of tokens."""
        count = self.bin_bytes // self.dtype.itemsize
        if not count:  # the system cannot map an empty file
            return np.empty(0, dtype=self.dtype)
        # A plain array: the subclass np.memmap makes every access slower.
        return np.asarray(np.memmap(self.prefix + ".bin", dtype=self.dtype, mode="r", shape=(count,)))

    def num_tokens(self, first: int, stop: int) -> int:
        """Returns the number of tokens in the sequences [first, stop)."""
        return int(self.sequence_lengths[first:stop].sum(dtype=np.int64))

    @cached_property
    def checked(self) -> CheckedFile | None:
        """Compares what is read of the .bin file with its hashes; None where its blocks have none."""
        return None if self.table is None else CheckedFile(Path(self.prefix + ".bin"), self.table)

    @cached_property
    def index_sha256(self) -> str:
        """SHA-256 of the .idx file."""
        return sha256_of_file(Path(self.prefix + ".idx"))

    @property
    def is_small(self) -> bool:
        """Whether the .bin file is checked as a whole at every start."""
        return self.bin_bytes <= WHOLE_BYTES

    def token_sample(self, chunks: int = 64, length: int = 4096) -> NDArray:
        """Returns evenly spaced stretches of the .bin file, joined, as a cheap sample of its content."""
        tokens = self.tokens()
        if len(tokens) <= chunks * length:
            return np.asarray(tokens)
        starts = np.linspace(0, len(tokens) - length, chunks).astype(np.int64)
        return np.concatenate([tokens[start : start + length] for start in starts])

    def document_ends(self, limit: int = 1000) -> NDArray:
        """Returns the last token of up to `limit` non-empty sequences that end a document, evenly spaced."""
        count = self.num_documents
        chosen = self.document_borders[1:][np.unique(np.linspace(0, count - 1, min(limit, count)).astype(np.int64))] - 1
        chosen = chosen[(chosen >= 0) & (self.sequence_lengths[chosen] > 0)]
        ends = self.sequence_pointers[chosen] // self.dtype.itemsize + self.sequence_lengths[chosen] - 1
        return self.tokens()[ends]


@dataclass(frozen=True)
class SequenceRange:
    """The sequences [first, stop) of an indexed data set, one split of it; `cache` is for large indices of an epoch."""

    files: IndexedFiles
    first: int
    stop: int
    cache: Path

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens in the range."""
        return self.files.num_tokens(self.first, self.stop)

    def num_samples(self, sequence_length: int) -> int:
        """Returns how many whole samples one epoch has; each needs one token more than `sequence_length`."""
        return max(0, self.num_tokens - 1) // sequence_length


def index_header(dtype: np.dtype, num_documents: int) -> bytes:
    """Returns the beginning of the .idx file of a data set with one sequence per document."""
    code = next(code for code, kind in _DTYPES.items() if kind == dtype)
    return INDEX_HEADER.pack(_MAGIC, 1, code, num_documents, num_documents + 1)


def open_indexed(prefix: str, table: Path | None = None) -> IndexedFiles:
    """Opens PREFIX.bin and PREFIX.idx and checks that they are whole and belong together.

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
            head = stream.read(INDEX_HEADER.size)
        buffer = np.memmap(index_path, mode="r") if size else np.empty(0, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{index_path} cannot be read: {error.strerror}") from error
    if head.startswith(_OLD_MAGIC):
        raise DataError(f"{index_path} is of Megatron's old 'lazy' or 'cached' kind; write it again with the mmap kind")
    if not head.startswith(_MAGIC):
        raise DataError(f"{index_path} is not a Megatron index (it does not start with MMIDIDX)")
    if len(head) < INDEX_HEADER.size:
        raise DataError(f"{index_path} is truncated: {size} bytes are less than its header")
    _, version, code, num_sequences, num_borders = INDEX_HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{index_path} has version {version} of Megatron's index; only version 1 is known")
    if code not in _DTYPES:
        raise DataError(f"{index_path} has token type code {code}; integer tokens have {sorted(_DTYPES)}")
    dtype = np.dtype(_DTYPES[code])
    if size < INDEX_HEADER.size + 12 * num_sequences + 8 * num_borders:
        raise DataError(f"{index_path} is truncated: it announces {num_sequences} sequences but has only {size} bytes")
    lengths_end = INDEX_HEADER.size + 4 * num_sequences
    pointers_end = lengths_end + 8 * num_sequences
    lengths = buffer[INDEX_HEADER.size : lengths_end].view(np.int32)
    pointers = buffer[lengths_end:pointers_end].view(np.int64)
    borders = buffer[pointers_end : pointers_end + 8 * num_borders].view(np.int64)
    _check_borders(index_path, borders, num_sequences)
    _check_sequences(prefix, lengths, pointers, dtype.itemsize, bin_bytes)
    return IndexedFiles(prefix, dtype, lengths, pointers, borders, bin_bytes, table)


def _check_borders(index_path: str, borders: NDArray[np.int64], num_sequences: int) -> None:
    """Raises DataError unless the document borders go from 0 to the number of sequences and never back.

    Equal borders are legal: a document may have no sequence.
    """
    if len(borders) == 0 or borders[0] != 0:
        raise DataError(f"{index_path} is damaged: its first document does not start at sequence 0")
    for first in range(0, len(borders), _AT_ONCE):
        part = borders[first : first + _AT_ONCE + 1]  # with the first border of the next part
        is_bad = (part < 0) | (part > num_sequences)
        is_bad[1:] |= part[1:] < part[:-1]
        if is_bad.any():
            bad = first + int(np.argmax(is_bad))
            raise DataError(
                f"{index_path} is damaged: document {bad} starts at sequence {borders[bad]}, the one before it at "
                f"sequence {borders[bad - 1]} of {num_sequences}; merge or write the index again"
            )
    if borders[-1] != num_sequences:
        raise DataError(
            f"{index_path} is damaged: its last document ends at sequence {borders[-1]}, it has {num_sequences}"
        )


def _check_sequences(
    prefix: str, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int, bin_bytes: int
) -> None:
    """Raises DataError unless every sequence is a stretch of whole tokens of the .bin file that no other one shares.

    Gaps between sequences and sequences in another order are legal, though Megatron's builder writes neither.
    """
    is_ordered, end = True, 0
    for first in range(0, len(lengths), _AT_ONCE):
        begins = pointers[first : first + _AT_ONCE].astype(np.int64)
        sizes = lengths[first : first + _AT_ONCE].astype(np.int64) * itemsize
        # Not begins + sizes > bin_bytes: that sum may exceed 64 bits.
        is_bad = (sizes < 0) | (begins < 0) | (begins & (itemsize - 1) != 0) | (begins > bin_bytes - sizes)
        if is_bad.any():
            bad = first + int(np.argmax(is_bad))
            raise _bad_sequence(prefix, bad, int(pointers[bad]), int(lengths[bad]), itemsize, bin_bytes)
        ends = begins + sizes
        is_ordered &= bool(begins[0] >= end and (begins[1:] >= ends[:-1]).all())
        end = ends[-1]
    if is_ordered:
        return
    filled = np.flatnonzero(lengths)
    filled = filled[np.argsort(pointers[filled], kind="stable")]
    ends = np.maximum.accumulate(pointers[filled] + lengths[filled].astype(np.int64) * itemsize)
    overlaps = np.flatnonzero(pointers[filled[1:]] < ends[:-1])
    if len(overlaps):
        bad = int(np.maximum(filled[overlaps], filled[overlaps + 1]).min())
        raise DataError(
            f"{prefix}.idx is damaged: sequence {bad} (offset {pointers[bad]}, {lengths[bad]} tokens) overlaps another "
            "sequence; offsets that were added up in too few bits do so: write the index again"
        )


def _bad_sequence(prefix: str, number: int, offset: int, length: int, itemsize: int, bin_bytes: int) -> DataError:
    file = f"{prefix}.idx is damaged"
    if length < 0 or offset < 0:
        fault = "has a negative length or offset; write the index again"
    elif offset % itemsize:
        fault = f"starts inside a token of {itemsize} bytes; write the index again"
    else:
        file = f"{prefix}.bin is truncated, or {file}"
        fault = f"ends at byte {offset + length * itemsize}, the .bin file has {bin_bytes}"
    return DataError(f"{file}: sequence {number} (offset {offset}, {length} tokens) {fault}")
