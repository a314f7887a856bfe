"""What could go wrong between the ranks of a matrix optimizer is seen in the weights after one update.

The first loss and its gradient do not show such a defect: they are of the weights before it.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mlra_scale.config import Config
from tests.distributed.oracle_runs import Options, Pools, assert_gradients, in_layout, oracle
from tests.distributed.steps import Record, train
from tests.distributed.test_matrix_optimizers import MUON, SPECTRON, assert_matrices_equal
from tests.support.layouts import Layout

ZERO_3 = Layout(tensor=2, data=2, stage=3)
CASES: dict[str, tuple[Layout, Options]] = {
    "shards-alone": (Layout(tensor=2), MUON),
    "pieces-alone": (Layout(data=2, stage=1), {**MUON, "model__num_layers": 3}),
    "results-swapped": (ZERO_3, MUON),
    "results-kept": (ZERO_3, MUON),
    "columns-as-rows": (Layout(tensor=2), MUON),
    "norms-of-shards": (Layout(tensor=2), SPECTRON),
    "norms-of-pieces": (Layout(data=2, stage=3), SPECTRON),
}


def defect(name: str) -> tuple[Any, str, Callable[..., Any]]:
    """What a defect replaces: an object, a name in it, and its replacement."""
    from mlra_scale.parallel import factor_norms, matrix_exchange

    exchange = matrix_exchange.MatrixExchange
    to_owner, from_owner = exchange.to_owner, exchange.from_owner

    def without_the_others(self: Any, turn: Any, parts: Any) -> Any:
        """The owner orthogonalises what it holds itself, zeros elsewhere."""
        matrix = to_owner(self, turn, parts)
        mine = next((transfer for transfer in turn.transfers if transfer.owner == self.rank), None)
        if mine is None:
            return matrix
        flat = matrix_exchange._in_shards(matrix, mine).clone()
        for part in mine.senders:
            if part.rank != self.rank:
                flat[part.start : part.start + part.numel] = 0
        return matrix_exchange._whole(flat, mine)

    def swapped(self: Any, turn: Any, matrix: Any) -> Any:
        """Matrices of one size get each other's results."""
        found = from_owner(self, turn, matrix)
        sizes: dict[int, list[str]] = {}
        for each in found:
            sizes.setdefault(found[each].numel(), []).append(each)
        return {name: found[other] for names in sizes.values() for name, other in zip(names, names[::-1], strict=True)}

    def kept(self: Any, turn: Any, matrix: Any) -> Any:
        """Owners use their results themselves, and send nothing."""
        owners = {transfer.name: transfer.owner for transfer in turn.transfers}
        found = from_owner(self, turn, matrix)
        return {name: part if owners[name] == self.rank else torch.zeros_like(part) for name, part in found.items()}

    defects: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "shards-alone": (exchange, "to_owner", without_the_others),
        "pieces-alone": (exchange, "to_owner", without_the_others),
        "results-swapped": (exchange, "from_owner", swapped),
        "results-kept": (exchange, "from_owner", kept),
        "columns-as-rows": (matrix_exchange, "_whole", lambda flat, transfer: flat.view(transfer.shape)),
        "norms-of-shards": (factor_norms._Sums, "add_up", lambda self: None),
        "norms-of-pieces": (factor_norms._Sums, "add_up", lambda self: None),
    }
    return defects[name]


def train_with_a_defect(
    rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor], name: str
) -> Record:
    with mock.patch.object(*defect(name)):
        return train(rank, world_size, config, 1, weights)


@pytest.mark.slow_except("shards-alone", "results-swapped", "norms-of-shards")
@pytest.mark.parametrize("name", CASES)
def test_a_defect_between_ranks_is_caught(worker_pool: Pools, name: str) -> None:
    layout, options = CASES[name]
    config = in_layout(layout, **options)
    weights, expected = oracle(config, steps=1)
    records = worker_pool(layout.world_size).run(train_with_a_defect, config, weights, name)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    assert_gradients(config, records, expected)
    with pytest.raises(AssertionError, match=r"blocks\.\d\..*weight is off by"):
        assert_matrices_equal(config, records, expected)
