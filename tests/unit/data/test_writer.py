"""Splits are written as Megatron's builder writes them, also in several goes, and look finished only when they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from mlra_scale.data import DataError, writer
from mlra_scale.data.blocks import BLOCK_BYTES, hash_blocks
from mlra_scale.data.indexed import open_indexed
from mlra_scale.data.manifest import FileSum
from mlra_scale.data.writer import SplitWriter, token_dtype
from tests.unit.data.builders import random_documents, write_documents

DOCUMENTS = random_documents(700, 150, vocabulary=60_000)


def added(target: SplitWriter, first: int, stop: int, at_once: int) -> SplitWriter:
    for begin in range(first, stop, at_once):
        some = DOCUMENTS[begin : min(begin + at_once, stop)]
        target.add(np.concatenate(some), np.array(list(map(len, some))))
    return target


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_bytes_are_those_of_megatrons_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type[np.generic]
) -> None:
    monkeypatch.setattr(writer, "_AT_ONCE", 64)
    write_documents(tmp_path / "theirs", DOCUMENTS, dtype)
    sums = added(SplitWriter(tmp_path / "ours", np.dtype(dtype)), 0, 700, 9).finish()
    for suffix in ("bin", "idx"):
        ours = tmp_path / f"ours.{suffix}"
        assert ours.read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
        assert sums[ours.name] == FileSum.of(ours)
    assert (tmp_path / "ours.blocks").read_bytes() == hash_blocks(tmp_path / "ours.bin").table


def test_the_type_of_tokens_is_megatrons_choice() -> None:
    for size in (300, 50257, 65499, 65500, 65536, 200_000):
        assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


def test_a_writer_continues_where_an_earlier_one_was_killed(tmp_path: Path) -> None:
    whole = added(SplitWriter(tmp_path / "whole", np.dtype(np.uint16)), 0, 700, 50).finish()
    first = added(SplitWriter(tmp_path / "set", np.dtype(np.uint16)), 0, 400, 50)
    written = first.commit()
    added(first, 400, 500, 50).close()  # lost: behind what was committed
    with pytest.raises(DataError, match="is not a Megatron index"):
        open_indexed(str(tmp_path / "set"))
    again = SplitWriter(tmp_path / "set", np.dtype(np.uint16), written)
    assert (again.documents, again.tokens) == (400, sum(map(len, DOCUMENTS[:400])))
    sums = added(again, 400, 700, 30).finish()
    assert list(sums.values()) == list(whole.values())
    # Also when it was killed after its index was written.
    assert added(SplitWriter(tmp_path / "set", np.dtype(np.uint16), written), 400, 700, 7).finish() == sums


def cut(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def scribble(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.seek(BLOCK_BYTES // 100)
        stream.write(b"\x01\x02\x03\x04")


@pytest.mark.parametrize("damage", [cut, scribble, Path.unlink])
@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_damage_to_what_was_committed_is_noticed(tmp_path: Path, suffix: str, damage: Any) -> None:
    first = added(SplitWriter(tmp_path / "set", np.dtype(np.uint16)), 0, 400, 50)
    written = first.commit()
    first.close()
    damage(tmp_path / f"set.{suffix}")
    with pytest.raises(ValueError, match=r"set\.(bin|idx) (is not what was written|has less than \d+ bytes)"):
        SplitWriter(tmp_path / "set", np.dtype(np.uint16), written)
