"""The presets, and the parameter and operation counts against the table of all tensors."""

import pytest

from mlra_scale.config import Config, ConfigError, ModelConfig, preset, preset_names
from mlra_scale.config.presets import DEEP_LAYERS
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.validation import validate

ODD = ModelConfig(
    vocab_size=101,
    vocab_padding_multiple=1,
    max_positions=9,
    num_layers=3,
    hidden_size=12,
    num_heads=2,
    ffn_hidden_size=17,
    attention_rank=5,
    factorised_projections=("k", "o"),
)


def test_padding_and_pairing_do_not_count() -> None:
    padded = ODD.model_copy(update={"vocab_padding_multiple": 64})
    assert padded.padded_vocab_size == 128
    assert padded.num_parameters() == ODD.num_parameters()
    dense = ODD.model_copy(update={"attention": "dense"})
    assert dense.model_copy(update={"attention_rank": 1}).num_parameters() == dense.num_parameters()


@pytest.mark.parametrize("model", [ODD, ODD.model_copy(update={"attention": "dense"})], ids=["mlra", "dense"])
def test_operations_per_token(model: ModelConfig) -> None:
    """Multiply-adds of one forward pass over S tokens, product by product; backward costs twice as much again."""
    sequence, width = 8, model.hidden_size
    weights = [info for name, info in ParameterTable(model).items() if len(info.shape) == 2 and "positions" not in name]
    products = [sequence * info.numel() for info in weights]  # the embedding multiplies once, as the head
    scores_and_mix = [sequence * sequence * model.head_dim * model.num_heads] * 2 * model.num_layers
    forward = 2 * (sum(products) + sum(scores_and_mix))
    assert model.flops_per_token(sequence) == pytest.approx(3 * forward / sequence, rel=1e-12)
    assert width == model.head_dim * model.num_heads


@pytest.mark.parametrize("name", [*(f"{depth}l" for depth in DEEP_LAYERS), "72l-wide"])
def test_a_twin_differs_in_its_attention_only(name: str) -> None:
    mlra, dense = preset(f"gpt2-mlra-{name}"), preset(f"gpt2-{name}")
    assert mlra.model.attention == "mlra"
    assert dense.model.num_parameters() == mlra.model.num_parameters()
    assert mlra.model.model_copy(update={"attention": "dense"}) == dense.model
    assert dense.model_copy(update={"preset": mlra.preset, "model": mlra.model}) == mlra


def test_all_presets_have_one_rule_of_where_their_record_goes() -> None:
    assert {(preset(name).wandb.mode, preset(name).tensorboard.enabled) for name in preset_names()} == {("auto", False)}


def test_depth_is_the_only_dial_of_the_deep_family() -> None:
    first = preset(f"gpt2-mlra-{DEEP_LAYERS[0]}l")
    assert (first.model.hidden_size, first.model.num_heads) == (1024, 16)
    for depth in DEEP_LAYERS:
        config = preset(f"gpt2-mlra-{depth}l")
        assert config.model == first.model.model_copy(update={"num_layers": depth})
        assert depth * config.train.micro_batch_size <= 384 < 2 * depth * config.train.micro_batch_size
        same_but_micro_batch = {"micro_batch_size": first.train.micro_batch_size}
        assert config.train.model_copy(update=same_but_micro_batch) == first.train
        assert config.optim == first.optim


def test_the_wide_model_differs_from_the_deep_one_in_width_and_rate() -> None:
    deep, wide = preset("gpt2-mlra-72l"), preset("gpt2-mlra-72l-wide")
    assert wide.model == deep.model.model_copy(update={"hidden_size": 4096, "num_heads": 32})
    assert wide.train == deep.train.model_copy(update={"micro_batch_size": 1})
    assert wide.optim == deep.optim.model_copy(update={"lr": 1e-4})


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2s_are_as_large_as_those_that_were_published(name: str, number: int) -> None:
    assert preset(name).model.num_parameters() == number


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_back_equal(name: str) -> None:
    assert Config.from_yaml(preset(name).to_yaml()) == preset(name)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("world_size", [1, 8, 32])
def test_presets_are_valid_where_their_batch_fits(name: str, world_size: int) -> None:
    config = preset(name)
    if world_size * config.train.micro_batch_size > config.train.global_batch_size:
        with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
            validate(config, world_size)
    else:
        validate(config, world_size)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset; did you mean 'gpt2-mlra-72l'"):
        preset("gpt2-mrla-72l")
