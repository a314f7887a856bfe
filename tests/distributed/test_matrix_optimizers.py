"""Muon and Spectron update the same in every layout: weights, momenta and power iterations equal the fp64 oracle's.

Newton-Schulz computes in fp32 here. A step has 128 tokens, more than the rank of any matrix. Some gradients have one
direction less all the same: of o and fc_out, since layer norms do not see what is added to all coordinates of the
stream alike, and of a dense k, since softmax does not see what is added to all keys alike, and normed inputs have one
direction in common. Rounding noise in such a direction is multiplied by 485, and stays far below the bounds in fp32.
`pytest tests/distributed/test_matrix_optimizers.py -m "" -s` prints the table of docs/equality.md.
"""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mlra_scale.config import Config, batch_plan
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.planning.communication import matrix_traffic
from mlra_scale.planning.layout import Stage
from tests.distributed.oracle_runs import (
    Options,
    Pools,
    assert_equals_oracle,
    assert_errs_like_one_process,
    bf16_error,
    errors,
    identify,
    in_layout,
    oracle,
    trained,
)
from tests.distributed.steps import Record, train
from tests.distributed.test_layouts import LAYOUTS
from tests.support.layouts import ODD, OFFLOADED, Layout, assemble
from tests.support.optimizers import treatments
from tests.support.oracle import VECTOR, ReferenceRun, assert_gradients_close

RATE = 1e-2
MUON: Options = {"optim__name": "muon", "optim__lr": RATE}
SPECTRON: Options = {"optim__name": "spectron", "optim__lr": RATE}
DENSE: Options = {"model__attention": "dense"}
ALL_FACTORISED: Options = {"model__factorised_projections": ("q", "k", "v", "o"), "model__attention_rank": 10}
OPTIMIZERS: dict[str, Options] = {
    "muon-mlra": MUON,
    "muon-dense": {**MUON, **DENSE},
    "spectron-mlra": SPECTRON,
}


@dataclass(frozen=True)
class Differences:
    """Largest differences from the oracle, each relative to the norm of what it is compared with."""

    weight: float
    momentum: float
    vector: float


def assert_matrices_equal(config: Config, records: list[Record], expected: ReferenceRun) -> Differences:
    """Compares all weights, and the momenta and vectors of Muon and Spectron, after the last step."""
    weights = assemble(config, [record.weights for record in records])
    momenta = assemble(config, [record.momenta for record in records])
    matrices = [name for name, treatment in treatments(config).items() if treatment.optimizer != "adamw"]
    assert matrices and set(expected.momenta) == set(matrices)
    found = {name.removeprefix(f"{VECTOR}/"): vector for name, vector in records[0].buffers.items() if VECTOR in name}
    assert found.keys() == expected.vectors.keys()
    worst = {name: difference(weights[name][: len(value)], value) for name, value in expected.weights.items()}
    name = max(worst, key=worst.__getitem__)
    assert worst[name] <= 1e-5, f"{name} is off by {worst[name]:.2e} of its norm"
    assert_gradients_close(momenta, expected.momenta)
    of_momenta = max(difference(momenta[name], value) for name, value in expected.momenta.items())
    of_vectors = max((difference(found[name], value) for name, value in expected.vectors.items()), default=0.0)
    assert of_vectors <= 1e-5
    differences = Differences(worst[name], of_momenta, of_vectors)
    print(f"largest differences: {differences}, weight {name}")
    return differences


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_trains_like_the_oracle(worker_pool: Pools, config: Config) -> None:
    records, expected = trained(worker_pool, config)
    assert_equals_oracle(config, records, expected)
    assert_matrices_equal(config, records, expected)


@pytest.mark.parametrize("attention", ["mlra", "dense"])
def test_gradients_have_full_rank_but_for_known_directions(attention: str) -> None:
    """What the comparison with the oracle stands on."""
    _, expected = oracle(in_layout(Layout(), **MUON, model__attention=attention), steps=1)
    for name in expected.momenta:
        values = np.linalg.svd(expected.gradients[name], compute_uv=False)
        smallest, next_one = values[[-1, -2]] / np.linalg.norm(values)
        lacks_one = name.endswith(("attention.k.weight", "attention.o.weight", "mlp.fc_out.weight"))
        assert next_one > 1e-6 and (smallest < 1e-12 if lacks_one else smallest > 1e-8), (name, smallest, next_one)


