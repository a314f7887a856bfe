"""Comparing checkpoints of runs, element by element."""

from pathlib import Path

import torch

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.retention import checkpoint_name


def store_of(run_directory: Path, step: int) -> Store:
    """Opens a checkpoint of a run."""
    return Store.open(run_directory / "checkpoints" / checkpoint_name(step))


def weights_of(store: Store) -> dict[str, list[float]]:
    """All weights of a small checkpoint, as numbers that can be compared."""
    return {name: store.tensor(name).flatten().tolist() for name in store.table}


def assert_bitwise_equal(one: Store, other: Store) -> None:
    """Fails unless weights, moments, vectors and the state beside them are equal to the last bit.

    The history of changes is left out: an uninterrupted run has none.
    """
    assert list(one.table) == list(other.table) and len(one.table) > 20
    for name in one.table:
        assert one.parts(name) == other.parts(name), name
        for part in one.parts(name):
            mine, theirs = (store.tensor(name, part).view(torch.int32) for store in (one, other))
            assert torch.equal(mine, theirs), f"{part} of {name} differs"
    vectors, others = one.buffers(), other.buffers()
    assert vectors.keys() == others.keys() and all(torch.equal(vectors[name], others[name]) for name in vectors)
    assert {**one.state, "history": None} == {**other.state, "history": None}
