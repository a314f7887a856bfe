"""Each sum over tensor-parallel ranks that a replicated parameter needs is missed where it is left out.

The loss does not show such a defect: the test of every gradient does.
"""

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional

from mlra_scale.config import Config
from tests.distributed.oracle_runs import Options, Pools, assert_gradients, in_layout, oracle
from tests.distributed.steps import Record, train
from tests.support.layouts import Layout

SMALL: Options = {"model__num_layers": 3, "model__init_std": 0.2}
SPLIT: Options = {"parallel__sequence_parallel": True}
CASES: dict[str, tuple[Options, Options, str]] = {
    "latents": ({}, {}, r"attention\.q\.down\.weight"),
    "qk-norm": (SMALL | {"model__qk_norm": True}, {}, r"attention\.k_norm\.weight"),
    "sigma": (SMALL | {"model__sigma_reparam": True}, {}, r"fc_in\.gain"),
    "on_slice": (
        *({"model__num_layers": 3}, SPLIT),
        r"positions\.weight(.|\n)*attention_norm\.weight(.|\n)*mlp_norm\.bias(.|\n)*final_norm\.weight",
    ),
    "slice_linear": ({"model__num_layers": 3}, SPLIT, r"attention\.q\.down\.weight"),
    "bias": ({"model__num_layers": 3}, SPLIT, r"attention\.o\.bias(.|\n)*mlp\.fc_out\.bias"),
}
"""By defect: options of the model, of the layout, and the parameters whose gradient it spoils."""


def defects(name: str) -> list[tuple[Any, str, Any]]:
    """What a defect replaces: module, name in it, and its replacement without the sum."""
    from mlra_scale.model import embedding, linear, norm, tensor_parallel

    copy, leave = tensor_parallel.copy_to_tensor_parallel, tensor_parallel.leave_tensor_parallel
    found: dict[str, list[tuple[Any, str, Any]]] = {
        "latents": [(linear, "enter_tensor_parallel", lambda context, *tensors: list(tensors))],
        "qk-norm": [(norm, "copy_to_tensor_parallel", lambda context, *tensors: list(tensors))],
        # The scale is the only tensor of one element that is copied.
        "sigma": [
            (
                *(tensor_parallel, "copy_to_tensor_parallel"),
                lambda context, *tensors: copy(context, *tensors) if tensors[0].numel() > 1 else list(tensors),
            )
        ],
        "on_slice": [(module, "on_slice", lambda context, *values: list(values)) for module in (embedding, norm)],
        "slice_linear": [(linear, "slice_linear", lambda context, *values: functional.linear(*values))],
        "bias": [
            (
                *(tensor_parallel, "leave_tensor_parallel"),
                lambda context, partial_BSD, bias_D=None: leave(context, partial_BSD) + bias_D,
            )
        ],
    }
    return found[name]


def train_with_a_defect(
    rank: int, world_size: int, config: Config, weights: dict[str, torch.Tensor], name: str
) -> Record:
    with contextlib.ExitStack() as patches:
        for replaced in defects(name):
            patches.enter_context(mock.patch.object(*replaced))
        return train(rank, world_size, config, 1, weights)


@pytest.mark.slow_except("latents", "qk-norm", "sigma", "slice_linear")
@pytest.mark.parametrize("name", CASES)
def test_a_missing_reduction_is_caught(worker_pool: Pools, name: str) -> None:
    model, split, spoilt = CASES[name]
    config = in_layout(Layout(tensor=2), parallel__low_rank_plan="replicated", **split, **model)
    weights, expected = oracle(config, steps=3)
    records = worker_pool(2).run(train_with_a_defect, config, weights, name)
    np.testing.assert_allclose(records[0].losses, expected.losses[:1], rtol=1e-6)
    with pytest.raises(AssertionError, match=spoilt):
        assert_gradients(config, records, expected)
