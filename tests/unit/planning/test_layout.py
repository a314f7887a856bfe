from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.config import BatchPlan, preset, preset_names
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.planning.layout import AXES, blocks_of_stage, groups_along, num_held, rank_of, weights_of_stage


def plan_of(tensor: int, pipeline: int, data: int) -> BatchPlan:
    return BatchPlan(tensor * pipeline * data, tensor, pipeline, data, 1, 1, data, 8, 8 * data)


degrees = st.builds(plan_of, st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@given(degrees)
def test_the_groups_of_an_axis_hold_every_rank_once_and_share_at_most_one_with_those_of_another(
    plan: BatchPlan,
) -> None:
    for axis in AXES:
        groups = groups_along(plan, axis)
        assert {len(group) for group in groups} == {getattr(plan, axis)}
        assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
        for other in set(AXES) - {axis}:
            assert all(len(set(group) & set(second)) <= 1 for group in groups for second in groups_along(plan, other))
    assert rank_of(plan, plan.pipeline - 1, 0, 0) == groups_along(plan, "pipeline")[0][-1]
    assert rank_of(plan, 0, plan.data - 1, 0) == groups_along(plan, "data")[0][-1]


@given(st.integers(1, 200), st.integers(1, 16))
def test_blocks_are_spread_evenly_and_in_order(num_layers: int, num_stages: int) -> None:
    stages = [blocks_of_stage(num_layers, num_stages, stage) for stage in range(num_stages)]
    assert [block for stage in stages for block in stage] == list(range(num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_blocks_are_where_deepspeed_puts_them() -> None:
    """The pipeline engine lets DeepSpeed balance the blocks; the layers before and after them weigh nothing."""
    from deepspeed.runtime.utils import partition_balanced

    for num_layers in range(1, 50):
        for num_stages in range(1, min(num_layers, 9)):
            bounds = partition_balanced([0, 0] + [1] * num_layers + [0, 0], num_stages)
            first_blocks = [0, *(int(bound) - 2 for bound in bounds[1:-1]), num_layers]
            ours = [blocks_of_stage(num_layers, num_stages, stage) for stage in range(num_stages)]
            expected = [range(*pair) for pair in pairwise(first_blocks)]
            assert ours == expected, (num_layers, num_stages)


@pytest.mark.parametrize("name", preset_names())
def test_one_rank_holds_every_weight_and_its_padding(name: str) -> None:
    model = preset(name).model
    held = num_held(weights_of_stage(model, 1, 0), 1)
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    assert held == model.num_parameters() + padding


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_share_nothing_but_the_tied_embedding(num_stages: int) -> None:
    model = preset("debug").model
    names = [info.name for stage in range(num_stages) for info in weights_of_stage(model, num_stages, stage)]
    assert sorted(names) == sorted([*ParameterTable(model), "embedding.weight"])
