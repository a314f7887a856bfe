"""Every layout trains the same model: losses, gradient norms, every gradient and the weights equal the oracle's.

`pytest tests/distributed/test_layouts.py -m "" -s` prints the tables.
"""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo

from mlra_scale.config import Config
from mlra_scale.model import head_chunks
from tests.distributed.steps import Record, train
from tests.support.layouts import Layout, assemble, canonical_weights, layout_config, table_of
from tests.support.oracle import ReferenceRun, assert_gradients_close, reference_run
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]

LAYOUTS = [
    Layout(),
    Layout(engine="pipeline"),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(data=2, stage=0),
    Layout(data=2, stage=1),
    Layout(data=2, stage=2),
    Layout(data=2, stage=3),
    Layout(tensor=4),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, pipeline=2, stage=1),
    Layout(tensor=2, data=2, stage=1),
    Layout(tensor=2, data=2, stage=2),
    Layout(tensor=2, data=2, stage=3),
    Layout(pipeline=2, data=2, stage=1),
]
STEPS = 5
# A large Adam epsilon: the key bias has a true gradient of zero, and Adam would turn its rounding noise into steps.
COMMON = {"optim__eps": 1e-4}


def identify(layout: Layout) -> str:
    return str(layout).replace(" ", "-")


@cache
def oracle(attention: str, seed: int = 3) -> tuple[dict[str, torch.Tensor], ReferenceRun]:
    config = layout_config(Layout(), model__attention=attention, **COMMON)
    weights = canonical_weights(config.model, seed)
    return weights, reference_run(config, weights, STEPS)


def run(worker_pool: Pools, config: Config, weights: dict[str, torch.Tensor], steps: int = STEPS) -> list[Record]:
    assert config.parallel.world_size is not None
    return worker_pool(config.parallel.world_size).run(train, config, steps, weights)


def in_layout(layout: Layout, **overrides: Any) -> Config:
    return layout_config(layout, parallel__world_size=layout.world_size, **{**COMMON, **overrides})


def assert_tev_is_numpys(records: list[Record], config: Config, embedding: np.ndarray) -> None:
    """Every rank measured TEV of the gathered fp32 master, in fp64 and without its padded rows."""
    rows = embedding[: config.model.vocab_size].astype(np.float64)
    tev = rows.std(axis=1)
    expected = {
        "mean": tev.mean(),
        "std": tev.std(),
        "mean_row_rms": np.sqrt(np.square(rows).mean(axis=1)).mean(),
        "mean_embedding_norm": np.linalg.norm(rows.mean(axis=0)),
    }
    tolerance = {"rtol": 1e-12, "atol": 1e-12 * np.abs(rows).max()}
    for record in records:
        assert record.tev is not None and record.tev == records[0].tev
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(record.tev, name), value, err_msg=name, **tolerance)
        found = [record.tev.quantiles[q] for q in config.tev.quantiles]
        np.testing.assert_allclose(found, np.quantile(tev, config.tev.quantiles), **tolerance)


def show(layout: Layout, what: str, losses: list[float], norms: list[float], note: str = "") -> None:
    print(f"{layout!s:<26}{what:<12}" + "".join(f"{x:11.7f}" for x in losses + norms) + note)


