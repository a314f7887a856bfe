"""Every layout trains the same model: losses, gradient norms, every gradient and the weights equal the oracle's.

`pytest tests/distributed/test_layouts.py -m "" -s` prints the numbers.
"""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist

from mlra_scale.config import Config
from mlra_scale.model import head_chunks
from tests.distributed.oracle_runs import (
    STEPS,
    Options,
    Pools,
    assert_equals_oracle,
    assert_errs_like_one_process,
    assert_losses_and_gradients,
    assert_same_under_dropout,
    bf16_error,
    errors,
    identify,
    in_layout,
    oracle,
    trained,
)
from tests.distributed.steps import Record, train
from tests.support.layouts import DROPOUT, MASKED, ODD, Layout, assemble

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
    config = in_layout(layout, model__attention=attention)
    records, expected = trained(worker_pool, config)
    final = assert_equals_oracle(config, records, expected)
    assert_tev_is_numpys(records, config, final["embedding.weight"])


PLANS = [
    ("merged", Layout()),
    *(("replicated", layout) for layout in (Layout(tensor=2), Layout(tensor=4), Layout(tensor=2, pipeline=2))),
    *(("merged", layout) for layout in (Layout(tensor=2), Layout(tensor=4), Layout(tensor=2, pipeline=2))),
    ("replicated", Layout(tensor=2, data=2, stage=3)),
    ("merged", Layout(tensor=2, data=2, stage=3)),
]


@pytest.mark.slow_except("replicated-tp2pp2dp1-zero0", "merged-tp2pp1dp2-zero3")
@pytest.mark.parametrize(("plan", "layout"), PLANS, ids=identify)
def test_every_low_rank_plan_equals_the_oracle(worker_pool: Pools, plan: str, layout: Layout) -> None:
    config = in_layout(layout, parallel__low_rank_plan=plan)
    assert_equals_oracle(config, *trained(worker_pool, config))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["replicated", "merged"])
def test_one_of_the_projections_may_be_dense(worker_pool: Pools, plan: str) -> None:
    """It takes the hidden state, the others their latents."""
    options: Options = {"model__factorised_projections": ("q", "k", "o"), "model__qk_norm": True}
    config = in_layout(Layout(tensor=2), parallel__low_rank_plan=plan, **options)
    assert_losses_and_gradients(config, *trained(worker_pool, config))


@pytest.mark.slow_except("tp2pp1dp2-zero3-mlra")
@pytest.mark.parametrize("attention", ["mlra", "dense"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.world_size > 1], ids=identify)
def test_bf16_errs_at_most_twice_as_much_as_one_process(worker_pool: Pools, layout: Layout, attention: str) -> None:
    config = in_layout(layout, model__attention=attention, train__precision="bf16")
    records, expected = trained(worker_pool, config)
    allowed = bf16_error(worker_pool, config)
    final = assemble(config, [record.weights for record in records])
    assert_tev_is_numpys(records, config, final["embedding.weight"])
    master = torch.from_numpy(final["embedding.weight"]).float()
    assert not torch.equal(master, master.bfloat16().float()), "these are rounded weights, not the fp32 masters"
    assert_errs_like_one_process(records, expected, allowed)
    # And one process itself errs by rounding only: bf16 has a relative precision of 2**-8.
    assert allowed[0] < 2**-11 and allowed[1] < 2**-8


FP16_LAYOUTS = [
    *(Layout(stage=1), Layout(data=2, stage=1), Layout(data=2, stage=2), Layout(data=2, stage=3)),
    *(Layout(tensor=2, stage=1), Layout(pipeline=2, stage=1)),
]


@pytest.mark.slow_except("tp1pp1dp2-zero3", "tp1pp2dp1-zero1")
@pytest.mark.parametrize("layout", FP16_LAYOUTS, ids=identify)
def test_fp16_errs_by_rounding_only(worker_pool: Pools, layout: Layout) -> None:
    records, expected = trained(worker_pool, in_layout(layout, train__precision="fp16"))
    loss, norm = errors(records[0], expected)
    assert loss < 2**-14 and norm < 2**-11


