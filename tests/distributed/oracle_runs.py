"""Runs of a layout beside the oracle's: how the layout tests make and compare them."""

from functools import cache
from typing import Any

import numpy as np
import torch

from mlra_scale.config import Config, DataConfig, ModelConfig, OptimConfig
from tests.distributed.steps import Record, train
from tests.support.layouts import Layout, assemble, canonical_weights, layout_config
from tests.support.oracle import ReferenceRun, assert_gradients_close, reference_run
from tests.support.pool import Pools

Options = dict[str, Any]
Oracle = tuple[dict[str, torch.Tensor], ReferenceRun]

STEPS = 5


def identify(value: Any) -> str:
    """A parameter in a test's id."""
    if isinstance(value, dict):
        return "-".join(str(option) for option in value.values()) or "replicated"
    return str(value).replace(" ", "-")


def in_layout(layout: Layout, **options: Any) -> Config:
    """A configuration of a layout.

    With a large Adam epsilon: the key bias has a true gradient of zero, and Adam would turn its rounding noise into
    steps.
    """
    return layout_config(layout, parallel__world_size=layout.world_size, **{"optim__eps": 1e-4, **options})


def with_model_of(config: Config, layout: Layout, **options: Any) -> Config:
    """A configuration of a layout with the model and the data of another one."""
    return in_layout(layout, **options).model_copy(update={"model": config.model, "data": config.data})


def oracle(config: Config, steps: int = STEPS, seed: int = 3) -> Oracle:
    """Random weights of a seed, and the oracle's run from them with a configuration's model, data and optimizer.

    Without dropout.
    """
    return _oracle(config.model, config.data, config.optim, steps, seed)


@cache
def _oracle(model: ModelConfig, data: DataConfig, optim: OptimConfig, steps: int, seed: int) -> Oracle:
    config = in_layout(Layout()).model_copy(update={"model": model, "data": data, "optim": optim})
    weights = canonical_weights(model, seed)
    return weights, reference_run(config, weights, steps)


def run(worker_pool: Pools, config: Config, weights: dict[str, torch.Tensor], steps: int = STEPS) -> list[Record]:
    """Trains on the ranks of a configuration."""
    assert config.parallel.world_size is not None
    return worker_pool(config.parallel.world_size).run(train, config, steps, weights)


def trained(worker_pool: Pools, config: Config, steps: int = STEPS) -> tuple[list[Record], ReferenceRun]:
    """Runs of the ranks of a configuration, and the oracle's run, from the same weights."""
    weights, expected = oracle(config, steps)
    return run(worker_pool, config, weights, steps), expected


def assert_gradients(config: Config, records: list[Record], expected: ReferenceRun) -> float:
    """Compares every gradient of the first step; returns the largest difference as a share of what is allowed."""
    gradients = assemble(config, [record.gradients for record in records])
    return assert_gradients_close(gradients, expected.gradients)


def assert_losses_and_gradients(config: Config, records: list[Record], expected: ReferenceRun) -> None:
    """Compares the losses of the steps that were taken, and every gradient of the first one."""
    losses = records[0].losses
    np.testing.assert_allclose(losses, expected.losses[: len(losses)], rtol=1e-6)
    assert_gradients(config, records, expected)


def assert_equals_oracle(
    config: Config, records: list[Record], expected: ReferenceRun, norms: float = 1e-6, weights: float = 2e-6
) -> dict[str, np.ndarray]:
    """Compares losses, gradient norms, validation, every gradient and the weights; ranks must agree.

    Returns:
        The global weights after the last step.
    """
    first = records[0]
    for record in records:
        assert (record.losses, record.gradient_norms) == (first.losses, first.gradient_norms), "ranks disagree"
    np.testing.assert_allclose(first.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(first.gradient_norms, expected.gradient_norms, rtol=norms)
    np.testing.assert_allclose(first.validation, [expected.validation], rtol=1e-6)
    worst = assert_gradients(config, records, expected)
    final = assemble(config, [record.weights for record in records])
    for name, value in expected.weights.items():
        np.testing.assert_allclose(final[name][: len(value)], value, rtol=1e-4, atol=weights, err_msg=name)
    numbers = "".join(f"{number:11.7f}" for number in first.losses + first.gradient_norms)
    print(f"losses, norms {numbers}   worst gradient {worst:.2f} of what is allowed")
    return final


def assert_same_under_dropout(worker_pool: Pools, config: Config, steps: int = STEPS) -> None:
    """Compares a run with dropout with that of one process."""
    weights, without = oracle(config, steps)
    (expected,) = run(worker_pool, with_model_of(config, Layout()), weights, steps)
    records = run(worker_pool, config, weights, steps)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(records[0].gradient_norms, expected.gradient_norms, rtol=1e-6)
    np.testing.assert_allclose(records[0].validation, expected.validation, rtol=1e-6)
    assert abs(expected.losses[0] - without.losses[0]) > 1e-3, "dropout did nothing"


def errors(record: Record, expected: ReferenceRun) -> tuple[float, float]:
    """Largest relative error over the steps, of loss and of gradient norm."""
    loss = np.abs(np.array(record.losses) / expected.losses - 1).max()
    norm = np.abs(np.array(record.gradient_norms) / expected.gradient_norms - 1).max()
    return float(loss), float(norm)


def bf16_error(worker_pool: Pools, config: Config, steps: int = STEPS, stage: int = 0) -> tuple[float, float]:
    """Largest error that one bf16 process shows against fp32 in loss and gradient norm, over the steps of four models.

    One process of the layout's engine. Four models, because in one of them the rounding errors may cancel by luck.
    """
    engine = "pipeline" if config.parallel.pipeline > 1 else "zero"
    return _bf16_error(worker_pool, engine, config.model, config.data, config.optim, steps, stage)


@cache
def _bf16_error(
    worker_pool: Pools, engine: str, model: ModelConfig, data: DataConfig, optim: OptimConfig, steps: int, stage: int
) -> tuple[float, float]:
    config = in_layout(Layout(stage=stage, engine=engine), train__precision="bf16")
    config = config.model_copy(update={"model": model, "data": data, "optim": optim})
    found = []
    for seed in range(3, 7):
        weights, expected = oracle(config, steps, seed)
        (record,) = run(worker_pool, config, weights, steps)
        found.append(errors(record, expected))
    losses, norms = zip(*found, strict=True)
    return max(losses), max(norms)


def assert_errs_like_one_process(records: list[Record], expected: ReferenceRun, allowed: tuple[float, float]) -> None:
    """Compares bf16 errors with those of one process: at most twice as large."""
    loss, norm = errors(records[0], expected)
    print(f"error / one process: loss {loss / allowed[0]:.2f}, norm {norm / allowed[1]:.2f}")
    assert loss <= 2 * allowed[0]
    assert norm <= 2 * allowed[1]
