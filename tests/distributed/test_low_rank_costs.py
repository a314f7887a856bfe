"""What a rank really computes and sends for q, k and v, counted as it happens, is what the cost model says.

`pytest tests/distributed/test_low_rank_costs.py -m "" -s` prints the table.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlra_scale.config import Config, batch_plan
from mlra_scale.model.low_rank_plan import PLANS, LowRankPlan, multiply_adds, numbers_sent, shape_of
from tests.support.counting import PRODUCTS, SentNumbers
from tests.support.layouts import Layout, layout_config, start
from tests.support.pool import Pools


@dataclass
class Cost:
    """Of one rank."""

    multiply_adds: float  # in matrix products of the forward pass
    multiply_adds_backward: float  # likewise, of the backward pass
    numbers: float  # sent in both


def count(rank: int, world_size: int, config: Config) -> Cost:
    """Counts one block's q, k and v of one micro-batch."""
    engine = start(config, world_size)
    plan = engine.plan
    attention = engine.module.blocks[0].attention
    length = plan.sequence_length // (plan.tensor if config.parallel.sequence_parallel else 1)
    hidden_BSD = torch.randn(plan.micro_batch_size, length, config.model.hidden_size, requires_grad=True)
    with SentNumbers(plan.tensor) as sent:
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as forward:
            q_BNSH, k_BNSH, v_BNSH = attention._project(hidden_BSD)
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as backward:
            (q_BNSH.square().sum() + k_BNSH.square().sum() + v_BNSH.square().sum()).backward()
    return Cost(forward.get_total_flops() / 2, backward.get_total_flops() / 2, sent.numbers)


PROJECTIONS = {"mlra": ("q", "k", "v"), "v-dense": ("q", "k"), "dense": ()}
WAYS: list[tuple[LowRankPlan, bool]] = [(plan, is_split) for is_split in (False, True) for plan in PLANS]
CASES = [(model, *way, tensor) for model, tensor in (("mlra", 2), ("mlra", 4), ("v-dense", 2)) for way in WAYS]
CASES += [("dense", "replicated", is_split, 2) for is_split in (False, True)]


@pytest.mark.slow_except(
    *("mlra-replicated-False-2", "mlra-merged-False-2", "mlra-replicated-True-2", "mlra-merged-True-2"),
    *("mlra-replicated-False-4", "v-dense-merged-False-2", "v-dense-replicated-True-2", "dense-replicated-True-2"),
)
@pytest.mark.parametrize(("model", "plan", "is_split", "tensor"), CASES)
def test_the_cost_model_counts_what_happens(
    worker_pool: Pools, model: str, plan: LowRankPlan, is_split: bool, tensor: int
) -> None:
    factorised = PROJECTIONS[model]
    options: dict[str, Any] = {"model__factorised_projections": factorised} if factorised else {}
    config = layout_config(
        Layout(tensor=tensor),
        model__attention="mlra" if factorised else "dense",
        parallel__low_rank_plan=plan,
        parallel__sequence_parallel=is_split,
        **options,
    )
    shape = shape_of(config, batch_plan(config, tensor))
    ranks = worker_pool(tensor).run(count, config)
    assert all(cost == ranks[0] for cost in ranks)
    # The dense ones of q, k and v are no matter of a plan.
    dense = (3 - len(factorised)) * shape.tokens * shape.hidden_size**2 / tensor
    expected = multiply_adds(plan, shape) + dense if factorised else dense
    assert ranks[0].multiply_adds == expected
    assert ranks[0].multiply_adds_backward == 2 * expected
    if factorised:
        assert ranks[0].numbers == pytest.approx(numbers_sent(plan, shape))
    else:
        share = (tensor - 1) / tensor
        assert ranks[0].numbers == (3 if is_split else 2) * shape.tokens * shape.hidden_size * share
    print(
        f"{model:<8} TP {tensor} {plan:<11}{'sequence parallel' if is_split else '':<18}"
        f"multiply-adds {ranks[0].multiply_adds:>9,.0f}   numbers {ranks[0].numbers:>9,.0f}"
    )
