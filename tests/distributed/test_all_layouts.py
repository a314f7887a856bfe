"""A checkpoint of every layout continues in every other, in fp32 and bf16, with a change of precision or of padding."""

from typing import Any

import pytest

from tests.distributed.all_layouts import CHANGES, MATRIX_OPTIMIZERS, cell
from tests.distributed.layout_matrix import LAYOUTS, Matrix
from tests.support.pool import Pools

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def matrix(worker_pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(worker_pool, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("saved_in", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", *MATRIX_OPTIMIZERS])
def test_every_layout_continues_in_every_other(
    matrix: Matrix, optimizer: str, precision: str, saved_in: str, name: str
) -> None:
    cell(matrix, saved_in, name, precision, optimizer, train__precision=precision)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("saved_in", "was", "overrides"), CHANGES.values(), ids=CHANGES)
def test_precision_and_padding_may_change(
    matrix: Matrix, saved_in: str, was: str, overrides: dict[str, Any], name: str
) -> None:
    cell(matrix, saved_in, name, was, **overrides)
