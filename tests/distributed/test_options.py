"""Model options in every layout: losses, every gradient, the weights and what carries over equal the oracle's.

`pytest tests/distributed/test_options.py -m "" -s` prints the table.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlra_scale.config import Config
from mlra_scale.model.parameters import linear_maps, vector_name
from tests.distributed.layout_matrix import Run, assert_same_run, assert_same_tensors, largest_difference, load, save
from tests.distributed.steps import Record, train
from tests.distributed.test_layouts import errors
from tests.support.layouts import Layout, assemble, canonical_weights, layout_config, micro_batches, start, table_of
from tests.support.oracle import ReferenceRun, assert_gradients_close, build_reference, reference_loss, reference_run
from tests.support.pool import WorkerPool

Pools = Callable[[int], WorkerPool]
Options = dict[str, Any]

QK_NORM: Options = {"model__qk_norm": True}
SIGMA: Options = {"model__sigma_reparam": True}
NORMS: Options = {"model__layer_norm_scaling": True}
EMBEDDING: Options = {"model__embedding_scale": "sqrt_width"}
ALL: Options = {**QK_NORM, **SIGMA, **NORMS, **EMBEDDING, "model__z_loss": 1e-2}
OPTIONS = {"qk-norm": QK_NORM, "sigma": SIGMA, "layer-norm-scaling": NORMS, "embedding-scale": EMBEDDING, "all": ALL}
ATTENTIONS: dict[str, Options] = {
    "mlra": {},
    "dense": {"model__attention": "dense"},
    "o-factorised": {"model__factorised_projections": ("q", "k", "o"), "model__attention_rank": 10},
}
STEPS = 3
# As in test_layouts: Adam would turn the rounding noise of gradients that are zero into steps.
COMMON = {"optim__eps": 1e-4, "model__num_layers": 3, "model__init_std": 0.2}

PAIRS = [Layout(tensor=2), Layout(pipeline=2)]
CASES = [(layout, option, kind) for layout in PAIRS for option in OPTIONS for kind in ("mlra", "dense")]
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


def in_layout(layout: Layout, option: str, attention: str, **overrides: Any) -> Config:
    values = {**COMMON, **OPTIONS[option], **ATTENTIONS[attention], **overrides}
    return layout_config(layout, parallel__world_size=layout.world_size, **values)


@cache
def oracle(option: str, attention: str, seed: int = 3) -> tuple[dict[str, torch.Tensor], ReferenceRun]:
    config = in_layout(Layout(), option, attention)
    weights = canonical_weights(config.model, seed)
    return weights, reference_run(config, weights, STEPS)


def run(worker_pool: Pools, config: Config, weights: dict[str, torch.Tensor]) -> list[Record]:
    assert config.parallel.world_size is not None
    return worker_pool(config.parallel.world_size).run(train, config, STEPS, weights)


@pytest.mark.slow_except(
    "tp2pp1dp1 zero0-qk-norm-mlra",
    "tp2pp1dp1 zero0-embedding-scale-dense",
    "tp1pp2dp1 zero0-sigma-dense",
    "tp1pp2dp1 zero0-layer-norm-scaling-mlra",
    "tp2pp1dp2 zero3-all-mlra",
)
@pytest.mark.parametrize(("layout", "option", "attention"), CASES, ids=str)
def test_fp32_equals_the_oracle(worker_pool: Pools, layout: Layout, option: str, attention: str) -> None:
    weights, expected = oracle(option, attention)
    config = in_layout(layout, option, attention)
    records = run(worker_pool, config, weights)
    first = records[0]
    for record in records:
        assert (record.losses, record.gradient_norms) == (first.losses, first.gradient_norms), "ranks disagree"
    np.testing.assert_allclose(first.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(first.gradient_norms, expected.gradient_norms, rtol=2e-6)
    # The validation is computed with vectors of its own step: those that the next step would find.
    np.testing.assert_allclose(first.validation, [expected.validation], rtol=1e-6)
    table = table_of(config)
    worst = assert_gradients_close(
        assemble(table, layout.tensor, [record.gradients for record in records]), expected.gradients
    )
    final = assemble(table, layout.tensor, [record.weights for record in records])
    for name, value in expected.weights.items():
        np.testing.assert_allclose(final[name][: len(value)], value, rtol=1e-4, atol=4e-6, err_msg=name)
    print(f"{layout!s:<24}{option:<20}{attention:<14}loss {first.losses[-1]:.7f}, worst gradient {worst:.2f}")


def test_options_change_what_is_computed() -> None:
    plain = layout_config(Layout(), **COMMON)
    losses = set()
    for overrides in ({}, QK_NORM, SIGMA, NORMS, EMBEDDING):
        config = layout_config(Layout(), **COMMON, **overrides)
        weights = canonical_weights(config.model)
        shared = canonical_weights(plain.model)
        weights = {name: shared.get(name, value) for name, value in weights.items()}
        with torch.no_grad():
            losses.add(round(reference_loss(config, build_reference(config, weights), 0).item(), 4))
    assert len(losses) == 5, losses


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
    weights, expected = oracle("all", attention)
    cut = {"train__micro_batch_size": micro_batch_size, "parallel__activation_checkpointing": checkpointing}
    records = run(worker_pool, in_layout(layout, "all", attention, **cut), weights)
    np.testing.assert_allclose(records[0].losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(records[0].validation, [expected.validation], rtol=1e-6)


@cache
def bf16_error(worker_pool: Pools, engine: str) -> tuple[float, float]:
    """Largest error of one bf16 process against fp32 over four models (see test_layouts.bf16_error)."""
    found = []
    for seed in range(3, 7):
        weights, expected = oracle("all", "mlra", seed)
        config = in_layout(Layout(engine=engine), "all", "mlra", train__precision="bf16")
        (record,) = run(worker_pool, config, weights)
        found.append(errors(record, expected))
    losses, norms = zip(*found, strict=True)
    return max(losses), max(norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=2), Layout(pipeline=2), Layout(data=2, stage=1), Layout(tensor=2, data=2, stage=3)],
    ids=str,
)
def test_bf16_errs_at_most_twice_as_much_as_one_process(worker_pool: Pools, layout: Layout) -> None:
    weights, expected = oracle("all", "mlra")
    engine = "pipeline" if layout.pipeline > 1 else "zero"
    allowed_loss, allowed_norm = bf16_error(worker_pool, engine)
    records = run(worker_pool, in_layout(layout, "all", "mlra", train__precision="bf16"), weights)
    loss, norm = errors(records[0], expected)
    print(f"{layout!s:<24}error / one process: loss {loss / allowed_loss:.2f}, norm {norm / allowed_norm:.2f}")
    assert loss <= 2 * allowed_loss
    assert norm <= 2 * allowed_norm
    # And one process itself errs by rounding only: bf16 has a relative precision of 2**-8.
    assert allowed_loss < 2**-10 and allowed_norm < 2**-6


def train_without_reduction(
    rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor], where: str
) -> Record:
    """A defect that the gradient test exists for: something replicated enters sharded computation as it is."""
    from mlra_scale.model import attention, spectral

    if where == "qk-norm":
        correct = attention.copy_to_tensor_parallel

        def defective(context: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
            return list(tensors) if tensors[0].dim() == 1 else correct(context, *tensors)

        attention.copy_to_tensor_parallel = defective
        try:
            return train(rank, world_size, config, 1, weights)
        finally:
            attention.copy_to_tensor_parallel = correct
    copy = spectral.copy_to_tensor_model_parallel_region
    spectral.copy_to_tensor_model_parallel_region = lambda tensor, group: tensor
    try:
        return train(rank, world_size, config, 1, weights)
    finally:
        spectral.copy_to_tensor_model_parallel_region = copy


@pytest.mark.parametrize(("option", "told"), [("qk-norm", r"attention\.k_norm\.weight"), ("sigma", r"fc_in\.gain")])
def test_a_missing_reduction_is_caught(worker_pool: Pools, option: str, told: str) -> None:
    weights, expected = oracle(option, "mlra")
    config = in_layout(Layout(tensor=2), option, "mlra")
    records = worker_pool(2).run(train_without_reduction, config, weights, option)
    np.testing.assert_allclose(records[0].losses, expected.losses[:1], rtol=1e-6)  # the loss does not show it
    gradients = assemble(table_of(config), 2, [record.gradients for record in records])
    with pytest.raises(AssertionError, match=told):
        assert_gradients_close(gradients, expected.gradients)


RESUMED = {
    "tp2pp2": (Layout(tensor=2, pipeline=2), "mlra"),
    "zero3-tp2dp2": (Layout(tensor=2, data=2, stage=3), "o-factorised"),
    "pp2dp2": (Layout(pipeline=2, data=2, stage=1), "dense"),
}


def options_run(worker_pool: Pools, folder: Path, layout: Layout, attention: str, is_saving: bool, **more: Any) -> Run:
    config = in_layout(layout, "all", attention, model__residual_dropout=0.1, **more)
    ranks = worker_pool(layout.world_size).run(save if is_saving else load, config, folder)
    return Run(layout, config, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_bitwise(worker_pool: Pools, tmp_path: Path, name: str, precision: str) -> None:
    """The power iterations, too: whatever else they began with would show in the first loss."""
    layout, attention = RESUMED[name]
    runs = [
        options_run(worker_pool, tmp_path, layout, attention, is_saving, train__precision=precision)
        for is_saving in (True, False)
    ]
    assert_same_tensors(*runs)
    assert_same_run(*runs)


@pytest.mark.slow
def test_a_checkpoint_has_the_vectors_of_all_stages_and_goes_on_in_other_layouts(
    worker_pool: Pools, tmp_path: Path
) -> None:
    from mlra_scale.checkpoint import Store, checkpoint_name

    before = options_run(worker_pool, tmp_path, Layout(tensor=2, pipeline=2), "mlra", is_saving=True)
    store = Store.open(tmp_path / checkpoint_name(5))
    vectors = store.power_vectors()
    assert set(vectors) == {vector_name(name) for name in linear_maps(before.config.model)}
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
    engine, plan = start(config, world_size, canonical_weights(config.model))
    seen: dict[str, list[np.ndarray]] = {}
    for step in range(2):
        for name, vector in engine.buffers().items():
            seen.setdefault(name, []).append(vector.numpy().copy())
        batches = micro_batches(config, plan, engine.topology.data_rank, step)
        norm = engine.gradient_norm(batches)
        for name, vector in engine.buffers().items():
            assert np.array_equal(seen[name][-1], vector.numpy()), "a pass without an update moves nothing"
        assert engine.train_batch(batches, config.optim.lr).gradient_norm == norm
        before = {name: vector.numpy().copy() for name, vector in engine.buffers().items()}
        engine.eval_batch(batches)
        for name, vector in engine.buffers().items():
            assert np.array_equal(before[name], vector.numpy()), "a validation moves nothing"
    return seen


@pytest.mark.slow
def test_rank_0_has_all_vectors_the_same_in_every_layout(worker_pool: Pools) -> None:
    (expected,) = worker_pool(1).run(spectra, in_layout(Layout(), "sigma", "o-factorised"))
    for layout in (Layout(tensor=2, pipeline=2), Layout(tensor=2, data=2, stage=3)):
        found = worker_pool(4).run(spectra, in_layout(layout, "sigma", "o-factorised"))[0]
        assert found.keys() == expected.keys() and len(found) == 18
        for name, vectors in expected.items():
            # Before the first step bitwise: a function of (seed, name).
            assert np.array_equal(found[name][0], vectors[0]), name
            assert not np.array_equal(vectors[0], vectors[1])
            np.testing.assert_allclose(found[name][1], vectors[1], rtol=0, atol=1e-5, err_msg=name)
