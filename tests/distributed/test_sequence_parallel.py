"""Sequence parallelism trains the same model: losses, norms, every gradient and the weights equal the oracle's.

`pytest tests/distributed/test_sequence_parallel.py -m "" -s` prints the table.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mlra_scale.config import Config, batch_plan
from mlra_scale.planning.layout import Stage
from mlra_scale.planning.memory_activations import block_bytes_per_token
from tests.distributed import oracle_runs
from tests.distributed.layout_matrix import Run, assert_same_run, assert_same_tensors, largest_difference, load, save
from tests.distributed.oracle_runs import (
    Options,
    Pools,
    assert_equals_oracle,
    assert_errs_like_one_process,
    assert_losses_and_gradients,
    assert_same_under_dropout,
    bf16_error,
    identify,
    trained,
)
from tests.support.layouts import DROPOUT, MASKED, OPTIONS_OF_THE_MODEL, RELEASING, Layout, layout_config, start

STEPS = 3
OPTIONS: dict[str, Options] = {
    "mlra": {},
    "dense": {"model__attention": "dense"},
    "o-factorised": {"model__factorised_projections": ("q", "k", "v", "o"), "model__attention_rank": 10},
    "v-dense": {"model__factorised_projections": ("q", "k", "o"), "model__qk_norm": True},
    "masked": MASKED,
    "no-padding": {"model__vocab_padding_multiple": 1, "model__vocab_size": 120, "model__z_loss": 1e-2},
    "completep": {
        "model__depth_rule": "completep",
        "model__base_depth": 2,
        "model__factorised_projections": ("q", "k", "o"),
    },
    "options": {
        **OPTIONS_OF_THE_MODEL,
        "model__factorised_projections": ("q", "k", "o"),
        "model__attention_rank": 10,
        "model__init_std": 0.2,
    },
}
MODELS: dict[str, Options] = {name: {"model__num_layers": 3, **options} for name, options in OPTIONS.items()}
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
    (Layout(tensor=2, data=2, stage=3), "completep", {}),
    (Layout(tensor=2, pipeline=2, stage=1), "completep", {"parallel__activation_checkpointing": "selective"}),
    (Layout(tensor=2, data=2, stage=3), "dense", {}),
]


def in_layout(layout: Layout, model: str, **overrides: Any) -> Config:
    split = {"parallel__sequence_parallel": layout.tensor > 1, "parallel__low_rank_plan": "replicated"}
    return oracle_runs.in_layout(layout, **{**MODELS[model], **split, **overrides})


@pytest.mark.slow_except(
    "tp2pp1dp1-zero0-v-dense-merged",
    "tp2pp2dp1-zero0-masked-block",
    "tp2pp1dp2-zero1-dense-replicated",
    "tp2pp1dp2-zero3-options-replicated",
)
@pytest.mark.parametrize(("layout", "model", "more"), CASES, ids=identify)
def test_fp32_equals_the_oracle(worker_pool: Pools, layout: Layout, model: str, more: Options) -> None:
    config = in_layout(layout, model, **more)
    assert_equals_oracle(config, *trained(worker_pool, config, STEPS), weights=4e-6)


WHOLE: Options = {"parallel__sequence_parallel": False}
SELECTIVE: Options = {"parallel__activation_checkpointing": "selective"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("mlra", {}),
        ("v-dense", MERGED),
        ("dense", {}),
        ("mlra", SELECTIVE),
        ("options", {}),
        ("options", WHOLE),
        ("options", CHECKPOINTING),
        ("mlra", WHOLE | MERGED | {"parallel__activation_checkpointing": "block"}),
        ("mlra", WHOLE | MERGED | SELECTIVE),
    ],
    ids=identify,
)
def test_zero_3_that_keeps_nothing_gathered(worker_pool: Pools, model: str, more: Options) -> None:
    """Where weights are used outside their own module's forward: the cases above are too small to release any."""
    config = in_layout(Layout(tensor=2, data=2, stage=3), model, **more)
    config = config.model_validate(config.model_dump() | {"deepspeed": {"zero_optimization": RELEASING}})
    assert_losses_and_gradients(config, *trained(worker_pool, config, STEPS))