@pytest.mark.slow_except(
    "tp1pp1dp1-zero0-muon-dense",
    "tp1pp1dp2-zero1-spectron-mlra",
    "tp2pp2dp1-zero0-spectron-mlra",
    "tp2pp1dp2-zero2-muon-mlra",
    "tp2pp1dp2-zero3-spectron-mlra",
    "tp1pp2dp2-zero1-muon-mlra",
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=identify)
def test_fp32_equals_the_oracle(worker_pool: Pools, layout: Layout, optimizer: str) -> None:
    assert_trains_like_the_oracle(worker_pool, in_layout(layout, **OPTIMIZERS[optimizer]))


ITERATIONS: Options = {"optim__newton_schulz_steps": 3, "optim__newton_schulz_coefficients": (2.0, -1.5, 0.5)}
VARIANTS: dict[str, Options] = {
    "all-factorised": {**SPECTRON, **ALL_FACTORISED},
    "all-factorised-muon": {**MUON, **ALL_FACTORISED},
    "k-dense": {**SPECTRON, "model__factorised_projections": ("q", "v")},
    "without-nesterov": {**MUON, "optim__nesterov": False, "optim__momentum": 0.8},
    "other-iterations": {**MUON, **ITERATIONS},
    "rule-of-the-paper": {**SPECTRON, "optim__matrix_scale": "none", "optim__nesterov": False},
    "without-clipping": {**SPECTRON, "optim__grad_clip": 0.0},
    "one-sample-at-a-time": {**SPECTRON, "train__micro_batch_size": 1},
    "odd-shapes": {**SPECTRON, **ODD},
    "sigma-reparam": {**SPECTRON, "model__sigma_reparam": True, "model__num_layers": 3, "model__init_std": 0.2},
}


@pytest.mark.slow_except(
    "tp2pp1dp2-zero3-all-factorised",
    "tp2pp2dp1-zero1-one-sample-at-a-time",
    "tp2pp2dp1-zero1-other-iterations",
    "tp2pp2dp1-zero1-rule-of-the-paper",
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tensor=2, pipeline=2, stage=1), Layout(tensor=2, data=2, stage=3)],
    ids=identify,
)
def test_variants_equal_the_oracle(worker_pool: Pools, layout: Layout, variant: str) -> None:
    assert_trains_like_the_oracle(worker_pool, in_layout(layout, **VARIANTS[variant]))


@pytest.mark.slow_except("tp1pp1dp2-zero1-spectron-mlra")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", [Layout(data=2, stage=1), Layout(tensor=2, data=2, stage=2)], ids=identify)
def test_a_matrix_that_two_data_ranks_share_equals_the_oracle(
    worker_pool: Pools, layout: Layout, optimizer: str
) -> None:
    """With three blocks ZeRO cuts within the second one; with four every data rank has whole blocks."""
    config = in_layout(layout, **OPTIMIZERS[optimizer], model__num_layers=3)
    traffic, of_whole_blocks = (
        matrix_traffic(Stage(each, batch_plan(each, layout.world_size), 0))
        for each in (config, in_layout(layout, **OPTIMIZERS[optimizer]))
    )
    assert layout.tensor > 1 or traffic.rings > of_whole_blocks.rings == 0
    assert_trains_like_the_oracle(worker_pool, config)


RULES: dict[str, Options] = {
    "v-by-muon": {"optim__rules": [{"names": "blocks.*.attention.v.*.weight", "optimizer": "muon"}]},
    "all-but-the-mlp": {**SPECTRON, "optim__rules": [{"names": "blocks.*.mlp.*", "optimizer": "adamw"}]},
    "rates-and-decay": {
        **SPECTRON,
        "optim__weight_decay": 1.0,
        "optim__rules": [
            {"kind": "embedding", "weight_decay": 0.0},
            {"names": "blocks.[13].*", "lr_factor": 0.5},
            {"names": "blocks.*.attention.?.up.weight", "lr_factor": 2.0, "weight_decay": 0.0},
            {"kind": "norm", "lr_factor": 0.25, "weight_decay": 0.5},
        ],
    },
    "one-block-by-each": {
        **MUON,
        "optim__rules": [
            {"names": "blocks.0.*", "lr_factor": 0.5},
            {"names": "blocks.2.attention.*.weight", "optimizer": "spectron"},
            {"names": "blocks.3.attention.*.weight", "optimizer": "adamw"},
        ],
    },
}


