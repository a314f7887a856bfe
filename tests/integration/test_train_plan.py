"""The plan that --dry-run prints against the engines that are really built."""

from collections.abc import Callable

import pytest

from mlra_scale.config import batch_plan
from mlra_scale.planning.layout import (
    blocks_of_stage,
    data_groups,
    num_held,
    pipeline_groups,
    tensor_groups,
    weights_of_stage,
)
from tests.support.layouts import Layout, layout_config
from tests.support.pool import WorkerPool


def build(rank: int, world_size: int, layout: Layout, num_layers: int) -> dict[str, object]:
    """Builds an engine on this rank and tells what it holds."""
    import torch.distributed as dist

    from tests.support.layouts import start

    engine, _ = start(layout_config(layout, model__num_layers=num_layers), world_size)
    topology = engine.topology
    names = {name for name in (fragment.name for fragment in engine.view.weights(False)) if name.startswith("blocks.")}
    return {
        "numbers": sum(parameter.numel() for parameter in engine.module.parameters()),
        "blocks": sorted({int(name.split(".")[1]) for name in names}),
        "stage": topology.pipeline_rank,
        "groups": [
            dist.get_process_group_ranks(group)
            for group in (topology.tensor_group, topology.pipeline_group, topology.data_group)
        ],
    }


@pytest.mark.parametrize(
    ("layout", "num_layers"),
    [(Layout(tensor=2), 4), (Layout(pipeline=2), 5), (Layout(tensor=2, pipeline=2), 4), (Layout(data=2), 4)],
    ids=str,
)
def test_ranks_hold_what_the_plan_says(
    worker_pool: Callable[[int], WorkerPool], layout: Layout, num_layers: int
) -> None:
    config = layout_config(layout, model__num_layers=num_layers)
    plan = batch_plan(config, layout.world_size)
    held = worker_pool(layout.world_size).run(build, layout, num_layers)
    for rank, found in enumerate(held):
        stage = found["stage"]
        assert found["numbers"] == num_held(weights_of_stage(config.model, plan.pipeline, stage), plan.tensor)
        assert found["blocks"] == list(blocks_of_stage(num_layers, plan.pipeline, stage))
        for ours, theirs in zip(
            (tensor_groups(plan), pipeline_groups(plan), data_groups(plan)), found["groups"], strict=True
        ):
            assert theirs in ours and rank in theirs
