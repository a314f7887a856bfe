"""A checkpoint of any layout continues in any other: a covering subset of what all_layouts.py runs whole."""

import pytest

from tests.distributed.layout_matrix import (
    BF16_TOLERANCE,
    LAYOUTS,
    Matrix,
    Pools,
    assert_same_run,
    assert_same_tensors,
    largest_difference,
)

# Every layout saves once and loads once; pipeline to ZeRO and back; from and to every world size.
PAIRS = [
    ("tp1", "tp2pp2"),
    ("tp2pp2", "zero3-tp2dp2"),
    ("zero3-tp2dp2", "pp2dp2"),
    ("pp2dp2", "zero3-dp2"),
    ("zero3-dp2", "zero2-tp2"),
    ("zero2-tp2", "tp1"),
]


@pytest.fixture(scope="module")
def matrix(worker_pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(worker_pool, tmp_path_factory.mktemp("checkpoints"))


def test_the_pairs_cover_every_layout() -> None:
    assert {saved for saved, _ in PAIRS} == {loaded for _, loaded in PAIRS} == set(LAYOUTS)


@pytest.mark.slow_except("tp2pp2-zero3-tp2dp2")
@pytest.mark.parametrize(("saved_in", "name"), PAIRS)
def test_any_layout_continues_in_any_other(matrix: Matrix, saved_in: str, name: str) -> None:
    before, after = matrix.saved(saved_in), matrix.loaded(saved_in, name)
    assert_same_tensors(before, after)
    assert largest_difference(before, after) < 1e-6


@pytest.mark.slow_except("tp2pp2-fp32", "zero3-tp2dp2-bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tp2pp2", "zero1-dp2", "zero3-tp2dp2"])
def test_the_same_layout_continues_bitwise(matrix: Matrix, name: str, precision: str) -> None:
    before = matrix.saved(name, precision)
    after = matrix.loaded(name, name, precision, train__precision=precision)
    assert_same_tensors(before, after)
    assert_same_run(before, after)


@pytest.mark.slow_except("tp2pp2-fp32-zero3-tp2dp2-bf16")
@pytest.mark.parametrize(
    ("saved_in", "was", "name", "precision"),
    [
        ("tp2pp2", "fp32", "zero3-tp2dp2", "bf16"),
        ("zero3-tp2dp2", "bf16", "tp2pp2", "fp32"),
        ("zero3-tp2dp2", "bf16", "pp2dp2", "bf16"),
    ],
)
def test_precisions_may_change(matrix: Matrix, saved_in: str, was: str, name: str, precision: str) -> None:
    before, after = matrix.saved(saved_in, was), matrix.loaded(saved_in, name, was, train__precision=precision)
    assert_same_tensors(before, after)
    assert 0.0 < largest_difference(before, after) < BF16_TOLERANCE


@pytest.mark.slow_except("tp1-1-121")
@pytest.mark.parametrize(("name", "multiple", "rows"), [("tp1", 1, 121), ("zero2-tp2", 50, 150)])
def test_the_vocabulary_may_be_padded_otherwise(matrix: Matrix, name: str, multiple: int, rows: int) -> None:
    before = matrix.saved("tp2pp2")
    after = matrix.loaded("tp2pp2", name, model__vocab_padding_multiple=multiple)
    assert (before.config.model.padded_vocab_size, after.config.model.padded_vocab_size) == (128, rows)
    assert_same_tensors(before, after)
    assert largest_difference(before, after) < 1e-6