@pytest.mark.slow_except("tp2pp2dp1-zero1-one-block-by-each", "tp2pp1dp2-zero3-rates-and-decay")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tensor=2),
        Layout(data=2, stage=2),
        Layout(tensor=2, pipeline=2, stage=1),
        Layout(tensor=2, data=2, stage=3),
    ],
    ids=identify,
)
def test_rules_equal_the_oracle(worker_pool: Pools, layout: Layout, rules: str) -> None:
    config = in_layout(layout, **RULES[rules])
    assert_trains_like_the_oracle(worker_pool, config)


@pytest.mark.parametrize("rules", RULES)
def test_every_rule_is_seen_in_the_weights(rules: str) -> None:
    """Without any one of them the oracle's weights are further off than the comparison allows."""
    config = in_layout(Layout(), **RULES[rules])
    _, expected = oracle(config)
    for left_out in range(len(config.optim.rules)):
        fewer = tuple(rule for index, rule in enumerate(config.optim.rules) if index != left_out)
        optim = config.optim.model_copy(update={"rules": fewer})
        _, other = oracle(config.model_copy(update={"optim": optim}))
        moved = max(difference(other.weights[name], value) for name, value in expected.weights.items())
        assert moved > 1e-4, (left_out, moved)


@pytest.mark.slow_except("tp1pp2dp1-zero1-adamw", "tp2pp1dp2-zero3-spectron")
@pytest.mark.parametrize("name", ["adamw", "spectron"])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(data=2), Layout(pipeline=2, stage=1), Layout(tensor=2, data=2, stage=3)],
    ids=identify,
)
def test_completep_takes_its_epsilon_to_the_blocks(worker_pool: Pools, layout: Layout, name: str) -> None:
    """Adam's epsilon is 1e-4 here, as large as gradients: 8 times more of it for blocks, and only for them, is seen."""
    options: Options = {"model__depth_rule": "completep", "model__base_depth": 32, "optim__name": name}
    config = in_layout(layout, **options, optim__lr=1e-3)
    records, expected = trained(worker_pool, config)
    assert_equals_oracle(config, records, expected)
    if name != "adamw":
        assert_matrices_equal(config, records, expected)


def orthogonalised_shapes(rank: int, world_size: int, config: Config) -> list[tuple[int, ...]]:
    """Shapes of the matrices that this rank orthogonalises in one step."""
    from mlra_scale.parallel import matrix_optimizer

    original, shapes = matrix_optimizer.orthogonalised, []

    def counted(matrix: torch.Tensor, *arguments: Any) -> torch.Tensor:
        shapes.append(tuple(matrix.shape))
        return original(matrix, *arguments)

    with mock.patch.object(matrix_optimizer, "orthogonalised", counted):
        train(rank, world_size, config, 1)
    return shapes


