"""QK-clip does to the weights what the oracle's logits say, in every layout, and training continues from there."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.stability.activations import ActivationProbe
from mlra_scale.stability.qk_clip import QkClip, clip_factors, row_factors
from tests.distributed.oracle_runs import identify
from tests.support.layouts import (
    MASKED,
    ODD,
    Layout,
    Piece,
    assemble,
    layout_config,
    make_batch,
    micro_batches,
    pieces,
    sharp_weights,
    start,
)
from tests.support.oracle import build_reference
from tests.support.pool import Pools

SAMPLES = 5  # no multiple of a micro-batch
OPTIONS: dict[str, dict[str, Any]] = {
    "mlra": {},
    "dense": {"model__attention": "dense"},
    "sequence-parallel": {"parallel__sequence_parallel": True},
    "odd-masked": {**ODD, **MASKED},
}
CASES = [
    *((Layout(), option) for option in ("mlra", "dense", "odd-masked")),
    (Layout(tensor=2), "sequence-parallel"),
    (Layout(tensor=2), "dense"),
    (Layout(pipeline=2), "mlra"),
    (Layout(data=2, stage=0), "odd-masked"),
    (Layout(data=2, stage=2), "odd-masked"),
    (Layout(tensor=2, pipeline=2, stage=1), "mlra"),
    (Layout(pipeline=2, data=2, stage=1), "dense"),
    (Layout(tensor=2, data=2, stage=3), "mlra"),
    (Layout(tensor=2, data=2, stage=3), "odd-masked"),
]


@dataclass
class Account:
    """One rank's account of a run: the first clip, weights and logits after it, and the steps from there."""

    clips: list[dict[str, Any]] = field(default_factory=list)  # what each clip said
    before: list[Piece] = field(default_factory=list)  # everything that the rank holds
    held: list[Piece] = field(default_factory=list)  # the same after the first clip
    owned: list[Piece] = field(default_factory=list)  # what it owns after the first clip
    logits: list[float] = field(default_factory=list)  # the largest logit of each block after the first clip
    losses: list[float] = field(default_factory=list)  # of the steps after it
    gradient_norms: list[float] = field(default_factory=list)  # likewise


def clip_config(layout: Layout, option: str, precision: str = "fp32", samples: int | None = SAMPLES) -> Config:
    shared: dict[str, Any] = {"train__precision": precision, "optim__eps": 1e-4}  # see test_layouts.py
    clip = {"qk_clip__threshold": threshold(option, samples), "qk_clip__samples": samples}
    shared["activations__samples"] = SAMPLES
    return layout_config(layout, **OPTIONS[option], **shared, **clip)


@cache
def largest_logits(option: str, samples: int | None) -> torch.Tensor:
    """The oracle's largest logit of each block's heads [L, N] over the samples of the first step."""
    config = layout_config(Layout(), **OPTIONS[option])
    return logits_of(config, sharp_weights(config.model), samples or config.train.global_batch_size)


def logits_of(config: Config, weights: dict[str, torch.Tensor], samples: int) -> torch.Tensor:
    batch = make_batch(config, range(samples))
    documents = batch.documents_BS if config.data.document_attention == "masked" else None
    with torch.no_grad():
        reference = build_reference(config, weights)
        logits = reference.attention_logits(batch.tokens_BS, batch.positions_BS, documents)
    return torch.stack([of_block.amax(dim=(0, 2, 3)) for of_block in logits])


def threshold(option: str, samples: int | None) -> float:
    """Between two heads that lie apart, so that rounding cannot bring one to the other side; some are on each."""
    in_order = largest_logits(option, samples).flatten().sort().values[4:12]
    gaps = in_order.diff()
    return float(in_order[:-1][gaps.argmax()] + gaps.max() / 2)


