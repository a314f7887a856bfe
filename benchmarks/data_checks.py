"""What the checks of data cost: opening a large Megatron index, and hashing blocks of a .bin file when they are read.

    python -m benchmarks.data_checks [--sequences 10000000] [--samples 4000]

Times are of files in the page cache. The extra memory is what the process allocates, without pages of the mapped file.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
import tracemalloc
from pathlib import Path
from time import perf_counter

import numpy as np

from mlra_scale.data.blocks import hash_blocks
from mlra_scale.data.indexed import SequenceRange, open_indexed
from mlra_scale.data.one_epoch import OneEpoch

_SAMPLES_AT_ONCE = 8


def write_pair(prefix: Path, lengths: np.ndarray) -> None:
    """Writes a pair whose sequences have these lengths and random tokens of 16 bits; a document is a sequence."""
    count, itemsize = len(lengths), 2
    ends = np.cumsum(lengths.astype(np.int64) * itemsize)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    arrays: list[np.ndarray] = [lengths.astype(np.int32), ends - lengths * itemsize, np.arange(count + 1)]
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    tokens = np.random.default_rng(0).integers(0, 50_000, int(lengths.sum()), dtype=np.uint16)
    tokens.tofile(f"{prefix}.bin")


def measure_opening(prefix: Path) -> dict[str, float]:
    """Opens an index that was read before; returns seconds, and MB that were allocated meanwhile."""
    began = perf_counter()
    open_indexed(str(prefix))
    seconds = perf_counter() - began
    began = perf_counter()
    files = open_indexed(str(prefix))
    assert files.index_sha256
    with_checksum = perf_counter() - began
    tracemalloc.start()
    open_indexed(str(prefix))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": seconds, "seconds with SHA-256": with_checksum, "MB allocated": peak / 1e6}


def measure_reading(prefix: Path, num_samples: int, length: int) -> dict[str, float]:
    """Reads samples in a random order, without block hashes, for the first time and once more; samples per second."""
    table = Path(f"{prefix}.blocks")
    table.write_bytes(hash_blocks(Path(f"{prefix}.bin")).table)
    rates = {}
    for name, blocks in (("no hashes", None), ("hashes", table)):
        files = open_indexed(str(prefix), blocks)
        epoch = OneEpoch(SequenceRange(files, 0, len(files.sequence_lengths), Path(f"{prefix}.cache")), length)
        rows = np.random.default_rng(1).integers(0, len(epoch), num_samples)
        for turn in ("first", "again"):
            began = perf_counter()
            for first in range(0, num_samples, _SAMPLES_AT_ONCE):
                epoch.token_rows(rows[first : first + _SAMPLES_AT_ONCE])
            rates[f"{name}, {turn}"] = num_samples / (perf_counter() - began)
    return rates


def main() -> None:
    """Measures both and prints what was compared."""
    parser = argparse.ArgumentParser(description="What the checks of data cost.")
    parser.add_argument("--sequences", type=int, default=10_000_000, help="of the index that is opened")
    parser.add_argument("--samples", type=int, default=4000, help="that are read from 200 MB of tokens")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "index")
        write_pair(prefix, generator.integers(1, 20, arguments.sequences))
        print(
            f"opening an index of {arguments.sequences:,} sequences (.idx {Path(f'{prefix}.idx').stat().st_size:,} B)"
        )
        for name, value in measure_opening(prefix).items():
            print(f"  {name:<22} {value:.3g}")
        prefix = Path(folder, "tokens")
        write_pair(prefix, generator.integers(200, 2000, 90_000))
        print(f"reading {arguments.samples:,} samples of 1024 tokens, {_SAMPLES_AT_ONCE} at once, samples per second")
        for name, value in measure_reading(prefix, arguments.samples, 1024).items():
            print(f"  {name:<22} {value:,.0f}")


if __name__ == "__main__":
    main()
