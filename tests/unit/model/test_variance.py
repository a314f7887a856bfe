"""The measurable core of the paper's argument: how much variance a low-rank projection passes on.

`pytest tests/unit/model/test_variance.py -s` prints the table.
"""

import math

import pytest
import torch

from mlra_scale.config import ModelConfig
from mlra_scale.model.initialization import fill_initial_values, product_std
from mlra_scale.model.parameters import ParameterTable
from tests.support.reference import LowRankProjection

HIDDEN, TOKENS, SEEDS = 768, 512, 8


def config(rank: int, **options: str) -> ModelConfig:
    return ModelConfig.model_validate(
        {"num_layers": 1, "hidden_size": HIDDEN, "num_heads": 12, "attention_rank": rank, **options}
    )


def initial(model: ModelConfig, name: str, seed: int) -> torch.Tensor:
    info = ParameterTable(model)[f"blocks.0.attention.{name}"]
    values = torch.empty(info.shape)
    fill_initial_values(values, model, info, seed)
    return values


def projection(model: ModelConfig, name: str, seed: int) -> LowRankProjection:
    """One factorised projection as a fresh model has it."""
    result = LowRankProjection(HIDDEN, HIDDEN, model.rank)
    with torch.no_grad():
        for part in ("down.weight", "up.weight", "up.bias"):
            result.get_parameter(part).copy_(initial(model, f"{name}.{part}", seed))
    return result


@torch.no_grad()
def variance_ratio(model: ModelConfig, name: str, seed: int) -> float:
    x = 3.0 * torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1000 + seed))
    return float(projection(model, name, seed)(x).double().var() / x.double().var())


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 4, 1 / 2, 1.0])
def test_xavier_factors_pass_on_the_predicted_variance(ratio: float) -> None:
    rank = int(ratio * HIDDEN)
    model = config(rank, attention_init="xavier")
    measured = torch.tensor([variance_ratio(model, name, seed) for seed in range(SEEDS) for name in "qkv"])
    mean, error = float(measured.mean()), float(measured.std() / math.sqrt(len(measured)))
    predicted = 4 * HIDDEN * rank / (HIDDEN + rank) ** 2
    print(
        f"Var[P(x)]/Var[x]  D={HIDDEN} R/D={ratio:<5g} predicted {predicted:.4f}  measured {mean:.4f} "
        f"+- {error:.4f} (standard error, {len(measured)} draws)  off by {mean / predicted - 1:+.2%}"
    )
    assert abs(mean / predicted - 1) < 0.03
    # Tighter than asked for: the mean of many draws is off by its own error only.
    assert abs(mean - predicted) < 4 * error < 0.03 * predicted


@pytest.mark.parametrize("scheme", ["gpt2", "xavier", "matched"])
def test_std_of_the_merged_weight_is_the_one_that_the_dense_control_copies(scheme: str) -> None:
    model = config(HIDDEN // 2, attention_init=scheme)
    products = []
    for seed in range(3):
        factors = projection(model, "q", seed)
        products.append((factors.up.weight @ factors.down.weight).detach())
    std = float(torch.stack(products).std())
    assert std == pytest.approx(product_std(model, scheme), rel=0.01)
    control = config(HIDDEN // 2, attention="dense", attention_init="matched-to-mlra", paired_mlra_init=scheme)
    assert float(initial(control, "q.weight", 0).std()) == pytest.approx(std, rel=0.015)
    # What is not factorised in the pair keeps the dense initialization.
    assert float(initial(control, "o.weight", 0).std()) == pytest.approx(0.02 / math.sqrt(2), rel=0.01)
    if scheme == "matched":
        assert std == pytest.approx(model.base_std, rel=0.01)
    if scheme == "gpt2":
        assert product_std(model, scheme) == pytest.approx(0.0078, abs=5e-5), "the paper's notes"
