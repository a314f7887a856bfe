"""Sequence parallelism trains the same model: losses, norms, every gradient and the weights equal the oracle's.

`pytest tests/distributed/test_sequence_parallel.py -s` prints the table.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterTable
from tests.distributed.steps import Record, train
from tests.support.layouts import Layout, assemble, canonical_weights, layout_config
from tests.support.oracle import ReferenceRun, assert_gradients_close, reference_run
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]
Options = dict[str, Any]

STEPS = 3
# As in test_layouts: Adam would turn the rounding noise of gradients that are zero into steps.
COMMON = {"optim__eps": 1e-4, "model__num_layers": 3}
MODELS: dict[str, Options] = {
    "mlra": {},
    "dense": {"model__attention": "dense"},
    "o-factorised": {"model__factorised_projections": ("q", "k", "v", "o"), "model__attention_rank": 10},
    "v-dense": {"model__factorised_projections": ("q", "k", "o"), "model__qk_norm": True},
    "masked": {"data__document_attention": "masked", "data__reset_positions": True},
    "no-padding": {"model__vocab_padding_multiple": 1, "model__vocab_size": 120, "model__z_loss": 1e-2},
    "options": {
        "model__qk_norm": True,
        "model__sigma_reparam": True,
        "model__layer_norm_scaling": True,
        "model__embedding_scale": "sqrt_width",
        "model__factorised_projections": ("q", "k", "o"),
        "model__attention_rank": 10,
        "model__init_std": 0.2,
    },
}
MERGED: Options = {"parallel__low_rank_plan": "merged"}
CHECKPOINTING: Options = {"parallel__activation_checkpointing": "block"}
CASES: list[tuple[Layout, str, Options]] = [
    *((Layout(tensor=2), model, {}) for model in MODELS),
    (Layout(tensor=2), "mlra", MERGED),
    (Layout(tensor=2), "mlra", CHECKPOINTING),
    (Layout(tensor=2), "mlra", {"train__micro_batch_size": 1}),
    (Layout(tensor=2), "v-dense", MERGED),
    (Layout(tensor=2, engine="pipeline"), "mlra", {}),
    (Layout(tensor=4), "mlra", {}),
    (Layout(tensor=4), "dense", MERGED),
    (Layout(tensor=2, pipeline=2), "mlra", {}),
    (Layout(tensor=2, pipeline=2), "masked", CHECKPOINTING),
    (Layout(tensor=2, pipeline=2), "options", {}),
    (Layout(tensor=2, pipeline=2, stage=1), "o-factorised", MERGED),
    (Layout(tensor=2, data=2, stage=1), "mlra", {}),
    (Layout(tensor=2, data=2, stage=1), "dense", {}),
    (Layout(tensor=2, data=2, stage=2), "o-factorised", {}),
    (Layout(tensor=2, data=2, stage=3), "mlra", {}),
    (Layout(tensor=2, data=2, stage=3), "mlra", MERGED),
    (Layout(tensor=2, data=2, stage=3), "o-factorised", CHECKPOINTING),
    (Layout(tensor=2, data=2, stage=3), "options", {}),
    (Layout(tensor=2, data=2, stage=3), "dense", {}),
]


def in_layout(layout: Layout, model: str, **overrides: Any) -> Config:
    values = {**COMMON, **MODELS[model], "parallel__low_rank_plan": "replicated", **overrides}
    split = {"parallel__sequence_parallel": layout.tensor > 1, "parallel__world_size": layout.world_size}
    return layout_config(layout, **split, **values)


@cache
def oracle(model: str, seed: int = 3) -> tuple[dict[str, torch.Tensor], ReferenceRun]:
    config = in_layout(Layout(), model)
    weights = canonical_weights(config.model, seed)
    return weights, reference_run(config, weights, STEPS)


def run(worker_pool: Pools, config: Config, weights: dict[str, torch.Tensor], steps: int = STEPS) -> list[Record]:
    assert config.parallel.world_size is not None
    return worker_pool(config.parallel.world_size).run(train, config, steps, weights)


def identify(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(str(option) for option in value.values()) or "replicated"
    return str(value).replace(" ", "-")


@pytest.mark.parametrize(("layout", "model", "more"), CASES, ids=identify)
def test_fp32_equals_the_oracle(worker_pool: Pools, layout: Layout, model: str, more: Options) -> None:
    weights, expected = oracle(model)
    config = in_layout(layout, model, **more)
    records = run(worker_pool, config, weights)
    first = records[0]
    for record in records:
        assert (record.losses, record.gradient_norms) == (first.losses, first.gradient_norms), "ranks disagree"
    np.testing.assert_allclose(first.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(first.gradient_norms, expected.gradient_norms, rtol=1e-6)
    np.testing.assert_allclose(first.validation, [expected.validation], rtol=1e-6)
    table = ParameterTable(config.model)
    worst = assert_gradients_close(
        assemble(table, layout.tensor, [record.gradients for record in records]), expected.gradients
    )
    final = assemble(table, layout.tensor, [record.weights for record in records])
    for name, value in expected.weights.items():
        np.testing.assert_allclose(final[name][: len(value)], value, rtol=1e-4, atol=4e-6, err_msg=name)
    print(f"{layout!s:<24}{model:<14}{identify(more):<12}loss {first.losses[-1]:.7f}   worst gradient {worst:.2f}")
