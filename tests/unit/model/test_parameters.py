"""The parameter table and the initialization table."""

import math
from typing import Any, Literal

import pytest
import torch

from mlra_scale.config import ModelConfig
from mlra_scale.model.initialization import initial_std
from mlra_scale.model.parameters import ParameterTable
from tests.support.layouts import initial_state

SHAPE: dict[str, Any] = {"num_layers": 3, "hidden_size": 256, "num_heads": 4, "vocab_size": 300, "max_positions": 32}


def test_local_shapes_split_the_sharded_dimension_only() -> None:
    table = ParameterTable(ModelConfig(**SHAPE))
    assert table["blocks.1.attention.q.up.weight"].local_shape(4) == (64, 128)
    assert table["blocks.1.attention.q.down.weight"].local_shape(4) == (128, 256)
    assert table["blocks.1.attention.o.weight"].local_shape(4) == (256, 64)
    assert table["blocks.1.mlp.fc_out.weight"].local_shape(2) == (256, 512)
    assert table["embedding.weight"].local_shape(2) == (192, 256)


def measured(model: ModelConfig) -> dict[str, float]:
    return {name: tensor.std().item() for name, tensor in initial_state(model, 11).items() if tensor.dim() == 2}


@pytest.mark.parametrize("scheme", ["gpt2", "xavier", "matched"])
def test_measured_stds_are_those_of_the_table(scheme: Literal["gpt2", "xavier", "matched"]) -> None:
    model = ModelConfig(**SHAPE, attention_init=scheme, factorised_projections=("q", "k", "v", "o"))
    table, stds = ParameterTable(model), measured(model)
    for name, std in stds.items():
        if name != "embedding.weight":
            assert std == pytest.approx(initial_std(model, table[name]), rel=0.03), name
    # GPT-2's depth scaling sits on the up factor of o alone, and on fc_out.
    up, down = (
        initial_std(model, table["blocks.0.attention.o.up.weight"]),
        initial_std(model, table["blocks.0.attention.o.down.weight"]),
    )
    assert up == pytest.approx(down / math.sqrt(2 * model.num_layers))


def test_padded_rows_biases_and_norms() -> None:
    state = initial_state(ModelConfig(**SHAPE), 1)
    assert state["embedding.weight"].shape == (384, 256)
    assert not state["embedding.weight"][300:].any()
    assert state["embedding.weight"][:300].all(dim=1).any()
    assert not state["blocks.0.attention.q.up.bias"].any()
    assert torch.equal(state["final_norm.weight"], torch.ones(256))