def clip_and_train(rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor]) -> Account:
    engine = start(config, world_size, weights)
    clip, account = QkClip(engine, config.model, config.qk_clip, engine.plan), Account()
    batches = [micro_batches(engine, step) for step in range(3)]
    account.before = pieces(engine, engine.held_fragments())
    account.clips.append(clip.apply(batches[0], 0))
    account.held = pieces(engine, engine.held_fragments())
    account.owned = pieces(engine, engine.owned_fragments())
    probe = ActivationProbe(engine, config.model, config.activations, engine.plan)
    account.logits = probe.measure(batches[0])["largest_logit"]
    for step in range(3):
        result = engine.train_batch(batches[step], config.optim.lr)
        account.losses.append(result.loss)
        account.gradient_norms.append(result.gradient_norm)
        account.clips.append(clip.apply(batches[step], step * config.train.global_batch_size))
    return account


def run(worker_pool: Pools, config: Config, layout: Layout) -> list[Account]:
    return worker_pool(layout.world_size).run(clip_and_train, config, sharp_weights(config.model))


@cache
def one_process(worker_pool: Pools, option: str) -> Account:
    """The steps after the clip, which the oracle does not take."""
    option = "mlra" if option == "sequence-parallel" else option  # which one process cannot have
    return run(worker_pool, clip_config(Layout(), option), Layout())[0]


def expected_factors(config: Config, option: str) -> dict[str, np.ndarray]:
    assert config.qk_clip.threshold is not None
    factor_LN = clip_factors(largest_logits(option, config.qk_clip.samples), config.qk_clip.threshold)
    factors = row_factors(factor_LN, config.model, ParameterTable(config.model))
    return {name: factor.numpy() for name, factor in factors.items()}


def assert_model_follows(
    config: Config, account: Account, weights: dict[str, np.ndarray], largest_LN: torch.Tensor, error: float
) -> None:
    """The model computes with the weights as they are after the clip, which the largest logits show."""
    expected_L = logits_of(config, {name: torch.from_numpy(value) for name, value in weights.items()}, SAMPLES).amax(1)
    assert (expected_L < (1 - 2 * error) * largest_LN.amax(1)).sum() >= 2, "the case shows nothing"
    np.testing.assert_allclose(account.logits, expected_L.numpy(), rtol=error)


def assert_copies_equal(config: Config, ranks: list[Account]) -> None:
    """What several ranks hold is the same on all of them, bit by bit."""
    table = ParameterTable(config.model)
    seen: dict[tuple[str, int, int], np.ndarray] = {}
    for account in ranks:
        for name, tensor_rank, first, values in account.held:
            key = (name, 0 if table[name].shard_dim is None else tensor_rank, first)
            np.testing.assert_array_equal(values, seen.setdefault(key, values), err_msg=name)


@pytest.mark.slow_except("tp2pp1dp2-zero3-odd-masked")
@pytest.mark.parametrize(("layout", "option"), CASES, ids=identify)
def test_fp32_clips_what_the_oracle_would(worker_pool: Pools, layout: Layout, option: str) -> None:
    config = clip_config(layout, option)
    largest, factors = largest_logits(option, SAMPLES), expected_factors(config, option)
    num_clipped = int((largest > threshold(option, SAMPLES)).sum())
    assert 4 < num_clipped < 12
    ranks = run(worker_pool, config, layout)
    first = ranks[0]
    for account in ranks:
        assert (account.clips, account.losses) == (first.clips, first.losses), "ranks disagree"
    assert_copies_equal(config, ranks)
    assert first.clips[0]["clipped_heads"] == num_clipped
    np.testing.assert_allclose(first.clips[0]["largest_logit"], float(largest.max()), rtol=1e-5)

    found = assemble(config, [account.owned for account in ranks])
    weights = {name: tensor.double().numpy() for name, tensor in sharp_weights(config.model).items()}
    for name, value in weights.items():
        factor = factors.get(name, np.ones(len(value))).reshape(-1, *[1] * (value.ndim - 1))
        is_clipped = np.broadcast_to(factor != 1.0, value.shape)
        np.testing.assert_array_equal(found[name][~is_clipped], value[~is_clipped], err_msg=name)
        np.testing.assert_allclose(found[name][is_clipped], (value * factor)[is_clipped], rtol=1e-5, err_msg=name)
    assert_model_follows(config, first, found, largest, 20 * 2**-24)
    alone = one_process(worker_pool, option)
    np.testing.assert_allclose(first.losses, alone.losses, rtol=1e-6)
    np.testing.assert_allclose(first.gradient_norms, alone.gradient_norms, rtol=1e-5)
    for mine, theirs in zip(first.clips, alone.clips, strict=True):
        np.testing.assert_allclose(mine["largest_logit"], theirs["largest_logit"], rtol=1e-5)


