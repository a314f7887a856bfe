"""The plan that --dry-run prints against the engines that are really built."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlra_scale.config import Config, batch_plan
from mlra_scale.planning.layout import AXES, blocks_of_stage, groups_along, num_held, weights_of_stage
from tests.support.layouts import Layout, layout_config
from tests.support.pool import WorkerPool
from tests.support.training_runs import Finished, main_on_rank


def build(rank: int, world_size: int, layout: Layout, num_layers: int) -> dict[str, object]:
    """Builds an engine on this rank and tells what it holds."""
    import torch.distributed as dist

    from tests.support.layouts import start

    engine = start(layout_config(layout, model__num_layers=num_layers), world_size)
    topology = engine.topology
    names = {name for name in (fragment.name for fragment in engine.held_fragments()) if name.startswith("blocks.")}
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
        for axis, group in zip(AXES, found["groups"], strict=True):
            assert group in groups_along(plan, axis) and rank in group


def with_a_field_of_its_own(rank: int, world_size: int, arguments: tuple[str, ...]) -> Finished:
    """Trains with a field that only this rank has."""
    field = f"parallel.activation_checkpointing={('none', 'block')[rank]}"
    return main_on_rank(rank, world_size, (*arguments, field))


@pytest.mark.slow
def test_ranks_for_which_the_planner_chooses_differently_refuse_to_train(
    worker_pool: Callable[[int], WorkerPool], training_data: Path, tmp_path: Path
) -> None:
    """Started by torchrun each rank chooses by itself, for the device that it has."""
    arguments = ["--preset", "debug", "--run-dir", str(tmp_path / "run"), "parallel.layout=auto", "train.device=cpu"]
    arguments += [f"data.path={training_data}", "train.steps=2"]
    finished: list[Finished] = worker_pool(2).run(with_a_field_of_its_own, tuple(arguments))
    assert [result.code for result in finished] == [2, 2]
    assert "parallel.layout = 'auto': the ranks have devices of different kinds" in finished[0].stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_start_by_torchrun_chooses_and_tells_its_layout(
    worker_pool: Callable[[int], WorkerPool], training_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["--preset", "debug", "--run-dir", str(run), "parallel.layout=auto", "train.device=cpu"]
    arguments += [f"data.path={training_data}", "train.steps=2", "evaluation.batches=1"]
    finished: list[Finished] = worker_pool(2).run(main_on_rank, tuple(arguments))
    assert [result.code for result in finished] == [0, 0], finished[0].stderr[-3000:]
    assert "chosen, and the next best, by estimates, not measured:" in finished[0].stdout
    stored = Config.from_yaml((run / "config.yaml").read_text())
    assert stored.parallel.layout == "auto"
    assert f"parallel.tensor={stored.parallel.tensor}" in finished[0].stdout