OPTIONS: dict[str, Options] = {
    "o-factorised": {"model__factorised_projections": ("q", "k", "v", "o"), "model__attention_rank": 10},
    "k-dense": {"model__factorised_projections": ("q", "v")},
    "z-loss": {"model__z_loss": 1e-2},
    "masked-documents": MASKED,
    "checkpointing": {"parallel__activation_checkpointing": "block"},
    "selective-checkpointing": {"parallel__activation_checkpointing": "selective"},
    "odd-shapes": ODD,
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
    records, expected = trained(worker_pool, config, steps=2)
    assert_losses_and_gradients(config, records, expected)
    np.testing.assert_allclose(records[0].validation, [expected.validation], rtol=1e-6)


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
    config = in_layout(layout, train__precision=precision)
    weights, expected = oracle(config)
    records = worker_pool(layout.world_size).run(train_in_chunks, config, STEPS, weights)
    if precision == "bf16":
        assert_errs_like_one_process(records, expected, bf16_error(worker_pool, config))
    else:
        assert_losses_and_gradients(config, records, expected)


COMPILED = [
    *(Layout(), Layout(data=2, stage=2), Layout(pipeline=2, stage=1), Layout(tensor=2)),
    *(Layout(tensor=2, pipeline=2, stage=1), Layout(tensor=2, data=2, stage=1), Layout(tensor=2, data=2, stage=2)),
]
COMPILED_CASES: list[tuple[Layout, Options, Options]] = [
    (layout, {"model__attention": attention}, {}) for layout in COMPILED for attention in ("mlra", "dense")
]
COMPILED_CASES += [(Layout(tensor=2, data=2, stage=1), {}, {"parallel__sequence_parallel": True})]
SHARING: list[Options] = [
    {"model__layer_norm_scaling": True},
    {"model__depth_rule": "completep", "model__base_depth": 3},
]
COMPILED_CASES += [(Layout(), {**options, "model__num_layers": 4}, {}) for options in SHARING]
COMPILED_CASES += [(Layout(tensor=2, data=2, stage=1), SHARING[1], {"parallel__sequence_parallel": True})]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "model", "split"), COMPILED_CASES, ids=identify)
def test_compiled_blocks_equal_the_oracle(worker_pool: Pools, layout: Layout, model: Options, split: Options) -> None:
    config = in_layout(layout, train__compile=True, **model, **split)
    weights, expected = oracle(config, steps=1)
    records, num_compiled = zip(*worker_pool(layout.world_size).run(train_compiled, config, weights), strict=True)
    assert min(num_compiled) > 0, "nothing was compiled"
    if "model__num_layers" in model:
        assert num_compiled == (2,), "one for training and one for evaluation: blocks share them"
    assert_losses_and_gradients(config, list(records), expected)


@pytest.mark.slow_except("tp2pp2dp1-zero1-2-block")
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
    ids=identify,
)
def test_dropout_masks_do_not_depend_on_the_layout(
    worker_pool: Pools, layout: Layout, micro_batch_size: int, checkpointing: str
) -> None:
    cut = {"train__micro_batch_size": micro_batch_size, "parallel__activation_checkpointing": checkpointing}
    assert_same_under_dropout(worker_pool, in_layout(layout, **cut, **DROPOUT))


@pytest.mark.slow_except("tp1pp2dp1-zero0")
@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2), Layout(data=2, stage=3)], ids=identify)
def test_evaluation_knows_no_dropout(worker_pool: Pools, layout: Layout) -> None:
    config = in_layout(layout, optim__lr=1e-12, **DROPOUT)  # the weights stay what they are
    records, without = trained(worker_pool, config, steps=1)
    np.testing.assert_allclose(records[0].validation, without.losses[:1], rtol=1e-6)


def likely_of_equals(rank: int, world_size: int) -> list[bool]:
    """Scores four tokens of which three are equally likely, with two of them on each of two ranks."""
    from mlra_scale.model.loss import head_scores

    context: Any = SimpleNamespace(tensor_group=dist.group.WORLD)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.5, 1.5]], dtype=torch.bfloat16)  # logits 1, 2, 2, 2
    hidden, targets = torch.ones(1, 4, 2, dtype=torch.bfloat16), torch.tensor([[0, 1, 2, 3]])
    found: list[bool] = head_scores(context, hidden, weight.chunk(world_size)[rank], None, targets)[1][0].tolist()
    return found


def test_of_equally_likely_tokens_on_several_ranks_the_first_is_the_most_likely(worker_pool: Pools) -> None:
    assert worker_pool(2).run(likely_of_equals) == [[False, True, False, False]] * 2