@pytest.mark.slow_except("tp1pp2dp1-zero1")
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2),
        Layout(pipeline=2, stage=1),
        Layout(data=2, stage=2),
        Layout(data=2, stage=1),
        Layout(data=2, stage=3),
    ],
    ids=identify,
)
def test_bf16_scales_the_fp32_weights_and_computes_with_them(worker_pool: Pools, layout: Layout) -> None:
    config = clip_config(layout, "mlra", "bf16")
    ranks = run(worker_pool, config, layout)
    first, largest = ranks[0], largest_logits("mlra", SAMPLES)
    assert_copies_equal(config, ranks)
    # What becomes queries and keys is rounded to 2**-8 some twenty times in a row, now up, now down: errors add up as
    # the root of their number. No head is that near to the threshold.
    error = 20**0.5 * 2**-8
    np.testing.assert_allclose(first.clips[0]["largest_logit"], float(largest.max()), rtol=error)
    factors = expected_factors(config, "mlra")
    num_scaled = 0
    for account in ranks:
        for (name, tensor_rank, start_, before), (*_, after) in zip(account.before, account.held, strict=True):
            if name not in factors:
                np.testing.assert_array_equal(after, before, err_msg=name)
                continue
            rows = np.array_split(factors[name], layout.tensor)[tensor_rank]
            width = int(np.prod(ParameterTable(config.model)[name].shape[1:]))
            of_elements = rows.repeat(width)[start_ : start_ + len(before)]
            np.testing.assert_allclose(after, before * of_elements, rtol=error, err_msg=name)
            is_scaled = of_elements != 1.0
            num_scaled += int(is_scaled.sum())
            masters = torch.from_numpy(after[is_scaled])
            assert masters.numel() < 8 or not torch.equal(masters, masters.bfloat16().float()), "not the fp32 weights"
    assert num_scaled > 0
    owned = assemble(config, [account.owned for account in ranks])
    assert_model_follows(config, first, owned, largest, error)


def test_the_whole_batch_is_looked_at_by_default(worker_pool: Pools) -> None:
    layout = Layout(pipeline=2, data=2, stage=1)
    config = clip_config(layout, "mlra", samples=None)
    first = run(worker_pool, config, layout)[0]
    few, largest = largest_logits("mlra", SAMPLES).max(), float(largest_logits("mlra", None).max())
    assert few < largest, "the case shows nothing"
    np.testing.assert_allclose(first.clips[0]["largest_logit"], largest, rtol=1e-5)


def clip_twice(rank: int, world_size: int, config: Config) -> list[dict[str, Any]]:
    engine = start(config, world_size, sharp_weights(config.model))
    clip = QkClip(engine, config.model, config.qk_clip, engine.plan)
    batches = micro_batches(engine, 0)
    return [clip.apply(batches, 0) for _ in range(2)]


@pytest.mark.slow_except("tp2pp1dp1-zero0")
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(data=2, stage=3)], ids=identify)
def test_one_block_is_at_its_threshold_afterwards(worker_pool: Pools, layout: Layout) -> None:
    """With one block nothing before it changes, so that one clip is enough."""
    config = layout_config(layout, model__num_layers=1, qk_clip__threshold=0.05)
    first, second = worker_pool(2).run(clip_twice, config)[0]
    assert first["clipped_heads"] == 4 and first["largest_logit"] > 0.1
    np.testing.assert_allclose(second["largest_logit"], 0.05, rtol=1e-5)