@pytest.mark.slow_except("tp2pp2dp1-zero0-block")
@pytest.mark.parametrize(
    ("layout", "more"),
    [
        (Layout(tensor=2), {}),
        (Layout(tensor=4), MERGED),
        (Layout(tensor=2, pipeline=2), CHECKPOINTING),
        (Layout(tensor=2, data=2, stage=3), CHECKPOINTING),
    ],
    ids=identify,
)
def test_dropout_masks_do_not_depend_on_the_split(worker_pool: Pools, layout: Layout, more: Options) -> None:
    config = in_layout(layout, "masked", **DROPOUT, **more)
    assert_same_under_dropout(worker_pool, config, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(tensor=2), "mlra"),
        (Layout(tensor=4), "dense"),
        (Layout(tensor=2, pipeline=2), "o-factorised"),
        (Layout(tensor=2, data=2, stage=1), "o-factorised"),
        (Layout(tensor=2, data=2, stage=3), "mlra"),
    ],
    ids=identify,
)
def test_bf16_errs_at_most_twice_as_much_as_one_process(worker_pool: Pools, layout: Layout, model: str) -> None:
    config = in_layout(layout, model, train__precision="bf16")
    records, expected = trained(worker_pool, config, STEPS)
    assert_errs_like_one_process(records, expected, bf16_error(worker_pool, config, STEPS, min(layout.stage, 1)))


def kept_bytes(rank: int, world_size: int, config: Config) -> int:
    """Bytes that one block keeps of a micro-batch for its backward pass, weights left out."""
    engine = start(config, world_size)
    plan = engine.plan
    block = engine.module.blocks[0]
    length = plan.sequence_length // (plan.tensor if config.parallel.sequence_parallel else 1)
    hidden_BSD = torch.randn(plan.micro_batch_size, length, config.model.hidden_size, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()}
    kept: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        output = block(hidden_BSD)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.slow_except("mlra")
@pytest.mark.parametrize("model", ["mlra", "dense", "o-factorised"])
def test_a_block_keeps_nothing_that_ranks_repeat(worker_pool: Pools, model: str) -> None:
    config = in_layout(Layout(tensor=4), model, model__hidden_size=64, train__micro_batch_size=4)
    whole = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence_parallel": False})})
    plan = batch_plan(config, 4)
    split_bytes, whole_bytes = (max(worker_pool(4).run(kept_bytes, each)) for each in (config, whole))
    tokens = plan.micro_batch_size * plan.sequence_length
    planned = [tokens * block_bytes_per_token(Stage(each, plan, 0)) for each in (config, whole)]
    print(f"{model:<14}kept {split_bytes:,} of {whole_bytes:,} bytes, planned {planned[0]:,.0f} of {planned[1]:,.0f}")
    # The plan leaves out what norms and attention keep of a position beside its width.
    assert whole_bytes - split_bytes == pytest.approx(planned[1] - planned[0], rel=0.05)
    assert split_bytes == pytest.approx(planned[0], rel=0.1)


SAVED = {
    "tp2": (Layout(tensor=2, stage=1), True, "replicated"),
    "tp2pp2": (Layout(tensor=2, pipeline=2), True, "merged"),
    "zero3-tp2dp2": (Layout(tensor=2, data=2, stage=3), False, "replicated"),
}


@pytest.fixture(scope="module")
def saved(worker_pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, Path]]:
    @cache
    def get(name: str) -> tuple[Run, Path]:
        folder = tmp_path_factory.mktemp(name)
        return continued(worker_pool, folder, name, is_saving=True), folder

    return get


def continued(worker_pool: Pools, folder: Path, name: str, is_saving: bool = False) -> Run:
    layout, is_split, plan = SAVED[name]
    split = {"parallel__sequence_parallel": is_split, "parallel__low_rank_plan": plan}
    config = layout_config(layout, **DROPOUT, **split)
    ranks = worker_pool(layout.world_size).run(save if is_saving else load, config, folder)
    return Run(config, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("was", "now"), [(was, now) for was in SAVED for now in SAVED])
def test_a_checkpoint_continues_with_another_split_and_plan(
    worker_pool: Pools, saved: Callable[[str], tuple[Run, Path]], was: str, now: str
) -> None:
    before, folder = saved(was)
    after = continued(worker_pool, folder, now)
    assert_same_tensors(before, after)
    if was == now:
        assert_same_run(before, after)
    assert largest_difference(before, after) < 1e-6
