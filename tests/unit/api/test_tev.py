"""`mlra_scale.tev`: which matrix of a model it measures, and that it equals numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import mlra_scale
from mlra_scale.api.tev import embedding_of, log_values
from tests.support.gpt2_folders import random_gpt2
from tests.unit.stability.test_tev import check, random_matrix


class Small(nn.Module):
    """A language model of nobody's library: the head comes first and is tied, and positions are an embedding too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 40, bias=False)
        self.token_embedding = nn.Embedding(40, 16)
        self.positions = nn.Embedding(8, 16)
        self.head.weight = self.token_embedding.weight


def numpy_of(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().double().numpy()


@pytest.mark.parametrize("kind", ["numpy", "tensor", "parameter", "list"])
def test_a_matrix_equals_numpy(kind: str) -> None:
    matrix = random_matrix(61, 24, mean=0.5)
    tensor = torch.from_numpy(matrix)
    given = {"numpy": matrix, "tensor": tensor, "parameter": nn.Parameter(tensor), "list": matrix.tolist()}[kind]
    check(mlra_scale.tev(given, extremes=3), matrix, extremes=3)
    check(mlra_scale.tev(given, num_tokens=50), matrix[:50])


def test_models_of_transformers_name_their_embedding_themselves() -> None:
    model = random_gpt2()
    expected = numpy_of(model.transformer.wte.weight)
    check(mlra_scale.tev(model), expected)
    check(mlra_scale.tev(model.transformer), expected)
    wrapped = nn.Module()
    wrapped.module = model
    check(mlra_scale.tev(wrapped), expected)


def test_padded_rows_of_a_model_of_transformers_are_left_out() -> None:
    model = random_gpt2()
    model.resize_token_embeddings(model.config.vocab_size, pad_to_multiple_of=128)
    rows, real = len(model.transformer.wte.weight), model.config.vocab_size - 5
    model.config.vocab_size = real
    check(mlra_scale.tev(model), numpy_of(model.transformer.wte.weight)[:real])
    check(mlra_scale.tev(model, num_tokens=rows), numpy_of(model.transformer.wte.weight))
    # The size of the vocabulary says nothing of another matrix that is named.
    model.config.vocab_size = 5
    check(mlra_scale.tev(model, embedding="wpe"), numpy_of(model.transformer.wpe.weight))


def test_any_model_by_the_usual_names() -> None:
    model = Small()
    assert embedding_of(model) is model.token_embedding.weight
    check(mlra_scale.tev(model), numpy_of(model.token_embedding.weight))


def test_any_model_by_its_only_embedding() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))
    assert embedding_of(model) is model[0].weight
    assert embedding_of(nn.Embedding(30, 8)).shape == (30, 8)


@pytest.mark.parametrize("name", ["positions", "positions.weight", "inner.positions", "inner.positions.weight"])
def test_a_name_or_its_end_chooses(name: str) -> None:
    outer = nn.Module()
    outer.inner = Small()
    assert embedding_of(outer, name) is outer.inner.positions.weight


def test_what_cannot_be_found_is_an_error_that_lists_what_there_is() -> None:
    several = nn.ModuleDict({"words": nn.Embedding(9, 4), "places": nn.Embedding(9, 4)})
    with pytest.raises(ValueError, match=r"embedding=\.\.\.; found: words\.weight, places\.weight"):
        mlra_scale.tev(several)
    with pytest.raises(ValueError, match="found: none"):
        mlra_scale.tev(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'lower' names none among the parameters: places\.weight, words\.weight"):
        mlra_scale.tev(several, embedding="lower")
    both = nn.ModuleDict({"a": Small(), "b": Small()})
    with pytest.raises(ValueError, match=r"names a\.positions\.weight, b\.positions\.weight among"):
        mlra_scale.tev(both, embedding="positions")
    with pytest.raises(ValueError, match=r"found: a\.token_embedding\.weight, b\.token_embedding\.weight"):
        mlra_scale.tev(both)


def test_embeddings_that_share_or_compute_their_weight() -> None:
    shared = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 4)})
    shared["b"].weight = shared["a"].weight
    assert mlra_scale.tev(shared) == mlra_scale.tev(shared["a"].weight)
    computed = nn.utils.parametrizations.weight_norm(nn.Embedding(9, 4))
    assert mlra_scale.tev(computed) == mlra_scale.tev(computed.weight)


def test_arrays_of_any_layout() -> None:
    matrix = np.random.default_rng(3).normal(size=(9, 4))
    expected = mlra_scale.tev(matrix)
    read_only = matrix.copy()
    read_only.flags.writeable = False
    for same in (
        matrix[::-1][::-1],
        matrix.astype(">f8"),
        matrix.astype(np.longdouble),
        read_only,
        np.asfortranarray(matrix),
    ):
        assert mlra_scale.tev(same) == expected


def test_tokens_that_are_not_finite_are_the_highest() -> None:
    matrix = np.random.default_rng(3).normal(size=(9, 4))
    matrix[5, 2] = np.nan
    (token, value), _ = mlra_scale.tev(matrix, extremes=2).highest
    assert token == 5 and np.isnan(value)


def test_what_is_no_whole_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="FSDP 1"):
        mlra_scale.tev(torch.ones(30))
    with pytest.raises(ValueError, match="int64"):
        mlra_scale.tev(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="this is a matrix"):
        mlra_scale.tev(torch.ones(3, 3), embedding="wte")
    for number in (0, 4, 2.5):
        with pytest.raises(ValueError, match=rf"number of real tokens is {number}; use 1 to 3"):
            mlra_scale.tev(torch.ones(3, 3), num_tokens=number)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quantiles is \[0.5, 2.0\]; use probabilities"):
        mlra_scale.tev(torch.ones(3, 3), quantiles=(0.5, 2.0))
    with pytest.raises(ValueError, match="extremes is -1; use the number"):
        mlra_scale.tev(torch.ones(3, 3), extremes=-1)
    for nothing in ("gpt2", None, 1j):
        with pytest.raises(ValueError, match="it is no model and no matrix of real numbers, but"):
            mlra_scale.tev(nothing)  # type: ignore[arg-type]
    cut = nn.Embedding(6, 3)
    cut.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Megatron"):
        mlra_scale.tev(cut)


def test_values_for_a_logger_are_flat_numbers() -> None:
    statistics = mlra_scale.tev(random_matrix(20, 8), quantiles=(0.05, 0.5))
    values = log_values(statistics)
    assert values["tev_mean"] == statistics.mean and values["tev_quantiles/0.05"] == statistics.quantiles[0.05]
    names = {"tev_mean", "tev_std", "tev_quantiles/0.05", "tev_quantiles/0.5", "mean_embedding_norm", "mean_row_rms"}
    assert values.keys() == names, "those that the trainer's loggers use"
    assert all(type(value) is float for value in values.values())