@pytest.mark.slow_except(
    "tp1pp1dp1-zero0-mlra",
    "tp1pp1dp2-zero2-dense",
    "tp2pp2dp1-zero1-mlra",
    "tp2pp1dp2-zero3-mlra",
    "tp1pp2dp2-zero1-dense",
)
@pytest.mark.parametrize("attention", ["mlra", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=identify)
def test_fp32_equals_the_oracle(worker_pool: Pools, layout: Layout, attention: str) -> None:
    weights, expected = oracle(attention)
    records = run(worker_pool, in_layout(layout, model__attention=attention), weights)
    first = records[0]
    for record in records:
        assert (record.losses, record.gradient_norms) == (first.losses, first.gradient_norms), "ranks disagree"
    np.testing.assert_allclose(first.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(first.gradient_norms, expected.gradient_norms, rtol=1e-6)
    np.testing.assert_allclose(first.validation, [expected.validation], rtol=1e-6)
    table = table_of(in_layout(layout, model__attention=attention))
    gradients = assemble(table, layout.tensor, [record.gradients for record in records])
    worst = assert_gradients_close(gradients, expected.gradients)
    final = assemble(table, layout.tensor, [record.weights for record in records])
    for name, value in expected.weights.items():
        np.testing.assert_allclose(final[name][: len(value)], value, rtol=1e-4, atol=2e-6, err_msg=name)
    assert_tev_is_numpys(records, in_layout(layout), final["embedding.weight"])
    show(layout, attention, first.losses, first.gradient_norms, f"   worst gradient {worst:.2f} of what is allowed")


BF16_LAYOUTS = [layout for layout in LAYOUTS if layout.world_size > 1]


@cache
def bf16_error(worker_pool: Pools, attention: str, engine: str) -> tuple[float, float]:
    """Largest error that one bf16 process shows against fp32 in loss and gradient norm, over the steps of four models.

    One process of the same engine. Four models, because in one of them the rounding errors may cancel by luck.
    """
    found = []
    for seed in range(3, 7):
        weights, expected = oracle(attention, seed)
        config = in_layout(Layout(engine=engine), model__attention=attention, train__precision="bf16")
        (record,) = run(worker_pool, config, weights)
        found.append(errors(record, expected))
    losses, norms = zip(*found, strict=True)
    return max(losses), max(norms)


def errors(record: Record, expected: ReferenceRun) -> tuple[float, float]:
    """Largest relative error over the steps, of loss and of gradient norm."""
    loss = np.abs(np.array(record.losses) / expected.losses - 1).max()
    norm = np.abs(np.array(record.gradient_norms) / expected.gradient_norms - 1).max()
    return float(loss), float(norm)


@pytest.mark.slow_except("tp2pp1dp2-zero3-mlra")
@pytest.mark.parametrize("attention", ["mlra", "dense"])
@pytest.mark.parametrize("layout", BF16_LAYOUTS, ids=identify)
def test_bf16_errs_at_most_twice_as_much_as_one_process(worker_pool: Pools, layout: Layout, attention: str) -> None:
    weights, expected = oracle(attention)
    kind = "pipeline" if layout.pipeline > 1 else "zero"
    allowed_loss, allowed_norm = bf16_error(worker_pool, attention, kind)
    config = in_layout(layout, model__attention=attention, train__precision="bf16")
    records = run(worker_pool, config, weights)
    final = assemble(table_of(config), layout.tensor, [record.weights for record in records])
    assert_tev_is_numpys(records, config, final["embedding.weight"])
    master = torch.from_numpy(final["embedding.weight"]).float()
    assert not torch.equal(master, master.bfloat16().float()), "these are rounded weights, not the fp32 masters"
    loss, norm = errors(records[0], expected)
    note = f"   error / one process: loss {loss / allowed_loss:.2f}, norm {norm / allowed_norm:.2f}"
    show(layout, f"{attention} bf16", records[0].losses, records[0].gradient_norms, note)
    assert loss <= 2 * allowed_loss
    assert norm <= 2 * allowed_norm
    # And one process itself errs by rounding only: bf16 has a relative precision of 2**-8.
    assert allowed_loss < 2**-11 and allowed_norm < 2**-8


FP16_LAYOUTS = [
    Layout(stage=1),
    Layout(data=2, stage=1),
    Layout(data=2, stage=2),
    Layout(data=2, stage=3),
    Layout(tensor=2, stage=1),
    Layout(pipeline=2, stage=1),
]


@pytest.mark.slow_except("tp1pp1dp2-zero3", "tp1pp2dp1-zero1")
@pytest.mark.parametrize("layout", FP16_LAYOUTS, ids=identify)
def test_fp16_errs_by_rounding_only(worker_pool: Pools, layout: Layout) -> None:
    weights, expected = oracle("mlra")
    records = run(worker_pool, in_layout(layout, train__precision="fp16"), weights)
    loss, norm = errors(records[0], expected)
    show(layout, "mlra fp16", records[0].losses, records[0].gradient_norms, f"   errors {loss:.1e}, {norm:.1e}")
    assert loss < 2**-14 and norm < 2**-11


OPTIONS: dict[str, dict[str, Any]] = {
    "o-factorised": {"model__factorised_projections": ("q", "k", "v", "o"), "model__attention_rank": 10},
    "k-dense": {"model__factorised_projections": ("q", "v")},
    "z-loss": {"model__z_loss": 1e-2},
    "masked-documents": {"data__document_attention": "masked", "data__reset_positions": True},
    "checkpointing": {"parallel__activation_checkpointing": "block"},
    "selective-checkpointing": {"parallel__activation_checkpointing": "selective"},
    # Nothing divides by two, so that ZeRO cuts rows and pads the last rank's piece.
    "odd-shapes": {"model__hidden_size": 36, "model__attention_rank": 11, "model__ffn_hidden_size": 50},
    "no-padding": {"model__vocab_padding_multiple": 1, "model__vocab_size": 120},
}


@pytest.mark.slow_except(
    "tp2pp1dp1-zero0-o-factorised",
    "tp2pp1dp1-zero0-z-loss",
    "tp2pp1dp1-zero0-no-padding",
    "tp2pp2dp1-zero1-k-dense",
    "tp2pp2dp1-zero1-selective-checkpointing",
    "tp2pp1dp2-zero3-masked-documents",
    "tp2pp1dp2-zero3-checkpointing",
    "tp2pp1dp2-zero3-odd-shapes",
)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=2), Layout(tensor=2, pipeline=2, stage=1), Layout(tensor=2, data=2, stage=3)],
    ids=identify,
)
def test_model_options_equal_the_oracle(worker_pool: Pools, layout: Layout, option: str) -> None:
    config = in_layout(layout, **OPTIONS[option])
    weights = canonical_weights(config.model)
    expected = reference_run(config, weights, 2)
    records = run(worker_pool, config, weights, steps=2)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(records[0].validation, [expected.validation], rtol=1e-6)
    table = table_of(config)
    assert_gradients_close(assemble(table, layout.tensor, [r.gradients for r in records]), expected.gradients)


