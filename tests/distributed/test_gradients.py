"""Gradient statistics in every kind of layout: they equal numpy's and the oracle's, and they change nothing."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.config import Config, batch_plan
from mlra_scale.model.parameters import ParameterTable
from tests.distributed.steps import allow_fp16_on_cpu
from tests.support.layouts import (
    DROPOUT,
    ODD,
    Layout,
    Piece,
    assemble,
    canonical_weights,
    layout_config,
    make_batch,
    micro_batches,
    overwrite,
    pieces,
    start,
)
from tests.support.oracle import build_reference, reference_run
from tests.support.pool import Pools

Tensors = dict[str, np.ndarray]

STEPS, REFUSED = 3, 2
EVERYTHING = {"gradients__every": 1, "gradients__noise_every": 1, "gradients__spectral_iterations": 12}
# Every place where DeepSpeed keeps masters and gradients, both engines, and rows that ZeRO cuts. Without dropout the
# oracle knows the gradient.
CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "tp2": (Layout(tensor=2), {}),
    "dp2": (Layout(data=2), {}),
    "zero1": (Layout(data=2, stage=1), {}),
    "zero2-dense": (Layout(data=2, stage=2), {"model__attention": "dense"}),
    "zero3": (Layout(data=2, stage=3), {}),
    "tp2pp2-o": (Layout(tensor=2, pipeline=2), {"model__factorised_projections": ("q", "k", "v", "o")}),
    "tp2-bf16": (Layout(tensor=2), {"train__precision": "bf16", **DROPOUT}),
    "zero1-bf16": (Layout(data=2, stage=1), {"train__precision": "bf16", **DROPOUT}),
    "zero2-fp16": (Layout(data=2, stage=2), {"train__precision": "fp16", **DROPOUT}),
    "zero3-bf16": (Layout(data=2, stage=3), {"train__precision": "bf16", **DROPOUT}),
    "pp2dp2-zero1-bf16": (Layout(pipeline=2, data=2, stage=1), {"train__precision": "bf16", **DROPOUT}),
    "tp2dp2-zero3-odd": (Layout(tensor=2, data=2, stage=3), {**ODD, **DROPOUT}),
    # Modules that read the weights of others, which ZeRO 3 has to know from the first pass on.
    "tp2dp2-zero3-merged": (Layout(tensor=2, data=2, stage=3), {"parallel__low_rank_plan": "merged", **DROPOUT}),
    # No second moment: the update is the difference of the weights.
    "zero1-bf16-muon": (Layout(data=2, stage=1), {"train__precision": "bf16", "optim__name": "muon", **DROPOUT}),
    "tp2dp2-zero3-odd-spectron": (
        Layout(tensor=2, data=2, stage=3),
        {**ODD, "optim__name": "spectron", "optim__rules": [{"kind": "factor", "lr_factor": 0.5}], **DROPOUT},
    ),
    "tp2dp2-zero3-sequence": (Layout(tensor=2, data=2, stage=3), {"parallel__sequence_parallel": True, **DROPOUT}),
}


@dataclass
class Account:
    """What one rank saw of a run that measured."""

    records: list[dict[str, Any]] = field(default_factory=list)  # what `after_step` returned, per step
    results: list[Any] = field(default_factory=list)  # what the engine reported, per step
    gradients: list[list[Piece]] = field(default_factory=list)  # its share of each step's gradient
    # Its share of the weights before each step, and after the last.
    weights: list[list[Piece]] = field(default_factory=list)
    # Fp16: the norm of an extra pass at too high a loss scale, and the scale and `num_skipped` after it.
    overflow: tuple[float, float, int] | None = None
    is_unchanged: bool = False  # whether a run without measurements was the same, bit by bit


def measured_and_plain(rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor]) -> Account:
    """Trains with all measurements, the first of them before anything else, and from the same weights without."""
    from mlra_scale.stability.gradients import GradientStatistics
    from mlra_scale.stability.watcher import Step

    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    engine = start(config, world_size, weights)
    account, statistics = Account(), GradientStatistics(engine, config)
    batches = [micro_batches(engine, step) for step in range(STEPS)]

    def approve(proposal: Any) -> bool:
        statistics.before_update(proposal)
        account.gradients.append(pieces(engine, engine.owned_gradients()))
        return len(account.gradients) != REFUSED

    for step in range(1, STEPS + 1):
        account.weights.append(pieces(engine, engine.owned_fragments()))
        now = Step(step, True, 0, batches[step - 1], config.optim.lr)
        statistics.before_step(now)
        account.results.append(engine.train_batch(now.batches, now.learning_rate, approve))
        account.records.append(dict(statistics.after_step(now, account.results[-1])))
    account.weights.append(pieces(engine, engine.owned_fragments()))
    measured = final_state(engine)

    if config.train.precision == "fp16":
        scaler = engine.deepspeed_engine.optimizer.loss_scaler
        scaler.cur_scale = 2.0**100
        norm = engine.gradient_norm(batches[0])
        account.overflow = (norm, scaler.cur_scale, engine.num_skipped)
    overwrite(engine, weights)
    plain = [
        engine.train_batch(batches[step - 1], config.optim.lr, lambda _, step=step: step != REFUSED)
        for step in range(1, STEPS + 1)
    ]
    state, tensors = final_state(engine)
    account.is_unchanged = (
        plain == account.results
        and state == measured[0]
        and len(tensors) == len(measured[1])
        and all(np.array_equal(a, b) for a, b in zip(tensors, measured[1], strict=True))
    )
    return account


def final_state(engine: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """All that continues a run: counters and loss scale, then weights and both moments."""
    held = engine.held_fragments(with_moments=True)
    tensors = [getattr(fragment, part) for fragment in held for part in ("values", "exp_avg", "exp_avg_sq")]
    there = [tensor.detach() for tensor in tensors if tensor is not None]  # muon and spectron have one moment
    return engine.training_state(), [tensor.numpy().copy() for tensor in there]


@pytest.mark.slow_except("tp2pp2-o")
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_right_and_change_nothing(worker_pool: Pools, case: str) -> None:
    layout, options = CASES[case]
    config = layout_config(layout, parallel__world_size=layout.world_size, **EVERYTHING, **options)
    weights = canonical_weights(config.model)
    ranks = worker_pool(layout.world_size).run(measured_and_plain, config, weights)
    first = ranks[0]
    for account in ranks:
        assert account.is_unchanged, "a run that measures is another run"
        assert (account.records, account.results) == (first.records, first.results), "ranks disagree"
    assert [result.applied for result in first.results] == [True, False, True]

    gradients = [assemble(config, [rank.gradients[step] for rank in ranks]) for step in range(STEPS)]
    states = [assemble(config, [rank.weights[step] for rank in ranks]) for step in range(STEPS + 1)]
    assert not gradients[0]["embedding.weight"][config.model.vocab_size :].any(), "padded rows have a gradient"
    for step, (record, result) in enumerate(zip(first.records, first.results, strict=True)):
        found = record["gradients"]
        check_statistics(config, found, gradients[step], states[step], states[step + 1])
        check_spectral_norms(config, found["layers"], states[step])
        check_noise(config, layout, record["noise"], result)
        # The step's own norm is a sum of fp32 norms.
        np.testing.assert_allclose(found["kinds"]["all"]["gradient_norm"], result.gradient_norm, rtol=1e-6)
    assert first.records[REFUSED - 1]["gradients"]["kinds"]["all"]["update_ratio"] == 0.0
    assert first.records[0]["gradients"]["kinds"]["all"]["update_ratio"] > 0.0
    if config.train.precision == "fp16":
        for account in ranks:
            norm, scale, num_skipped = account.overflow
            assert not math.isfinite(norm) and (scale, num_skipped) == (2.0**100, 1)
    if config.train.precision == "fp32" and not config.model.embedding_dropout:
        check_against_the_oracle(config, layout, weights, first.records[0])


def group_members(config: Config) -> dict[str, list[str]]:
    """Parameters of each kind and block, written out once more."""
    names = list(ParameterTable(config.model))
    blocks = [name for name in names if name.startswith("blocks.")]
    norms = [name for name in names if "norm" in name]
    return {
        "all": names,
        "embedding": ["embedding.weight"],
        "positions": ["positions.weight"],
        "norm": norms,
        "attention": [name for name in blocks if ".attention." in name],
        "mlp": [name for name in blocks if ".mlp." in name],
        **{
            str(block): [name for name in blocks if name.startswith(f"blocks.{block}.")]
            for block in range(config.model.num_layers)
        },
    }


def of_group(found: dict[str, Any], group: str) -> dict[str, Any]:
    if group in found["kinds"]:
        return found["kinds"][group]
    return {name: values[int(group)] for name, values in found["layers"].items()}


def real(config: Config, tensors: Tensors, names: list[str]) -> np.ndarray:
    """All elements of some tensors, without padded rows of the embedding."""
    size = config.model.vocab_size
    return np.concatenate([(tensors[n][:size] if n == "embedding.weight" else tensors[n]).reshape(-1) for n in names])


def check_statistics(config: Config, found: dict[str, Any], gradient: Tensors, before: Tensors, after: Tensors) -> None:
    """Against numpy, of the same numbers gathered: to rounding in float64."""
    groups = group_members(config)
    assert set(found["kinds"]) == {group for group in groups if not group.isdigit()}
    for group, names in groups.items():
        values = of_group(found, group)
        g, w = real(config, gradient, names), real(config, before, names)
        if not group.isdigit():
            assert values["count"] == g.size
        np.testing.assert_allclose(values["gradient_norm"], np.linalg.norm(g), rtol=1e-12)
        np.testing.assert_allclose(values["gradient_mean"], g.mean(), rtol=0, atol=1e-13 * np.abs(g).max())
        np.testing.assert_allclose(values["gradient_variance"], g.var(), rtol=1e-12)
        np.testing.assert_allclose(values["weight_norm"], np.linalg.norm(w), rtol=1e-12)
        ratio = np.linalg.norm(real(config, after, names) - w) / np.linalg.norm(w)
        # The copies are fp32: a weight is rounded when it is decayed and when it is moved, the step a few times.
        assert abs(values["update_ratio"] - ratio) <= 2**-24 * (2 + 8 * ratio)


def check_spectral_norms(config: Config, layers: dict[str, list[float]], weights: Tensors) -> None:
    model = config.model

    def whole(block: int, projection: str) -> np.ndarray:
        prefix = f"blocks.{block}.attention.{projection}"
        if f"{prefix}.weight" in weights:
            return weights[f"{prefix}.weight"]
        return weights[f"{prefix}.up.weight"] @ weights[f"{prefix}.down.weight"]

    def largest(matrices: list[np.ndarray]) -> float:
        return max(float(torch.linalg.svdvals(torch.from_numpy(matrix))[0]) for matrix in matrices)

    for block in range(model.num_layers):
        q, k, v, o = (whole(block, projection) for projection in "qkvo")
        heads = [slice(head * model.head_dim, (head + 1) * model.head_dim) for head in range(model.num_heads)]
        # As many iterations as a head has features, and some more: only fp32 rounding is left.
        np.testing.assert_allclose(
            layers["qk_spectral_norm"][block], largest([q[h].T @ k[h] for h in heads]), rtol=1e-5
        )
        np.testing.assert_allclose(
            layers["ov_spectral_norm"][block], largest([o[:, h] @ v[h] for h in heads]), rtol=1e-5
        )


def check_noise(config: Config, layout: Layout, noise: dict[str, Any], result: Any) -> None:
    small, large = layout.data * config.train.micro_batch_size, config.train.global_batch_size
    assert (noise["small_batch"], noise["large_batch"]) == (small, large)
    assert noise["large_square"] == result.gradient_norm**2
    assert noise["small_square"] > noise["large_square"], "random texts: fewer of them have a larger gradient"
    # The two unknowns solve the two equations.
    for size, square in ((small, noise["small_square"]), (large, noise["large_square"])):
        np.testing.assert_allclose(noise["signal"] + noise["trace"] / size, square, rtol=1e-9)


def check_against_the_oracle(
    config: Config, layout: Layout, weights: dict[str, torch.Tensor], record: dict[str, Any]
) -> None:
    """Against autograd of the reference in float64: layouts may err by 1e-5 of a gradient (test_layouts.py)."""
    gradient = reference_run(config, weights, steps=1).gradients
    for group, names in group_members(config).items():
        values, expected = of_group(record["gradients"], group), real(config, gradient, names)
        norm = float(np.linalg.norm(expected))
        np.testing.assert_allclose(values["gradient_norm"], norm, rtol=2e-5)
        np.testing.assert_allclose(values["gradient_variance"], expected.var(), rtol=4e-5)
        np.testing.assert_allclose(
            values["gradient_mean"], float(expected.mean()), rtol=0, atol=2e-5 * norm / math.sqrt(expected.size)
        )
    reference = build_reference(config, weights)
    plan = batch_plan(config, layout.world_size)
    batch = make_batch(config, range(plan.data * plan.micro_batch_size))
    reference.loss(reference(batch.tokens_BS, batch.positions_BS), batch.targets_BS).backward()
    square = sum(float(p.grad.square().sum()) for p in reference.parameters() if p.grad is not None)
    np.testing.assert_allclose(record["noise"]["small_square"], square, rtol=2e-5)
