from dataclasses import replace

from mlra_scale.config import Config, Named, load_named_config
from mlra_scale.model.validation import validate
from mlra_scale.planning.cluster import Cluster, named_cluster
from mlra_scale.planning.search import MEMORY, EngineSettings, SearchResult, search

ZERO = [
    EngineSettings(None, {}),
    *(EngineSettings(f"zero{stage}", {"zero_optimization": {"stage": stage}}) for stage in (1, 2, 3)),
]
CLUSTER = replace(named_cluster("h100"), nodes=2, devices_per_node=4, reserved=0.0)


def start(*overrides: str) -> tuple[Config, Named]:
    return load_named_config("debug", overrides=overrides)


def find(cluster: Cluster, *overrides: str) -> SearchResult:
    return search(*start(*overrides), cluster, ZERO)


def test_every_layout_passes_the_validation_and_fits() -> None:
    found = find(CLUSTER)
    assert found.feasible
    for each in found.feasible:
        validate(each.config, 8, "cuda")
        assert each.memory.device <= CLUSTER.usable_memory
        assert each.plan.world_size == 8
        assert each.plan.tensor <= 4, "tensor groups stay within a node"
    layouts = {(*each.overrides(), str(each.config.deepspeed)) for each in found.feasible}
    assert len(layouts) == len(found.feasible), "none is listed twice"


def test_every_dimension_is_tried() -> None:
    feasible = find(CLUSTER).feasible
    for values, expected in (
        ({each.plan.tensor for each in feasible}, {1, 2, 4}),
        ({each.plan.pipeline for each in feasible}, {1, 2, 4}),
        ({each.plan.micro_batch_size for each in feasible}, {1, 2, 4, 8}),
        ({each.config.parallel.activation_checkpointing for each in feasible}, {"none", "selective", "block"}),
        ({each.config.parallel.sequence_parallel for each in feasible}, {False, True}),
        ({str(each.engine.file) for each in feasible}, {"None", "zero1", "zero2", "zero3"}),
    ):
        assert values == expected


def test_what_is_named_stays() -> None:
    found = find(CLUSTER, "parallel.tensor=2", "train.micro_batch_size=1", "deepspeed.zero_optimization.stage=1")
    for each in found.feasible:
        assert each.plan.tensor == 2 and each.plan.micro_batch_size == 1
        assert each.config.deepspeed == {"zero_optimization": {"stage": 1}} and each.engine.file is None


def test_what_is_left_out_is_counted_by_reason() -> None:
    found = find(CLUSTER)
    assert found.left_out["ZeRO 2 and 3 are not for pipelines"] > 0
    assert found.left_out["the batch does not divide over micro-batches and data ranks"] > 0
    assert found.left_out["there are more stages than layers"] > 0
    assert MEMORY not in found.left_out


def test_less_memory_leaves_fewer_layouts() -> None:
    whole = find(CLUSTER)
    middle = sorted(each.memory.device for each in whole.feasible)[len(whole.feasible) // 2]
    small = replace(CLUSTER, memory=middle)
    found = find(small)
    assert 0 < len(found.feasible) < len(whole.feasible)
    assert found.left_out[MEMORY] == len(whole.feasible) - len(found.feasible)
    assert max(each.memory.device for each in found.feasible) <= middle


def test_where_nothing_fits_the_smallest_is_known() -> None:
    found = find(replace(CLUSTER, memory=1e5))
    assert not found.feasible
    assert found.smallest.memory.device == min(each.memory.device for each in find(CLUSTER).feasible)
