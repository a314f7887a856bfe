"""Saving in one layout and continuing in another: what the ranks do, and what must be equal afterwards.

The tests run a covering subset; `python -m tests.distributed.all_layouts` runs every pair and prints the table of
docs/checkpoints.md.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from mlra_scale.config import Config
from mlra_scale.model.update_rules import update_rules
from mlra_scale.parallel import Engine, Fragment
from tests.support.layouts import (
    DROPOUT,
    Layout,
    Piece,
    assemble,
    canonical_weights,
    layout_config,
    micro_batches,
    pieces,
    start,
)
from tests.support.pool import Pools

Tensors = dict[str, dict[str, np.ndarray]]

LAYOUTS = {
    "tp1": Layout(),
    "tp2pp2": Layout(tensor=2, pipeline=2),
    "pp2dp2": Layout(pipeline=2, data=2, stage=1),
    "zero3-dp2": Layout(data=2, stage=3),
    "zero3-tp2dp2": Layout(tensor=2, data=2, stage=3),
    "zero2-tp2": Layout(tensor=2, stage=2),
}
OTHERS = {"zero1-dp2": Layout(data=2, stage=1)}
"""Layouts outside the matrix that are resumed as they were."""

PARTS = {"weight": "values", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
SAVED_AT, MORE = 5, 5
BF16_TOLERANCE = 2**-11  # what one bf16 process may err in a loss against fp32 (test_layouts.py)


@dataclass
class Account:
    """One rank's account of a save or a load, and of the steps after it."""

    owned: dict[str, list[Piece]]  # its pieces of weights and moments
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # of power iterations; all of them, on rank 0
    losses: list[float] = field(default_factory=list)  # of the steps that followed
    gradient_norms: list[float] = field(default_factory=list)  # likewise
    final: dict[str, list[Piece]] = field(default_factory=dict)  # its pieces after them
    final_vectors: dict[str, np.ndarray] = field(default_factory=dict)


def layout_of(name: str) -> Layout:
    return {**LAYOUTS, **OTHERS}[name]


def matrix_config(name: str, **overrides: Any) -> Config:
    """The model of the matrix in a layout; dropout is on: its masks do not depend on the layout."""
    return layout_config(layout_of(name), **{**DROPOUT, **overrides})


def owned_pieces(engine: Engine) -> dict[str, list[Piece]]:
    owned = engine.owned_fragments(with_moments=True)
    return {
        part: pieces(engine, [Fragment(f.name, f.start, getattr(f, of)) for f in owned if getattr(f, of) is not None])
        for part, of in PARTS.items()
    }


def vectors_of(engine: Engine) -> dict[str, np.ndarray]:
    return {name: vector.numpy().copy() for name, vector in engine.buffers().items()}


def continue_training(engine: Engine) -> Account:
    account = Account(owned_pieces(engine), vectors_of(engine))
    for step in range(SAVED_AT, SAVED_AT + MORE):
        batches = micro_batches(engine, step)
        result = engine.train_batch(batches, engine.config.optim.lr)
        account.losses.append(result.loss)
        account.gradient_norms.append(result.gradient_norm)
    account.final, account.final_vectors = owned_pieces(engine), vectors_of(engine)
    return account


def save(rank: int, world_size: int, config: Config, folder: Path) -> Account:
    """Trains, saves, and continues without interruption, to updates that the save is slower than."""
    from mlra_scale.checkpoint import Saver, failpoints

    engine = start(config, world_size, canonical_weights(config.model))
    for step in range(SAVED_AT):
        engine.train_batch(micro_batches(engine, step), config.optim.lr)
    saver = Saver(folder, engine.topology, keep_last=1, keep_every=0, asynchronous=True)
    state = {"engine": engine.training_state()}
    with mock.patch.object(failpoints, "reached", lambda point: time.sleep(0.2 * (point == "copy"))):
        saver.save(engine, SAVED_AT, state, engine.buffers(), config.to_yaml(), None)
        account = continue_training(engine)
        saver.finish()
    return account


