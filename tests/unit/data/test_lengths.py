"""Lengths of documents: the numbers of a table, equal to a plain computation, and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlra_scale.cli.prepare import COMMAND
from mlra_scale.data.lengths import length_table, lengths_of, quantiles_of
from tests.unit.data.builders import prepare_texts, prepare_words


def test_lengths_are_those_of_the_texts(tmp_path: Path) -> None:
    texts = ["a" * (i + 1) for i in range(100)]
    folder = prepare_texts(tmp_path / "set", texts, train_bpe=257, validation_fraction=0.2)
    splits = lengths_of(folder)
    found = np.concatenate([splits["train"], splits["validation"]])
    assert sorted(found.tolist()) == list(range(2, 102))
    table = length_table({"set": splits}).splitlines()
    assert " ".join(table[0].split()) == "data set split documents tokens mean 10 % median 90 % 99 % longest"
    assert table[1].split()[:4] == ["set", "train", str(len(splits["train"])), f"{splits['train'].sum():,}"]


def test_quantiles_are_lengths_that_so_many_documents_do_not_exceed() -> None:
    values = np.random.default_rng(0).integers(1, 10_000, 1001).astype(np.int32)
    ordered = sorted(values.tolist())
    assert quantiles_of(values) == [ordered[100], ordered[500], ordered[900], ordered[990]]
    assert quantiles_of(np.array([7], np.int32)) == [7, 7, 7, 7]


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare_words(tmp_path, 300, 60)
    with pytest.raises(SystemExit) as ended:
        COMMAND.main(["--lengths", str(folder)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "median" in out and out.splitlines()[-1] == str(folder / "lengths.png")
    assert max(map(len, out.splitlines()[:-1])) <= 120
    with Image.open(folder / "lengths.png") as image:
        assert image.size[0] > 800 and image.size[1] > 300
    assert COMMAND.main(["--lengths", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
