"""Model options in every layout: losses, every gradient, the weights and what carries over equal the oracle's.

`pytest tests/distributed/test_options.py -m "" -s` prints the table.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.parallel.fragments import Fragment
from tests.distributed.layout_matrix import Run, assert_same_run, assert_same_tensors, largest_difference, load, save
from tests.distributed.oracle_runs import (
    Options,
    Pools,
    assert_equals_oracle,
    assert_errs_like_one_process,
    bf16_error,
    in_layout,
    trained,
)
from tests.support.layouts import RELEASING, Layout, canonical_weights, layout_config, micro_batches, start
from tests.support.oracle import build_reference, reference_loss

QK_NORM: Options = {"model__qk_norm": True}
SIGMA: Options = {"model__sigma_reparam": True}
NORMS: Options = {"model__layer_norm_scaling": True}
EMBEDDING: Options = {"model__embedding_scale": "sqrt_width"}
DEPTH: Options = {"model__depth_rule": "completep", "model__base_depth": 1}
ALL: Options = {**QK_NORM, **SIGMA, **NORMS, **EMBEDDING, "model__z_loss": 1e-2}
OPTIONS = {
    "qk-norm": QK_NORM,
    "sigma": SIGMA,
    "layer-norm-scaling": NORMS,
    "embedding-scale": EMBEDDING,
    "completep": DEPTH,
    "completep-all": {**DEPTH, **QK_NORM, **SIGMA, **EMBEDDING, "model__z_loss": 1e-2},
    "all": ALL,
}
ATTENTIONS: dict[str, Options] = {
    "mlra": {},
    "dense": {"model__attention": "dense"},
    "o-factorised": {"model__factorised_projections": ("q", "k", "o"), "model__attention_rank": 10},
}
STEPS = 3
SMALL: Options = {"model__num_layers": 3, "model__init_std": 0.2}

PAIRS = [Layout(tensor=2), Layout(pipeline=2)]
ALONE = [option for option in OPTIONS if option != "completep-all"]
CASES = [(layout, option, kind) for layout in PAIRS for option in ALONE for kind in ("mlra", "dense")]
CASES += [(Layout(), "all", "mlra"), (Layout(engine="pipeline"), "all", "dense")]
CASES += [(layout, "all", "o-factorised") for layout in (Layout(tensor=2), Layout(pipeline=2))]
CASES += [(Layout(data=2, stage=stage), "all", "mlra") for stage in range(4)]
CASES += [
    (Layout(tensor=2, pipeline=2), "all", "mlra"),
    (Layout(tensor=2, pipeline=2, stage=1), "all", "o-factorised"),
    (Layout(tensor=2, data=2, stage=3), "all", "mlra"),
    (Layout(tensor=2, data=2, stage=3), "all", "o-factorised"),
    (Layout(tensor=2, data=2, stage=2), "all", "dense"),
    (Layout(tensor=4), "sigma", "dense"),
]
CASES += [(Layout(data=2, stage=stage), "completep", "mlra") for stage in range(4)]
CASES += [
    (Layout(), "completep", "mlra"),
    (Layout(tensor=2, pipeline=2, stage=1), "completep-all", "o-factorised"),
    (Layout(tensor=2, data=2, stage=3), "completep-all", "o-factorised"),
    (Layout(tensor=2, data=2, stage=2), "completep-all", "dense"),
]


def model_options(option: str, attention: str) -> Options:
    return {**SMALL, **OPTIONS[option], **ATTENTIONS[attention]}


@pytest.mark.slow_except(
    "tp2pp1dp1 zero0-qk-norm-mlra",
    "tp2pp1dp1 zero0-embedding-scale-dense",
    "tp1pp2dp1 zero0-sigma-dense",
    "tp1pp2dp1 zero0-layer-norm-scaling-mlra",
    "tp2pp1dp2 zero3-all-mlra",
    "tp1pp2dp1 zero0-completep-mlra",
    "tp2pp1dp2 zero3-completep-all-o-factorised",
)
@pytest.mark.parametrize(("layout", "option", "attention"), CASES, ids=str)
def test_fp32_equals_the_oracle(worker_pool: Pools, layout: Layout, option: str, attention: str) -> None:
    """The validation is computed with vectors of its own step: those that the next step would find."""
    config = in_layout(layout, **model_options(option, attention))
    assert_equals_oracle(config, *trained(worker_pool, config, STEPS), norms=2e-6, weights=4e-6)


def test_options_change_what_is_computed() -> None:
    plain = layout_config(Layout(), **SMALL)
    losses = set()
    for overrides in ({}, QK_NORM, SIGMA, NORMS, EMBEDDING, DEPTH):
        config = layout_config(Layout(), **SMALL, **overrides)
        weights = canonical_weights(config.model)
        shared = canonical_weights(plain.model)
        weights = {name: shared.get(name, value) for name, value in weights.items()}
        with torch.no_grad():
            losses.add(round(reference_loss(config, build_reference(config, weights), 0).item(), 4))
    assert len(losses) == 6, losses


@pytest.mark.slow_except("selective")
@pytest.mark.parametrize("checkpointing", ["selective", "block"])
def test_completep_with_recomputation_equals_the_oracle(worker_pool: Pools, checkpointing: str) -> None:
    layout, more = Layout(tensor=2), {"parallel__activation_checkpointing": checkpointing}
    config = in_layout(layout, **model_options("completep-all", "mlra"), **more)
    assert_equals_oracle(config, *trained(worker_pool, config, STEPS), norms=2e-6, weights=4e-6)


@pytest.mark.slow_except("tp1pp1dp1 zero0-1-block-mlra")
@pytest.mark.parametrize("attention", ["mlra", "dense"])
@pytest.mark.parametrize(
    ("layout", "micro_batch_size", "checkpointing"),
    [
        (Layout(), 8, "none"),
        (Layout(), 1, "block"),
        (Layout(tensor=2), 1, "block"),
        (Layout(tensor=2, pipeline=2), 1, "block"),
        (Layout(tensor=2, data=2, stage=3), 4, "block"),
    ],
    ids=str,
)
def test_vectors_belong_to_a_step_however_it_is_cut(
    worker_pool: Pools, layout: Layout, micro_batch_size: int, checkpointing: str, attention: str
) -> None:
    cut = {"train__micro_batch_size": micro_batch_size, "parallel__activation_checkpointing": checkpointing}
    records, expected = trained(worker_pool, in_layout(layout, **model_options("all", attention), **cut), STEPS)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(records[0].validation, [expected.validation], rtol=1e-6)


@pytest.mark.slow_except("o-factorised-selective")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_zero_3_that_keeps_nothing_gathered(worker_pool: Pools, attention: str, checkpointing: str) -> None:
    """sigma of a product needs both factors at once; in the cases above weights are too small to be released."""
    more = {"parallel__activation_checkpointing": checkpointing}
    config = in_layout(Layout(data=2, stage=3), **model_options("all", attention), **more)
    config = config.model_validate(config.model_dump() | {"deepspeed": {"zero_optimization": RELEASING}})
    assert_equals_oracle(config, *trained(worker_pool, config, STEPS), norms=2e-6, weights=4e-6)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["all", "completep-all"])
@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=2), Layout(pipeline=2), Layout(data=2, stage=1), Layout(tensor=2, data=2, stage=3)],
    ids=str,
)
def test_bf16_errs_at_most_twice_as_much_as_one_process(worker_pool: Pools, layout: Layout, option: str) -> None:
    config = in_layout(layout, train__precision="bf16", **model_options(option, "mlra"))
    records, expected = trained(worker_pool, config, STEPS)
    allowed = bf16_error(worker_pool, config, STEPS)
    assert_errs_like_one_process(records, expected, allowed)
    # And one process itself errs by rounding only: bf16 has a relative precision of 2**-8.
    assert allowed[0] < 2**-10 and allowed[1] < 2**-6


RESUMED = {
    "tp2pp2": (Layout(tensor=2, pipeline=2), "mlra"),
    "zero3-tp2dp2": (Layout(tensor=2, data=2, stage=3), "o-factorised"),
    "pp2dp2": (Layout(pipeline=2, data=2, stage=1), "dense"),
}


def options_run(worker_pool: Pools, folder: Path, layout: Layout, attention: str, is_saving: bool, **more: Any) -> Run:
    config = in_layout(layout, **model_options("all", attention), model__residual_dropout=0.1, **more)
    ranks = worker_pool(layout.world_size).run(save if is_saving else load, config, folder)
    return Run(config, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_continues_bitwise(worker_pool: Pools, tmp_path: Path, name: str, precision: str) -> None:
    """The power iterations, too: whatever else they began with would show in the first loss."""
    layout, attention = RESUMED[name]
    runs = [
        options_run(worker_pool, tmp_path, layout, attention, is_saving, train__precision=precision)
        for is_saving in (True, False)
    ]
    assert_same_tensors(*runs)
    assert_same_run(*runs)


@pytest.mark.slow
def test_a_checkpoint_has_the_vectors_of_all_stages_and_continues_in_other_layouts(
    worker_pool: Pools, tmp_path: Path
) -> None:
    from mlra_scale.checkpoint import Store, checkpoint_name

    before = options_run(worker_pool, tmp_path, Layout(tensor=2, pipeline=2), "mlra", is_saving=True)
    store = Store.open(tmp_path / checkpoint_name(5))
    vectors = store.buffers()
    assert set(vectors) == {entry.vector for entry in ParameterTable(before.config.model).normalised.values()}
    for vector in vectors.values():
        assert vector.dtype == torch.float32 and abs(float(vector.norm()) - 1) < 1e-6
    assert store.verify() == []
    for layout in (Layout(), Layout(data=2, stage=3), Layout(tensor=2, stage=1), Layout(pipeline=2, data=2, stage=1)):
        after = options_run(worker_pool, tmp_path, layout, "mlra", is_saving=False)
        assert_same_tensors(before, after)
        difference = largest_difference(before, after)
        print(f"tp2pp2 -> {layout}: losses differ by {difference:.1e}")
        assert difference < 1e-6


def spectra(rank: int, world_size: int, config: Config) -> dict[str, list[np.ndarray]]:
    """The vectors of this rank before and after steps, a validation between them."""
    engine = start(config, world_size, canonical_weights(config.model))
    seen: dict[str, list[np.ndarray]] = {}
    for step in range(2):
        for name, vector in engine.buffers().items():
            seen.setdefault(name, []).append(vector.numpy().copy())
        batches = micro_batches(engine, step)
        norm = engine.gradient_norm(batches)
        for name, vector in engine.buffers().items():
            assert np.array_equal(seen[name][-1], vector.numpy()), "a pass without an update moves nothing"
        assert engine.train_batch(batches, config.optim.lr).gradient_norm == norm
        before = {name: vector.numpy().copy() for name, vector in engine.buffers().items()}
        engine.eval_batch(batches)
        for name, vector in engine.buffers().items():
            assert np.array_equal(before[name], vector.numpy()), "a validation moves nothing"
    return seen


def losses_of_larger_weights(rank: int, world_size: int, config: Config) -> list[float]:
    """Of a validation before and after a map's weights are doubled, in the two ways in which an engine changes them."""
    engine = start(config, world_size, canonical_weights(config.model))
    batches, name = micro_batches(engine, 0), "blocks.0.mlp.fc_in.weight"

    def double(fragment: Fragment) -> None:
        if fragment.name == name:
            fragment.values.mul_(2)

    losses = [engine.eval_batch(batches)]
    engine.scale_rows({name: torch.full((config.model.ffn_size,), 2.0)})
    losses.append(engine.eval_batch(batches))
    engine.restore(double, None, with_moments=False)
    return [*losses, engine.eval_batch(batches)]