def load(rank: int, world_size: int, config: Config, folder: Path) -> Account:
    """Continues from the checkpoint, in an engine that was begun with other weights."""
    from mlra_scale.checkpoint import Store, checkpoint_name, load_checkpoint

    engine = start(config, world_size, canonical_weights(config.model, seed=11))
    load_checkpoint(engine, Store.open(folder / checkpoint_name(SAVED_AT)))
    return continue_training(engine)


@dataclass
class Run:
    """A case on all ranks: its configuration and the ranks' accounts."""

    config: Config
    ranks: list[Account]

    def tensors(self, is_final: bool = False) -> Tensors:
        """The global tensors by part and name, at the checkpoint or after the last step; each element has one owner."""
        accounts = [rank.final if is_final else rank.owned for rank in self.ranks]
        rules = update_rules(self.config.model, self.config.optim)
        names = {part: list(rules) for part in PARTS}
        names["exp_avg_sq"] = [name for name, rule in rules.items() if rule.optimizer == "adamw"]
        return {part: assemble(self.config, [each[part] for each in accounts], names[part]) for part in PARTS}


class Matrix:
    """Checkpoints that are made once and continued from in many layouts."""

    def __init__(self, pools: Pools, folder: Path) -> None:
        self._pools = pools
        self._folder = folder
        self._saved: dict[tuple[str, str, str], Run] = {}

    def saved(self, name: str, precision: str = "fp32", optimizer: str = "adamw") -> Run:
        """The run in a layout that saves; made at the first call."""
        key = (name, precision, optimizer)
        if key not in self._saved:
            config = matrix_config(name, train__precision=precision, optim__name=optimizer)
            ranks = self._pools(layout_of(name).world_size).run(save, config, self._folder_of(*key))
            self._saved[key] = Run(config, ranks)
        return self._saved[key]

    def loaded(self, saved_in: str, name: str, was: str = "fp32", optimizer: str = "adamw", **overrides: Any) -> Run:
        """The run in a layout that continues from the checkpoint of another one."""
        self.saved(saved_in, was, optimizer)
        config = matrix_config(name, optim__name=optimizer, **overrides)
        ranks = self._pools(layout_of(name).world_size).run(load, config, self._folder_of(saved_in, was, optimizer))
        return Run(config, ranks)

    def _folder_of(self, *key: str) -> Path:
        return self._folder / "-".join(key)


def assert_same_tensors(before: Run, after: Run) -> None:
    """Weights, moments and vectors are bitwise those that were saved; rows of the vocabulary's padding are zero."""
    assert_same_vectors(before.ranks[0].vectors, after.ranks[0].vectors)
    vocabulary = before.config.model.vocab_size
    old, new = before.tensors(), after.tensors()
    for part in PARTS:
        for name, expected in old[part].items():
            found = new[part][name]
            if name == "embedding.weight":
                assert not expected[vocabulary:].any() and not found[vocabulary:].any(), part
                expected, found = expected[:vocabulary], found[:vocabulary]
            np.testing.assert_array_equal(found, expected, err_msg=f"{part} of {name}")
            assert part == "weight" or found.any() or name.endswith((".k.up.bias", ".k.bias")), (part, name)


def assert_same_run(before: Run, after: Run) -> None:
    """The steps after the checkpoint are bitwise those of the run that was not interrupted."""
    for expected, found in zip(before.ranks, after.ranks, strict=True):
        assert (found.losses, found.gradient_norms) == (expected.losses, expected.gradient_norms)
    old, new = before.tensors(is_final=True), after.tensors(is_final=True)
    for part in PARTS:
        for name, expected_tensor in old[part].items():
            np.testing.assert_array_equal(new[part][name], expected_tensor, err_msg=f"{part} of {name}")
    assert_same_vectors(before.ranks[0].final_vectors, after.ranks[0].final_vectors)


def assert_same_vectors(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, vector in expected.items():
        np.testing.assert_array_equal(found[name], vector, err_msg=name)


def largest_difference(before: Run, after: Run) -> float:
    """Largest relative difference between the losses of the steps after the checkpoint; ranks agree on them."""
    assert all(rank.losses == after.ranks[0].losses for rank in after.ranks)
    expected, found = np.array(before.ranks[0].losses), np.array(after.ranks[0].losses)
    return float(np.abs(found / expected - 1).max())
