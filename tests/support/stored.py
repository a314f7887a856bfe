"""Comparing checkpoints of runs, element by element."""

from pathlib import Path

import torch

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.fragments import PARTS
from mlra_scale.checkpoint.retention import checkpoint_name


def store_of(run_directory: Path, step: int) -> Store:
    """Opens a checkpoint of a run."""
    return Store.open(run_directory / "checkpoints" / checkpoint_name(step))


def assert_bitwise_equal(one: Store, other: Store) -> None:
    """Fails unless weights and both moments are equal to the last bit, and the state beside them is equal too.

    The history of changes is left out: an uninterrupted run has none.
    """
    assert list(one.table) == list(other.table) and len(one.table) > 20
    for name in one.table:
        for part in PARTS:
            mine, theirs = (store.tensor(name, part).view(torch.int32) for store in (one, other))
            assert torch.equal(mine, theirs), f"{part} of {name} differs"
    assert {**one.state, "history": None} == {**other.state, "history": None}
