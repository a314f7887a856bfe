"""One epoch: the samples are those of Megatron's GPTDataset, whoever opens them and wherever the indices live."""

from __future__ import annotations

import errno
import random
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from mlra_scale.data.index_cache import damaged_caches
from mlra_scale.data.indexed import SequenceRange
from mlra_scale.data.one_epoch import OneEpoch
from tests.unit.data.builders import random_documents, whole_range, write_documents

SHAPES = {
    "many short documents": (random_documents(400, 3), 32),
    "long documents": (random_documents(6, 700), 16),
    "mixed, some empty": ([d if i % 5 else [] for i, d in enumerate(random_documents(60, 40))], 25),
    "one document": (random_documents(1, 900, seed=3), 7),
    "documents as long as a sample": ([[*range(1, 10), 0]] * 20, 10),
    "barely one sample": ([[1, 2, 3], [4, 5, 6, 7, 8, 0]], 8),
    "length one": (random_documents(10, 4), 1),
}


def rows(epoch: OneEpoch) -> np.ndarray:
    return epoch.token_rows(np.arange(len(epoch)))


class NoTokenizer:
    """What GPTDatasetConfig wants where nothing is tokenized or padded."""

    vocab_size = None
    unique_identifiers: ClassVar[dict[str, str]] = {}
    pad = -1
    eod = -2


def of_megatron(prefix: Path, num_documents: int, length: int) -> GPTDataset:
    """Megatron's own data set over the same documents."""
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=length,
        tokenizer=NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    documents = np.arange(num_documents, dtype=np.int32)
    return GPTDataset(IndexedDataset(str(prefix)), str(prefix), documents, None, Split.train, config)


@pytest.mark.parametrize("name", SHAPES)
def test_the_samples_are_those_of_a_gpt_dataset(tmp_path: Path, name: str) -> None:
    documents, length = SHAPES[name]
    prefix = write_documents(tmp_path / "set", documents)
    epoch, theirs = OneEpoch(whole_range(prefix), length), of_megatron(prefix, len(documents), length)
    assert len(epoch) == len(theirs) == (sum(map(len, documents)) - 1) // length
    assert (epoch.document_index == theirs.document_index).all() and (epoch.sample_index == theirs.sample_index).all()
    read = rows(epoch)
    for index, sample in enumerate(theirs.shuffle_index):
        item = theirs[index]
        assert item["tokens"].tolist() == read[sample, :-1].tolist()
        assert item["labels"].tolist() == read[sample, 1:].tolist()
    # In any order and with repetition.
    some = np.random.default_rng(0).integers(0, len(epoch), size=30)
    assert (epoch.token_rows(some) == read[some]).all()
    # The epoch is the documents in some order, end to end; neighbours overlap by the one token that is a target first.
    stretch = np.concatenate([read[:1, 0], read[:, 1:].ravel()]).tolist()
    joined = [token for number in epoch.document_index for token in documents[number]]
    assert stretch == joined[: len(stretch)] and len(joined) - len(stretch) < length
    assert sorted(epoch.document_index.tolist()) == list(range(len(documents)))


def test_only_the_range_is_read(tmp_path: Path) -> None:
    documents = random_documents(30, 20, seed=1)
    whole = whole_range(write_documents(tmp_path / "set", documents))
    tokens = sum(map(len, documents[10:25]))
    epoch = OneEpoch(SequenceRange(whole.files, 10, 25, whole.cache), 8)
    assert sorted(epoch.document_index.tolist()) == list(range(10, 25))
    assert len(epoch) == (tokens - 1) // 8


def test_indices_of_large_data_are_cached_and_the_same(tmp_path: Path) -> None:
    data_range = whole_range(write_documents(tmp_path / "set", random_documents(100, 20)))
    in_memory = rows(OneEpoch(data_range, 16))
    assert not data_range.cache.exists()
    built = rows(OneEpoch(data_range, 16, cache_from=1))
    assert len(list(data_range.cache.glob("*/samples.npy"))) == 1
    loaded = OneEpoch(data_range, 16, cache_from=1)
    assert isinstance(loaded.sample_index, np.memmap)
    assert (in_memory == built).all() and (in_memory == rows(loaded)).all()
    OneEpoch(data_range, 8, cache_from=1)
    assert len(list(data_range.cache.glob("*/samples.npy"))) == 2
    assert not list(data_range.cache.glob("building-*"))


def test_many_openers_at_once_build_one_cache(tmp_path: Path) -> None:
    data_range = whole_range(write_documents(tmp_path / "set", random_documents(2000, 20)))
    found: list[np.ndarray] = []
    start = threading.Barrier(6)

    def opener() -> None:
        start.wait()
        found.append(rows(OneEpoch(data_range, 16, cache_from=1)))

    threads = [threading.Thread(target=opener) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all((one == found[0]).all() for one in found)
    assert len(list(data_range.cache.iterdir())) == 2  # the indices and the lock


@pytest.mark.parametrize("obstacle", ["a file in the way", "no indices"])
def test_without_a_usable_cache_the_indices_stay_in_memory(tmp_path: Path, obstacle: str) -> None:
    data_range = whole_range(write_documents(tmp_path / "set", random_documents(100, 20)))
    expected = rows(OneEpoch(data_range, 16))
    if obstacle == "a file in the way":
        data_range.cache.write_text("not a folder")
    else:
        OneEpoch(data_range, 16, cache_from=1)
        next(data_range.cache.glob("*/samples.npy")).unlink()
    assert (rows(OneEpoch(data_range, 16, cache_from=1)) == expected).all()


def test_a_flipped_bit_in_a_cached_index_is_seen_and_mended(tmp_path: Path) -> None:
    data_range = whole_range(write_documents(tmp_path / "set", random_documents(100, 20)))
    expected, draw = rows(OneEpoch(data_range, 16)), random.Random(3)
    OneEpoch(data_range, 16, cache_from=1)
    for name in ("documents.npy", "samples.npy", "sha256.json"):
        for _ in range(8):
            (path,) = data_range.cache.glob(f"*/{name}")
            content = bytearray(path.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            assert damaged_caches(data_range.cache)
            assert (rows(OneEpoch(data_range, 16, cache_from=1)) == expected).all()
            assert damaged_caches(data_range.cache) == []
    # A folder as an earlier version left it has no sums: it is built anew.
    (sums,) = data_range.cache.glob("*/sha256.json")
    sums.unlink()
    assert (rows(OneEpoch(data_range, 16, cache_from=1)) == expected).all() and sums.is_file()


def test_whole_indices_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks several ranks build at once: the later ones leave alone what the first may have mapped."""
    data_range = whole_range(write_documents(tmp_path / "set", random_documents(100, 20)))
    monkeypatch.setattr("fcntl.flock", no_locks)
    build, mapped = OneEpoch._build_indices, list[OneEpoch]()

    def slow_build(self: OneEpoch) -> tuple[np.ndarray, np.ndarray]:
        if not mapped:  # meanwhile another rank builds them, and maps them
            mapped.append(None)  # type: ignore[arg-type]
            mapped[0] = OneEpoch(data_range, 16, cache_from=1)
        return build(self)

    monkeypatch.setattr(OneEpoch, "_build_indices", slow_build)
    late = OneEpoch(data_range, 16, cache_from=1)
    (samples,) = data_range.cache.glob("*/samples.npy")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(data_range.cache) in line]
    assert len(maps) >= 2 and not [line for line in maps if "(deleted)" in line]
    assert (rows(late) == rows(mapped[0])).all() and samples.is_file()
    assert not list(data_range.cache.glob("building-*"))


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")