def train_compiled(rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor]) -> tuple[Record, int]:
    """One step, and how many graphs the compiler made for it."""
    torch._dynamo.reset()  # what another case of this process has compiled
    counters = torch._dynamo.utils.counters
    counters.clear()
    record = train(rank, world_size, config, 1, weights)
    return record, counters["stats"]["unique_graphs"]


def train_in_chunks(rank: int, world_size: int, config: Config, steps: int, weights: dict[str, torch.Tensor]) -> Record:
    """Trains with a head that takes 5 tokens at a time."""
    with mock.patch.dict(head_chunks.CHUNK_NUMBERS, cpu=5 * config.model.padded_vocab_size // config.parallel.tensor):
        return train(rank, world_size, config, steps, weights)


@pytest.mark.slow_except("tp2pp1dp1-zero0-fp32", "tp1pp2dp1-zero1-bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=2), Layout(pipeline=2, stage=1), Layout(tensor=2, data=2, stage=3)],
    ids=identify,
)
def test_a_head_in_several_chunks_equals_the_oracle(worker_pool: Pools, layout: Layout, precision: str) -> None:
    weights, expected = oracle("mlra")
    config = in_layout(layout, train__precision=precision)
    records = worker_pool(layout.world_size).run(train_in_chunks, config, STEPS, weights)
    if precision == "bf16":
        kind = "pipeline" if layout.pipeline > 1 else "zero"
        allowed_loss, allowed_norm = bf16_error(worker_pool, "mlra", kind)
        loss, norm = errors(records[0], expected)
        assert loss <= 2 * allowed_loss and norm <= 2 * allowed_norm
        return
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    gradients = assemble(table_of(config), layout.tensor, [record.gradients for record in records])
    assert_gradients_close(gradients, expected.gradients)


COMPILED = [
    Layout(),
    Layout(data=2, stage=2),
    Layout(pipeline=2, stage=1),
    Layout(tensor=2),
    Layout(tensor=2, pipeline=2, stage=1),
    Layout(tensor=2, data=2, stage=1),
    Layout(tensor=2, data=2, stage=2),
]


@pytest.mark.slow_except("tp2pp1dp1-zero0-mlra")
@pytest.mark.parametrize("attention", ["mlra", "dense"])
@pytest.mark.parametrize("layout", COMPILED, ids=identify)
def test_compiled_blocks_equal_the_oracle(worker_pool: Pools, layout: Layout, attention: str) -> None:
    compare_compiled(worker_pool, layout, attention)


@pytest.mark.slow
def test_compiled_blocks_with_sequence_parallelism_equal_the_oracle(worker_pool: Pools) -> None:
    compare_compiled(worker_pool, Layout(tensor=2, data=2, stage=1), "mlra", parallel__sequence_parallel=True)


def compare_compiled(worker_pool: Pools, layout: Layout, attention: str, **overrides: Any) -> None:
    weights, expected = oracle(attention)
    config = in_layout(layout, model__attention=attention, train__compile=True, **overrides)
    records, num_compiled = zip(*worker_pool(layout.world_size).run(train_compiled, config, weights), strict=True)
    assert min(num_compiled) > 0, "nothing was compiled"
    np.testing.assert_allclose(records[0].losses, expected.losses[:1], rtol=1e-6)
    table = table_of(config)
    assert_gradients_close(assemble(table, layout.tensor, [r.gradients for r in records]), expected.gradients)


@pytest.mark.slow
def test_compiled_blocks_with_scaled_norms_share_their_graphs(worker_pool: Pools) -> None:
    config = in_layout(Layout(), model__layer_norm_scaling=True, model__num_layers=4, train__compile=True)
    weights = canonical_weights(config.model)
    expected = reference_run(config, weights, 1)
    ((record, num_compiled),) = worker_pool(1).run(train_compiled, config, weights)
    assert num_compiled == 2, "one for training and one for evaluation"
    np.testing.assert_allclose(record.losses, expected.losses, rtol=1e-6)
    assert_gradients_close(assemble(table_of(config), 1, [record.gradients]), expected.gradients)


DROPOUT = {"model__embedding_dropout": 0.1, "model__attention_dropout": 0.1, "model__residual_dropout": 0.1}


@pytest.mark.slow_except("layout3-2-block")
@pytest.mark.parametrize(
    ("layout", "micro_batch_size", "checkpointing"),
    [
        (Layout(), 8, "none"),
        (Layout(), 1, "block"),
        (Layout(tensor=2), 4, "none"),
        (Layout(tensor=2, pipeline=2, stage=1), 2, "block"),
        (Layout(tensor=2, data=2, stage=3), 4, "block"),
        (Layout(data=2, stage=2), 1, "none"),
        (Layout(pipeline=2, data=2), 2, "none"),
    ],
)
def test_dropout_masks_do_not_depend_on_the_layout(
    worker_pool: Pools, layout: Layout, micro_batch_size: int, checkpointing: str
) -> None:
    weights, without = oracle("mlra")
    (expected,) = run(worker_pool, in_layout(Layout(), **DROPOUT), weights)
    config = in_layout(
        layout,
        train__micro_batch_size=micro_batch_size,
        parallel__activation_checkpointing=checkpointing,
        **DROPOUT,
    )
    records = run(worker_pool, config, weights)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(records[0].gradient_norms, expected.gradient_norms, rtol=1e-6)
    np.testing.assert_allclose(records[0].validation, expected.validation, rtol=1e-6)
    assert abs(expected.losses[0] - without.losses[0]) > 1e-3, "dropout did nothing"


@pytest.mark.slow_except("tp1pp2dp1-zero0")
@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2), Layout(data=2, stage=3)], ids=identify)
def test_evaluation_knows_no_dropout(worker_pool: Pools, layout: Layout) -> None:
    weights, without = oracle("mlra")
    config = in_layout(layout, optim__lr=1e-12, **DROPOUT)  # the weights stay what they are
    records = run(worker_pool, config, weights, steps=1)
    np.testing.assert_allclose(records[0].validation, without.losses[:1], rtol=1e-6)


