"""A run of muon that AdamW continues: what is carried over, what begins anew, and that all of it resumes bitwise."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mlra_scale.config import Config
from mlra_scale.parallel import Engine, build_engine
from tests.distributed.test_restore import assert_same, capture, filler
from tests.support.layouts import DROPOUT, OFFLOADED, Layout, canonical_weights, layout_config, micro_batches, start
from tests.support.pool import Pools

BEGUN, STEPS = 3, 3
RULES = [{"kind": "factor", "optimizer": "muon"}]
"""AdamW updates all other matrices, whose learning rate and weight decay are those of the factors."""
CASES = {
    "tp1": (Layout(), "fp32"),
    "tp2pp2": (Layout(tensor=2, pipeline=2), "fp32"),
    "pp2dp2": (Layout(pipeline=2, data=2, stage=1), "bf16"),
    "zero1-dp2": (Layout(data=2, stage=1), "fp32"),
    "zero3-tp2dp2": (Layout(tensor=2, data=2, stage=3), "fp32"),
    "zero3-dp2": (Layout(data=2, stage=3), "bf16"),
}


class Observed:
    """The clipped gradients of a step, by the place of the fragment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gradients: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, proposal: Any) -> bool:
        limit, norm = self._engine.config.optim.grad_clip, proposal.gradient_norm
        factor = limit / (norm + 1e-6) if norm > limit else 1.0
        for fragment in self._engine.owned_gradients():
            self.gradients[fragment.name, fragment.start] = factor * fragment.values.double()
        return True


def assert_is_adamw(engine: Engine, before: Any, after: Any, observed: Observed, counts: dict[str, int]) -> None:
    """Compares an update with AdamW's formula in fp64; `counts`: its updates of each parameter, this one included."""
    optim = engine.config.optim
    beta1, beta2 = optim.betas
    for place, gradient in observed.gradients.items():
        name = place[0]
        rule, count = engine.rules[name], counts[name]
        weight, mean, square = (tensor.double() for tensor in before[place])
        mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
        change = (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + rule.eps)
        rate = optim.lr * rule.lr_factor
        expected = weight * (1 - rate * rule.weight_decay) - rate * change
        for found, of in zip(after[place], (expected, mean, square), strict=True):
            assert torch.allclose(found.double(), of, rtol=1e-5, atol=2e-7), (place, (found - of).abs().max())


def change(rank: int, world_size: int, config: Config, folder: Path) -> None:
    from mlra_scale.checkpoint import CheckpointError, Saver, Store, checkpoint_name, load_checkpoint
    from mlra_scale.checkpoint.other_optimizer import adam_begun_at, begins_anew

    def saved(engine: Engine, step: int) -> Store:
        saver = Saver(folder, engine.topology, keep_last=9, keep_every=0, asynchronous=True)
        state = {"engine": engine.training_state()}
        saver.save(engine, step, state, engine.buffers(), engine.config.to_yaml(), None)
        saver.finish()
        return Store.open(folder / checkpoint_name(step))

    muon = Config.from_dict({**config.to_dict(), "optim": {**config.to_dict()["optim"], "rules": RULES}})
    engine = start(muon, world_size, canonical_weights(config.model))
    for step in range(BEGUN):
        engine.train_batch(micro_batches(engine, step), muon.optim.lr)
    store, old = saved(engine, BEGUN), capture(engine)

    plain = build_engine(config, engine.plan, engine.topology)
    with pytest.raises(CheckpointError, match="older than two changes of the optimizer"):
        load_checkpoint(plain, store)
    anew = begins_anew(store, plain.rules)
    assert len(anew) == 6 * config.model.num_layers
    begun = adam_begun_at(store, plain.rules)
    assert begun == dict.fromkeys(anew, BEGUN)

    new = build_engine(config, engine.plan, engine.topology, begun)
    load_checkpoint(new, store)
    for (name, begin), (weight, mean, square) in capture(new).items():
        has_moments = name not in begun
        assert has_moments or not (mean.any() or square.any()), name
        if (of_old := old.get((name, begin))) is not None:  # other groups may be cut elsewhere
            kept = (weight, mean, square) if has_moments else (weight,)
            assert all(map(torch.equal, kept, of_old)), name
    for step in range(BEGUN, BEGUN + STEPS):
        before, observed = capture(new), Observed(new)
        new.train_batch(micro_batches(new, step), config.optim.lr, observed)
        counts = {name: step + 1 - begun.get(name, 0) for name in new.rules}
        assert_is_adamw(new, before, capture(new), observed, counts)

    middle, state = capture(new), new.training_state()
    assert state["optimizer_step"] == BEGUN + STEPS and state["adam_begun_at"] == begun
    store = saved(new, BEGUN + STEPS)
    assert adam_begun_at(store, new.rules) == begun and begins_anew(store, new.rules) == []
    expected = steps(new)
    final = capture(new)
    again = build_engine(config, engine.plan, engine.topology, begun)
    load_checkpoint(again, store)
    new.restore(filler(middle), state, with_moments=True)
    for candidate in (new, again):
        assert_same(capture(candidate), middle)
        assert candidate.training_state() == state
        assert steps(candidate) == expected
        assert_same(capture(candidate), final)


def steps(engine: Engine) -> list[Any]:
    first = BEGUN + STEPS
    return [engine.train_batch(micro_batches(engine, step), 1e-3) for step in range(first, first + STEPS)]


@pytest.mark.slow_except("zero1-dp2")
@pytest.mark.parametrize("name", CASES)
def test_adamw_begins_anew_for_some_and_continues_for_the_rest(worker_pool: Pools, tmp_path: Path, name: str) -> None:
    layout, precision = CASES[name]
    config = layout_config(layout, train__precision=precision, model__num_layers=2, **DROPOUT)
    worker_pool(layout.world_size).run(change, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_adamw_too(worker_pool: Pools, tmp_path: Path, name: str) -> None:
    config = layout_config(Layout(data=2), model__num_layers=2, optim__betas=(0.9, 0.952), **DROPOUT)
    config = config.model_copy(update={"deepspeed": {"zero_optimization": OFFLOADED[name]}})
    worker_pool(2).run(change, config, tmp_path, timeout=420.0)


def carry(rank: int, world_size: int, config: Config, optimizer: str) -> None:
    """From AdamW to another optimizer: the momentum is AdamW's first moment, bit by bit, and counts go on."""
    engine = start(config, world_size, canonical_weights(config.model))
    for step in range(BEGUN):
        engine.train_batch(micro_batches(engine, step), config.optim.lr)
    old, state = capture(engine), engine.training_state()
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"name": optimizer})})
    new = build_engine(other, engine.plan, engine.topology)
    new.restore(filler(old), state, with_moments=True)
    assert new.training_state() == state
    for place, tensors in capture(new).items():
        assert len(tensors) == (3 if new.rules[place[0]].optimizer == "adamw" else 2), place
        assert all(map(torch.equal, tensors, old[place])), place
    assert all(result.applied for result in steps(new))


@pytest.mark.slow_except("muon")
@pytest.mark.parametrize("optimizer", ["muon", "spectron"])
def test_the_first_moment_of_adamw_is_carried_over(worker_pool: Pools, optimizer: str) -> None:
    layout = Layout(tensor=2)  # without ZeRO, fragments are cut alike whatever the groups are
    worker_pool(layout.world_size).run(carry, layout_config(layout, model__num_layers=2, **DROPOUT), optimizer)
