"""A checkpoint of any layout continues in any other: a covering subset of what all_layouts.py runs whole."""

import pytest

from tests.distributed.all_layouts import MATRIX_OPTIMIZERS, cell
from tests.distributed.layout_matrix import LAYOUTS, Matrix, matrix_config
from tests.support.pool import Pools

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
    cell(matrix, saved_in, name)


@pytest.mark.slow_except("tp2pp2-zero3-tp2dp2-spectron")
@pytest.mark.parametrize("optimizer", MATRIX_OPTIMIZERS)
@pytest.mark.parametrize(("saved_in", "name"), PAIRS)
def test_momentum_and_vectors_continue_in_any_other(matrix: Matrix, saved_in: str, name: str, optimizer: str) -> None:
    cell(matrix, saved_in, name, optimizer=optimizer)


@pytest.mark.slow_except("pp2dp2-bf16-spectron")
@pytest.mark.parametrize("optimizer", MATRIX_OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tp2pp2", "pp2dp2", "zero1-dp2", "zero3-tp2dp2"])
def test_matrix_optimizers_continue_bitwise(matrix: Matrix, name: str, precision: str, optimizer: str) -> None:
    assert cell(matrix, name, name, precision, optimizer, train__precision=precision) == "bitwise"


@pytest.mark.slow_except("tp2pp2-fp32", "zero3-tp2dp2-bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tp2pp2", "zero1-dp2", "zero3-tp2dp2"])
def test_the_same_layout_continues_bitwise(matrix: Matrix, name: str, precision: str) -> None:
    assert cell(matrix, name, name, precision, train__precision=precision) == "bitwise"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_in", "was", "name", "precision"),
    [
        ("tp2pp2", "fp32", "zero3-tp2dp2", "bf16"),
        ("zero3-tp2dp2", "bf16", "tp2pp2", "fp32"),
        ("zero3-tp2dp2", "bf16", "pp2dp2", "bf16"),
    ],
)
def test_precisions_may_change(matrix: Matrix, saved_in: str, was: str, name: str, precision: str) -> None:
    assert cell(matrix, saved_in, name, was, train__precision=precision) not in ("0", "bitwise")


@pytest.mark.slow_except("tp1-1-121")
@pytest.mark.parametrize(("name", "multiple", "rows"), [("tp1", 1, 121), ("zero2-tp2", 50, 150)])
def test_the_vocabulary_may_be_padded_otherwise(matrix: Matrix, name: str, multiple: int, rows: int) -> None:
    assert matrix_config("tp2pp2").model.padded_vocab_size == 128
    assert matrix_config(name, model__vocab_padding_multiple=multiple).model.padded_vocab_size == rows
    cell(matrix, "tp2pp2", name, model__vocab_padding_multiple=multiple)