@pytest.mark.slow_except("tp2pp1dp1 zero0")
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(data=2, stage=3)], ids=str)
def test_singular_values_follow_weights_that_are_changed(worker_pool: Pools, layout: Layout) -> None:
    config = in_layout(layout, **model_options("sigma", "mlra"))
    for losses in worker_pool(2).run(losses_of_larger_weights, config):
        np.testing.assert_allclose(losses, losses[:1] * 3, rtol=1e-6)


@pytest.mark.slow
def test_rank_0_has_all_vectors_the_same_in_every_layout(worker_pool: Pools) -> None:
    (expected,) = worker_pool(1).run(spectra, in_layout(Layout(), **model_options("sigma", "o-factorised")))
    for layout in (Layout(tensor=2, pipeline=2), Layout(tensor=2, data=2, stage=3)):
        found = worker_pool(4).run(spectra, in_layout(layout, **model_options("sigma", "o-factorised")))[0]
        assert found.keys() == expected.keys() and len(found) == 18
        for name, vectors in expected.items():
            # Before the first step bitwise: a function of (seed, name).
            assert np.array_equal(found[name][0], vectors[0]), name
            assert not np.array_equal(vectors[0], vectors[1])
            np.testing.assert_allclose(found[name][1], vectors[1], rtol=0, atol=1e-5, err_msg=name)