def train_without_latent_reduction(
    rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor]
) -> Record:
    """The defect that the gradient test exists for: latents enter the sharded factors without their all-reduce."""
    from mlra_scale.model import attention

    correct = attention.enter_tensor_parallel
    attention.enter_tensor_parallel = lambda context, *tensors: list(tensors)
    try:
        return train(rank, world_size, config, 1, weights)
    finally:
        attention.enter_tensor_parallel = correct


def test_a_missing_reduction_of_the_replicated_factor_is_caught(worker_pool: Pools) -> None:
    weights, expected = oracle("mlra")
    config = in_layout(Layout(tensor=2), parallel__low_rank_plan="replicated")
    records = worker_pool(2).run(train_without_latent_reduction, config, weights)
    np.testing.assert_allclose(records[0].losses, expected.losses[:1], rtol=1e-6)  # the loss does not show it
    gradients = assemble(table_of(config), 2, [record.gradients for record in records])
    with pytest.raises(AssertionError, match=r"attention\.q\.down\.weight"):
        assert_gradients_close(gradients, expected.gradients)


@pytest.mark.slow_except("tp2pp1dp1-zero0", "tp1pp1dp2-zero3")
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(data=2, stage=3), Layout(data=2, stage=1)], ids=identify)
def test_tev_of_gpt2s_vocabulary(worker_pool: Pools, layout: Layout) -> None:
    shape = {
        "model__vocab_size": 50257,
        "model__vocab_padding_multiple": 128,
        "model__hidden_size": 24,
        "model__num_layers": 1,
        "train__sequence_length": 8,
        "train__global_batch_size": 2 * layout.data,
    }
    config = in_layout(layout, **shape)
    records = worker_pool(layout.world_size).run(train, config, 1)
    final = assemble(table_of(config), layout.tensor, [record.weights for record in records])
    assert final["embedding.weight"].shape == (50304, 24)
    assert_tev_is_numpys(records, config, final["embedding.weight"])
