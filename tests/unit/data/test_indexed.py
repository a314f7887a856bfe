"""Indexed files are read as Megatron reads them, and every defect is told in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mlra_scale.data.errors import DataError
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
    ("suffix", "change", "told"),
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
def test_defects_are_told(tmp_path: Path, suffix: str, change: bytes | int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_indexed(damaged(tmp_path, suffix, change))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_file_is_told(tmp_path: Path, suffix: str) -> None:
    prefix = write_documents(tmp_path / "set", random_documents(5, 10))
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"set\{suffix} does not exist"):
        open_indexed(str(prefix))
