"""Sequence parallelism trains the same model: losses, norms, every gradient and the weights equal the oracle's.

`pytest tests/distributed/test_sequence_parallel.py -m "" -s` prints the table.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.config import Config, batch_plan
from mlra_scale.planning.memory import block_bytes_per_token
from tests.distributed.layout_matrix import Run, assert_same_run, assert_same_tensors, largest_difference, load, save
from tests.distributed.steps import Record, train
from tests.distributed.test_layouts import errors
from tests.support.layouts import Layout, assemble, canonical_weights, layout_config, start, table_of
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
    return layout_config(layout, **{**split, **values})


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


@pytest.mark.slow_except(
    "tp2pp1dp1-zero0-v-dense-merged",
    "tp2pp2dp1-zero0-masked-block",
    "tp2pp1dp2-zero1-dense-replicated",
    "tp2pp1dp2-zero3-options-replicated",
)
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
    table = table_of(config)
    worst = assert_gradients_close(
        assemble(table, layout.tensor, [record.gradients for record in records]), expected.gradients
    )
    final = assemble(table, layout.tensor, [record.weights for record in records])
    for name, value in expected.weights.items():
        np.testing.assert_allclose(final[name][: len(value)], value, rtol=1e-4, atol=4e-6, err_msg=name)
    print(f"{layout!s:<24}{model:<14}{identify(more):<12}loss {first.losses[-1]:.7f}   worst gradient {worst:.2f}")


RELEASING = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


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
        ("mlra", WHOLE | MERGED | {"parallel__activation_checkpointing": "block"}),
        ("mlra", WHOLE | MERGED | SELECTIVE),
    ],
    ids=identify,
)
def test_zero_3_that_keeps_nothing_gathered(worker_pool: Pools, model: str, more: Options) -> None:
    """Where weights are used outside their own module's forward: the cases above are too small to release any."""
    weights, expected = oracle(model)
    config = in_layout(Layout(tensor=2, data=2, stage=3), model, **more)
    config = config.model_validate(config.model_dump() | {"deepspeed": {"zero_optimization": RELEASING}})
    records = run(worker_pool, config, weights)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    gradients = assemble(table_of(config), 2, [record.gradients for record in records])
    assert_gradients_close(gradients, expected.gradients)


DROPOUT: Options = {"model__embedding_dropout": 0.1, "model__attention_dropout": 0.1, "model__residual_dropout": 0.1}


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
    weights, without = oracle("masked")
    (expected,) = run(worker_pool, in_layout(Layout(), "masked", **DROPOUT), weights)
    records = run(worker_pool, in_layout(layout, "masked", **DROPOUT, **more), weights)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(records[0].gradient_norms, expected.gradient_norms, rtol=1e-6)
    np.testing.assert_allclose(records[0].validation, expected.validation, rtol=1e-6)
    assert abs(expected.losses[0] - without.losses[0]) > 1e-3, "dropout did nothing"


@cache
def bf16_error(worker_pool: Pools, model: str, stage: int, engine: str) -> tuple[float, float]:
    """Largest error of one bf16 process against fp32 over four models (see test_layouts.bf16_error)."""
    found = []
    for seed in range(3, 7):
        weights, expected = oracle(model, seed)
        config = in_layout(Layout(stage=stage, engine=engine), model, train__precision="bf16")
        (record,) = run(worker_pool, config, weights)
        found.append(errors(record, expected))
    losses, norms = zip(*found, strict=True)
    return max(losses), max(norms)


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
    weights, expected = oracle(model)
    engine = "pipeline" if layout.pipeline > 1 else "zero"
    allowed_loss, allowed_norm = bf16_error(worker_pool, model, min(layout.stage, 1), engine)
    records = run(worker_pool, in_layout(layout, model, train__precision="bf16"), weights)
    loss, norm = errors(records[0], expected)
    print(
        f"{layout!s:<24}{model:<14}error / one process: loss {loss / allowed_loss:.2f}, norm {norm / allowed_norm:.2f}"
    )
    assert loss <= 2 * allowed_loss
    assert norm <= 2 * allowed_norm


def train_without_reduction(
    rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor], where: str
) -> Record:
    """A defect that the gradient test exists for: a parameter's gradient stays that of this rank's positions."""
    from torch.nn import functional

    from mlra_scale.model import layers, linear

    module: Any = {"on_slice": layers, "slice_linear": linear, "leave_tensor_parallel": linear}[where]
    correct = getattr(module, where)
    defective = {
        "on_slice": lambda context, *parameters: list(parameters),
        "slice_linear": lambda context, x, weight, bias: functional.linear(x, weight, bias),
        "leave_tensor_parallel": lambda context, partial_BSD, bias_D: correct(context, partial_BSD) + bias_D,
    }
    setattr(module, where, defective[where])
    try:
        return train(rank, world_size, config, 1, weights)
    finally:
        setattr(module, where, correct)


@pytest.mark.slow_except("slice_linear-attention\\\\.q\\\\.down\\\\.weight")
@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("on_slice", r"positions\.weight(.|\n)*attention_norm\.weight(.|\n)*mlp_norm\.bias(.|\n)*final_norm\.weight"),
        ("slice_linear", r"attention\.q\.down\.weight"),
        ("leave_tensor_parallel", r"attention\.o\.bias(.|\n)*mlp\.fc_out\.bias"),
    ],
)
def test_a_missing_reduction_is_caught(worker_pool: Pools, where: str, told: str) -> None:
    weights, expected = oracle("mlra")
    config = in_layout(Layout(tensor=2), "mlra")
    records = worker_pool(2).run(train_without_reduction, config, weights, where)
    np.testing.assert_allclose(records[0].losses, expected.losses[:1], rtol=1e-6)  # the loss does not show it
    gradients = assemble(table_of(config), 2, [record.gradients for record in records])
    with pytest.raises(AssertionError, match=told):
        assert_gradients_close(gradients, expected.gradients)


def kept_bytes(rank: int, world_size: int, config: Config) -> int:
    """Bytes that one block keeps of a micro-batch for its backward pass, weights left out."""
    engine, plan = start(config, world_size)
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
    planned = [tokens * block_bytes_per_token(each, plan) for each in (config, whole)]
    print(f"{model:<14}kept {split_bytes:,} of {whole_bytes:,} bytes, planned {planned[0]:,.0f} of {planned[1]:,.0f}")
    # The plan leaves out what norms and attention keep of a position beside its width.
    assert whole_bytes - split_bytes == pytest.approx(planned[1] - planned[0], rel=0.05)
    assert split_bytes == pytest.approx(planned[0], rel=0.1)


SAVED = {
    "tp2": (Layout(tensor=2, stage=1), True, "replicated"),
    "tp2pp2": (Layout(tensor=2, pipeline=2), True, "merged"),
    "zero3-tp2dp2": (Layout(tensor=2, data=2, stage=3), False, "sharded"),
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
    return Run(layout, config, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("was", "now"), [(was, now) for was in SAVED for now in SAVED])
def test_a_checkpoint_goes_on_with_another_split_and_plan(
    worker_pool: Pools, saved: Callable[[str], tuple[Run, Path]], was: str, now: str
) -> None:
    before, folder = saved(was)
    after = continued(worker_pool, folder, now)
    assert_same_tensors(before, after)
    if was == now:
        assert_same_run(before, after)
    assert largest_difference(before, after) < 1e-6
