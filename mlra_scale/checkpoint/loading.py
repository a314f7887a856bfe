"""Loading a checkpoint into an engine of any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.other_optimizer import adam_begun_at, begins_anew, vectors_anew
from mlra_scale.checkpoint.reader import Store

if TYPE_CHECKING:
    from mlra_scale.parallel import Engine
    from mlra_scale.parallel.fragments import Fragment
    from mlra_scale.parallel.topology import Topology


def open_on_all_ranks(folder: Path, topology: Topology) -> Store:
    """Opens a checkpoint on every rank; collective.

    Raises:
        CheckpointError: Some rank cannot open it; on every rank.
    """
    store, faults = None, []
    try:
        store = Store.open(folder)
    except CheckpointError as error:
        faults.append(str(error))
    _raise_on_all_ranks(f"{folder} cannot be opened", faults, topology)
    assert store is not None
    return store


def load_checkpoint(engine: Engine, store: Store) -> dict[str, Any]:
    """Loads weights, moments, optimizer step and loss scale into an engine of any layout; collective.

    Every rank reads what it holds and no more. Checksums are not compared here: see Store.verify. Where a parameter has
    another optimizer than in the checkpoint, see other_optimizer.py.

    Returns:
        The checkpoint's state section.

    Raises:
        CheckpointError: On every rank. Nothing is changed where the model is another one; where a file cannot be read
            the engine is left half filled and must not be used.
    """
    _check_model(engine, store)
    topology = engine.topology
    faults: list[str] = []
    begun, anew = adam_begun_for(engine, store), frozenset(begins_anew(store, engine.rules))
    dropped = frozenset(vectors_anew(store, engine.rules))
    buffers = {name: vector for name, vector in store.buffers().items() if name not in dropped}
    state = store.state.get("engine")
    if state is not None:
        state = {**state, "adam_begun_at": begun}

    def fill(fragment: Fragment) -> None:
        if fragment.name in anew and fragment.exp_avg is not None and fragment.exp_avg_sq is not None:
            fragment.exp_avg.zero_()
            fragment.exp_avg_sq.zero_()
            fragment = replace(fragment, exp_avg=None, exp_avg_sq=None)
        try:
            store.fill(fragment, topology.tensor, topology.tensor_rank, engine.table[fragment.name])
        except (CheckpointError, OSError) as error:
            # Restoring is collective: this rank continues with the others, and reports its fault at the end.
            faults.append(str(error))

    engine.restore(fill, state, store.manifest.has_moments)
    engine.load_buffers(buffers)
    _raise_on_all_ranks(f"{store.folder} cannot be loaded", faults, topology)
    return store.state


def adam_begun_for(engine: Engine, store: Store) -> dict[str, int]:
    """Returns `adam_begun_at` of a checkpoint for the rules of an engine.

    Raises:
        CheckpointError: The engine has one count of updates for parameters that have several in the checkpoint.
    """
    begun = adam_begun_at(store, engine.rules)
    if not engine.has_counts_for(begun):
        raise CheckpointError(
            f"{store.folder} is older than two changes of the optimizer; continue from it with --resume {store.folder}"
        )
    return begun


def _raise_on_all_ranks(what: str, faults: list[str], topology: Topology) -> None:
    """Raises on every rank where one has a fault; collective."""
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, faults[:1], group=topology.control_group)
    found = [f"rank {rank}: {of_rank[0]}" for rank, of_rank in enumerate(gathered) if of_rank]
    if found:
        raise CheckpointError(f"{what}: {'; '.join(found[:3])}")


def _check_model(engine: Engine, store: Store) -> None:
    """Compares names and shapes; the embedding may have another number of padded rows."""
    if engine.table.vocab_size != store.table.vocab_size:
        raise CheckpointError(
            f"{store.folder} has a vocabulary of {store.table.vocab_size} tokens, this run {engine.table.vocab_size}:"
            " continue with the prepared data of that run, or start another run directory"
        )
    for name in sorted(engine.table.keys() | store.table.keys()):
        mine, stored = (table[name].shape if name in table else None for table in (engine.table, store.table))
        is_same = mine == stored
        if mine is not None and stored is not None and engine.table[name].kind == "embedding":
            is_same = mine[1:] == stored[1:]
        if not is_same:
            raise CheckpointError(
                f"{store.folder} has {name} of shape {stored}, the model of this run {mine}: continue with the `model`"
                " section of config.yaml there, or start another run directory"
            )
