"""Replicated, sharded or merged: the plans of the low-rank projections train the same model, gradients included.

`pytest tests/distributed/test_low_rank_plans.py -m "" -s` prints the tables.
"""

from collections.abc import Callable

import numpy as np
import pytest

from mlra_scale.model.low_rank_plan import PLANS
from mlra_scale.model.parameters import LowRankPlan, ParameterTable
from tests.distributed.steps import Record, train
from tests.distributed.test_layouts import COMMON, STEPS, oracle
from tests.support.layouts import Layout, assemble, canonical_weights, layout_config
from tests.support.oracle import assert_gradients_close, reference_run
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]

CASES: list[tuple[LowRankPlan, Layout]] = [
    ("merged", Layout()),
    ("replicated", Layout(tensor=2)),
    ("replicated", Layout(tensor=2, pipeline=2)),
    ("replicated", Layout(tensor=2, data=2, stage=3)),
    ("sharded", Layout(tensor=2)),
    ("merged", Layout(tensor=2)),
    ("sharded", Layout(tensor=4)),
    ("merged", Layout(tensor=4)),
    ("sharded", Layout(tensor=2, pipeline=2)),
    ("merged", Layout(tensor=2, pipeline=2)),
    ("sharded", Layout(tensor=2, data=2, stage=3)),
    ("merged", Layout(tensor=2, data=2, stage=3)),
]


@pytest.mark.slow_except("replicated-tp2pp2dp1-zero0", "merged-tp2pp1dp2-zero3")
@pytest.mark.parametrize(("plan", "layout"), CASES, ids=lambda part: str(part).replace(" ", "-"))
def test_every_plan_equals_the_oracle(worker_pool: Pools, plan: LowRankPlan, layout: Layout) -> None:
    weights, expected = oracle("mlra")
    config = layout_config(layout, parallel__world_size=layout.world_size, parallel__low_rank_plan=plan, **COMMON)
    records: list[Record] = worker_pool(layout.world_size).run(train, config, STEPS, weights)
    first = records[0]
    np.testing.assert_allclose(first.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(first.gradient_norms, expected.gradient_norms, rtol=1e-6)
    table = ParameterTable(config.model, plan)
    worst = assert_gradients_close(
        assemble(table, layout.tensor, [record.gradients for record in records]), expected.gradients
    )
    final = assemble(table, layout.tensor, [record.weights for record in records])
    for name, value in expected.weights.items():
        np.testing.assert_allclose(final[name][: len(value)], value, rtol=1e-4, atol=2e-6, err_msg=name)
    print(f"{plan:<12}{layout!s:<20}loss {first.losses[-1]:.7f}   worst gradient {worst:.2f} of what is allowed")


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_with_a_dense_value_projection(worker_pool: Pools, plan: LowRankPlan) -> None:
    """One of q, k, v may be dense: it enters by the hidden state."""
    only = {"model__factorised_projections": ["q", "k", "o"], **COMMON}
    config = layout_config(
        Layout(tensor=2), parallel__world_size=2, parallel__low_rank_plan=plan, model__qk_norm=True, **only
    )
    weights = canonical_weights(config.model)
    expected = reference_run(layout_config(Layout(), model__qk_norm=True, **only), weights, STEPS)
    records: list[Record] = worker_pool(2).run(train, config, STEPS, weights)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    gradients = assemble(ParameterTable(config.model, plan), 2, [record.gradients for record in records])
    assert_gradients_close(gradients, expected.gradients)
