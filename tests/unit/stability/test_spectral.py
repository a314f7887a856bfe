"""Spectral norms of the attention products against singular values of whole matrices, however weights are cut."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.config import ModelConfig
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.stability.spectral import AttentionProducts

Weights = dict[str, torch.Tensor]


def model_config(factorised: str = "qkv", **values: Any) -> ModelConfig:
    shape = {"num_layers": 2, "hidden_size": 12, "num_heads": 3, "vocab_size": 7, "max_positions": 5}
    attention = {"attention": "mlra", "factorised_projections": tuple(factorised)} if factorised else {}
    return ModelConfig(**{**shape, **(attention or {"attention": "dense"}), **values})


def random_weights(model: ModelConfig, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(info.shape, generator=generator) for name, info in ParameterTable(model).items()}


def whole(weights: Weights, block: int, projection: str) -> np.ndarray:
    """The weight of a projection, multiplied out, in float64."""
    prefix = f"blocks.{block}.attention.{projection}"
    if f"{prefix}.weight" in weights:
        return weights[f"{prefix}.weight"].double().numpy()
    return (weights[f"{prefix}.up.weight"].double() @ weights[f"{prefix}.down.weight"].double()).numpy()


def expected_norms(model: ModelConfig, weights: Weights) -> dict[str, list[float]]:
    norms: dict[str, list[float]] = {"qk": [], "ov": []}
    for block in range(model.num_layers):
        q, k, v, o = (whole(weights, block, projection) for projection in "qkvo")
        heads = [slice(head * model.head_dim, (head + 1) * model.head_dim) for head in range(model.num_heads)]
        norms["qk"].append(max(np.linalg.svd(q[head].T @ k[head], compute_uv=False)[0] for head in heads))
        norms["ov"].append(max(np.linalg.svd(o[:, head] @ v[head], compute_uv=False)[0] for head in heads))
    return norms


def measure(model: ModelConfig, weights: Weights, iterations: int, cuts: int = 0, seed: int = 0) -> dict[str, Any]:
    """Of one rank that owns everything in pieces, in any order."""
    generator = np.random.default_rng(seed)
    fragments: list[Any] = []
    for name, tensor in weights.items():
        places = sorted({0, tensor.numel(), *generator.integers(0, tensor.numel(), cuts).tolist()})
        for start, stop in itertools.pairwise(places):
            fragments.append(SimpleNamespace(name=name, start=start, values=tensor.reshape(-1)[start:stop]))
    order = generator.permutation(len(fragments))
    topology: Any = SimpleNamespace(tensor=1, tensor_rank=0, device=torch.device("cpu"))
    products = AttentionProducts(model, ParameterTable(model), topology)
    return products.spectral_norms([fragments[index] for index in order], iterations)


@settings(deadline=None, max_examples=30)
@given(factorised=st.sampled_from(["", "qkv", "qkvo", "qv", "o"]), cuts=st.integers(0, 6), seed=st.integers(0, 1000))
def test_norms_are_the_largest_singular_values(factorised: str, cuts: int, seed: int) -> None:
    model = model_config(factorised, attention_rank=7)
    weights = random_weights(model, seed)
    # 4 iterations would do without rounding (a head has rank 4); those that follow must not do harm.
    found = measure(model, weights, iterations=12, cuts=cuts, seed=seed)
    for name, values in expected_norms(model, weights).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


def test_few_iterations_come_from_below() -> None:
    model = model_config("qkv", hidden_size=96, num_heads=3)
    weights = random_weights(model)
    expected = expected_norms(model, weights)
    found = [measure(model, weights, iterations) for iterations in (1, 2, 4, 8, 16)]
    for name, values in expected.items():
        shares = np.array([each[name] for each in found]) / np.array(values)
        assert (np.diff(shares, axis=0) >= -1e-5).all() and (shares <= 1.0 + 1e-5).all()
        assert (shares[0] > 0.3).all() and (shares[0] < 0.99).all() and (shares[-1] > 0.999).all()


def test_weights_of_zero_have_norm_zero_and_weights_are_not_changed() -> None:
    model = model_config("qkvo")
    weights = random_weights(model)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    measure(model, weights, iterations=2, cuts=3)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    assert measure(model, zeros, iterations=3) == {"qk": [0.0, 0.0], "ov": [0.0, 0.0]}


@pytest.mark.parametrize("projection", ["q", "o"])
def test_a_head_that_stands_out_is_found(projection: str) -> None:
    model = model_config("")
    weights = random_weights(model)
    head = slice(4, 8)
    weight = weights[f"blocks.1.attention.{projection}.weight"]
    (weight[:, head] if projection == "o" else weight[head]).mul_(100.0)
    found, expected = measure(model, weights, iterations=8), expected_norms(model, weights)
    name = "ov" if projection == "o" else "qk"
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    assert found[name][1] > 20 * found[name][0]