@pytest.mark.slow_except("tp2pp1dp2-zero3")
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.world_size > 1], ids=identify)
def test_each_matrix_is_orthogonalised_once_and_whole(worker_pool: Pools, layout: Layout) -> None:
    """In all layouts, and the ranks of a stage have equally many, but for one."""
    config = in_layout(layout, **SPECTRON)
    table = ParameterTable(config.model)
    expected = [table[name].shape for name, treatment in treatments(config).items() if treatment.optimizer != "adamw"]
    ranks = worker_pool(layout.world_size).run(orthogonalised_shapes, config)
    assert sorted(shape for shapes in ranks for shape in shapes) == sorted(expected)
    counts = [len(shapes) for shapes in ranks]
    assert max(counts) - min(counts) <= 1, counts


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OFFLOADED)
@pytest.mark.parametrize("tensor", [1, 2])
def test_offload_equals_the_oracle(worker_pool: Pools, tensor: int, name: str, optimizer: str) -> None:
    """Accumulating over two or four micro-batches."""
    config = in_layout(Layout(tensor=tensor, data=2), **OPTIMIZERS[optimizer])
    config = config.model_copy(update={"deepspeed": {"zero_optimization": OFFLOADED[name]}})
    weights, expected = oracle(config)
    # DeepSpeed compiles its CPUAdam at first use: a minute or two, once per machine.
    records = worker_pool(2 * tensor).run(train, config, 5, weights, timeout=420.0)
    # CPUAdam rounds the powers of beta to fp32: the tolerances of tests/distributed/test_ds_configs.py.
    assert_equals_oracle(config, records, expected, norms=2e-6, weights=4e-6)
    assert_matrices_equal(config, records, expected)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon-mlra", "spectron-mlra"])
def test_zero_3_in_small_groups_equals_the_oracle(worker_pool: Pools, optimizer: str) -> None:
    """By default weights as small as these stay gathered, and all of them are updated as one group."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 3000}
    config = in_layout(Layout(data=2, stage=3), **OPTIMIZERS[optimizer])
    assert_trains_like_the_oracle(worker_pool, config.model_copy(update={"deepspeed": {"zero_optimization": zero}}))


BF16_LAYOUTS = [
    *(Layout(tensor=2), Layout(pipeline=2), Layout(data=2, stage=1), Layout(data=2, stage=3)),
    *(Layout(tensor=2, pipeline=2, stage=1), Layout(tensor=2, data=2, stage=3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", BF16_LAYOUTS, ids=identify)
def test_bf16_errs_at_most_twice_as_much_as_one_process(worker_pool: Pools, layout: Layout, optimizer: str) -> None:
    """With Newton-Schulz in bf16: what `auto` is there."""
    config = in_layout(layout, train__precision="bf16", **OPTIMIZERS[optimizer])
    records, expected = trained(worker_pool, config)
    assert_errs_like_one_process(records, expected, bf16_error(worker_pool, config))


@pytest.mark.slow_except("tp2pp1dp2-zero3")
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2, pipeline=2), Layout(tensor=2, data=2, stage=3)], ids=identify
)
def test_iterations_in_bf16_widen_the_difference(worker_pool: Pools, layout: Layout) -> None:
    """In an fp32 run: by a fifth of the updates at most, in all, and no less than bf16 rounds."""
    config = in_layout(layout, **MUON, optim__newton_schulz_precision="bf16")
    records, expected = trained(worker_pool, config)
    weights = assemble(config, [record.weights for record in records])
    start, _ = oracle(config)
    shares = []
    for name in expected.momenta:
        moved = np.linalg.norm(expected.weights[name] - start[name].double().numpy())
        shares.append(float(np.linalg.norm(weights[name] - expected.weights[name]) / moved))
    worst = max(difference(weights[name], expected.weights[name]) for name in expected.momenta)
    print(f"Newton-Schulz in bf16: {worst:.1e} of a weight, {min(shares):.1e} to {max(shares):.1e} of what it moved")
    assert 2**-9 < max(shares) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon-mlra", "spectron-mlra"])
@pytest.mark.parametrize(
    "layout",
    [Layout(data=2, stage=1), Layout(data=2, stage=2), Layout(data=2, stage=3), Layout(pipeline=2, stage=1)],
    ids=identify,
)
def test_fp16_errs_by_rounding_only(worker_pool: Pools, layout: Layout, optimizer: str) -> None:
    config = in_layout(layout, train__precision="fp16", optim__newton_schulz_precision="fp32", **OPTIMIZERS[optimizer])
    records, expected = trained(worker_pool, config)
    loss, norm = errors(records[0], expected)
    assert loss < 2**-12 and norm < 2**-9
    # The loss scale is in no momentum, and neither is what a larger norm would have clipped.
    momenta = assemble(config, [record.momenta for record in records])
    for name, momentum in expected.momenta.items():
        assert difference(momenta[name], momentum) < 0.02, name
