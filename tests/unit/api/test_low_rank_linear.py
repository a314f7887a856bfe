"""The low-rank map in plain torch: its initial values, its product, and that trainer and exports share it."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mlra_scale import LowRankLinear
from mlra_scale.config import ModelConfig
from mlra_scale.model.initialization import initial_std
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.shipped.low_rank_linear import factor_stds
from mlra_scale.shipped.modeling_mlra import MlraConfig, MlraForCausalLM


def test_it_is_its_product() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(24, 40, 8).double()
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    nn.init.normal_(layer.up.bias)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T + layer.up.bias, rtol=1e-12, atol=1e-12)
    assert LowRankLinear(24, 40, 8, bias=False).up.bias is None
    with pytest.raises(ValueError, match="rank is 0"):
        LowRankLinear(4, 4, 0)
    with pytest.raises(ValueError, match=r"std is -1\.0"):
        LowRankLinear(4, 4, 2, std=-1.0)
    made = LowRankLinear(4, 6, 2, device="meta", dtype=torch.bfloat16)
    assert {(each.device.type, each.dtype) for each in made.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("init", "down", "up"),
    [
        ("gpt2", 0.03, 0.03),
        ("xavier", math.sqrt(2 / (768 + 192)), math.sqrt(2 / (192 + 1024))),
        ("matched", math.sqrt(0.03) * 192**-0.25, math.sqrt(0.03) * 192**-0.25),
    ],
)
def test_initial_values(init: str, down: float, up: float) -> None:
    torch.manual_seed(1)
    layer = LowRankLinear(768, 1024, 192, init=init, std=0.03, up_scale=0.25)
    # 147,456 elements: the standard error of a standard deviation is 0.2 % of it.
    assert float(layer.down.weight.detach().std()) == pytest.approx(down, rel=0.01)
    assert float(layer.up.weight.detach().std()) == pytest.approx(up * 0.25, rel=0.01)
    assert not layer.up.bias.any()
    if init == "matched":
        assert float(layer.dense_weight().std()) == pytest.approx(0.03 * 0.25, rel=0.02)


def test_an_unknown_initialization_is_refused() -> None:
    with pytest.raises(ValueError, match="init is 'kaiming'; use gpt2, xavier, matched"):
        LowRankLinear(4, 4, 2, init="kaiming")
    with pytest.raises(ValueError, match="attention_init is 'kaiming'"):
        MlraConfig(attention_init="kaiming")


def test_the_nearest_factors_of_a_dense_map() -> None:
    torch.manual_seed(2)
    weight = torch.randn(12, 8)
    layer = LowRankLinear(8, 12, 8)
    assert layer.set_dense(weight) == pytest.approx(1.0)
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"weight has shape \[8, 12\]; the map needs \[12, 8\]"):
        layer.set_dense(weight.T)
    with pytest.raises(ValueError, match=r"rank is 9, of weights \[12, 8\]"):
        LowRankLinear(8, 12, 9).set_dense(weight)
    smaller = LowRankLinear(8, 12, 3)
    kept = smaller.set_dense(weight)
    singular = torch.linalg.svdvals(weight.double())
    error = float((weight - smaller.dense_weight()).square().sum())
    assert error == pytest.approx(float(singular[3:].square().sum()), rel=1e-5)
    assert kept == pytest.approx(1 - error / float(weight.square().sum()), rel=1e-5)


@pytest.mark.parametrize("init", ["gpt2", "xavier", "matched"])
@pytest.mark.parametrize("factorised", ["qkv", "qkvo", "vo"])
def test_a_new_model_of_transformers_begins_like_one_of_the_trainer(init: Any, factorised: str) -> None:
    """Every weight's standard deviation, by the trainer's own table."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=96,
        num_heads=4,
        vocab_size=500,
        vocab_padding_multiple=1,
        max_positions=64,
        attention_rank=48,
        factorised_projections=tuple(factorised),
        attention_init=init,
    )
    torch.manual_seed(3)
    made = MlraForCausalLM(
        MlraConfig(
            vocab_size=500,
            max_position_embeddings=64,
            num_hidden_layers=2,
            hidden_size=96,
            num_attention_heads=4,
            attention_rank=48,
            factorised_projections=tuple(factorised),
            attention_init=init,
        )
    )
    weights = dict(made.model.named_parameters())
    table = ParameterTable(model)
    assert weights.keys() == set(table)
    for name, info in table.items():
        if info.kind not in ("bias", "norm"):
            # At least 4,608 elements: the standard error is 1 %.
            assert float(weights[name].detach().std()) == pytest.approx(initial_std(model, info), rel=0.06), name
    assert factor_stds(96, 96, 48, init, 0.02)[0] == initial_std(model, table["blocks.0.attention.v.down.weight"])
