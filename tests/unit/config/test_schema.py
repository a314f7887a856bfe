"""The schema: what is in it, what it refuses, and that it survives being written down."""

import pytest
from pydantic import BaseModel, ValidationError

from mlra_scale.config import Config, ConfigError, ModelConfig, OptimConfig, ParameterRule, preset
from mlra_scale.config.problems import model_at


def debug_with(section: str, **fields: object) -> Config:
    values = preset("debug").to_dict()
    values[section] |= fields
    return Config.from_dict(values)


def test_every_section_and_field_has_a_description() -> None:
    """docs/configuration.md, which a test compares with the schema, shows a new, renamed or lost field in a diff."""
    models: list[type[BaseModel]] = [Config]
    models += filter(None, (model_at(Config, [name]) for name in Config.model_fields))
    assert len(models) == 18
    for model in models:
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description and field.description.endswith((".", ")")), f"{model.__name__}.{name}"


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        preset("debug").train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "field", "value", "remedy"),
    [
        ("train", "steps", "8", "must be an integer, not text"),
        ("train", "steps", 8.0, "must be an integer, not a fraction"),
        ("train", "steps", True, "must be an integer, not true/false"),
        ("train", "steps", None, "must be an integer, not null"),
        ("train", "steps", 0, "must be >= 1"),
        ("optim", "lr", "1e-3", "must be a number, not text"),
        ("optim", "lr", True, "must be a number, not true/false"),
        ("optim", "lr", "auto", "must be a number, not the text 'auto'"),
        ("optim", "lr", 0, "must be > 0"),
        ("optim", "lr", float("inf"), "must be a finite number"),
        ("optim", "betas", [0.9], "has too few values"),
        ("optim", "betas", [0.9, 0.95, 0.99], "has 3 values where 2 belong"),
        ("optim", "betas", 0.9, "must be a list, not a fraction"),
        ("optim", "nesterov", "yes", "must be true or false, not text"),
        ("optim", "decay_factors", True, "was replaced by optim.rules; leave true out, and instead of false write"),
        (
            "optim",
            "decay_embedding",
            False,
            "write optim.rules=[{kind: embedding, weight_decay: 0}, {kind: positions, ",
        ),
        ("optim", "rules", {"kind": "factor"}, "must be a list, not a mapping"),
        ("optim", "newton_schulz_coefficients", [1.5, -0.5], "has too few values"),
        ("model", "attention", "mrla", "must be one of mlra, dense; did you mean 'mlra'?"),
        ("wandb", "mode", "off", "must be one of auto, online, offline, disabled; did you mean 'disabled'?"),
        ("parallel", "activation_checkpointing", False, "must be one of none, selective, block; did you mean 'none'?"),
        ("model", "factorised_projections", ["q", "q"], "names a projection twice"),
        ("model", "attention_rank_ratio", 1.5, "must be <= 1"),
        ("model", "attention_dropout", 1.0, "must be < 1"),
        ("wandb", "name", 3, "must be text (quote it"),
        ("wandb", "project", "", "must not be empty"),
        ("data", "blend", ["a"], "must be a mapping, not a list"),
    ],
)
def test_wrong_values_are_refused_in_one_line(section: str, field: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        debug_with(section, **{field: value})
    (problem,) = caught.value.problems
    assert problem.field == f"{section}.{field}"
    assert remedy in problem.remedy
    assert str(problem) == str(caught.value) and "\n" not in str(problem)
    assert "pydantic" not in str(problem)


def test_a_tag_is_no_longer_than_wandb_takes() -> None:
    with pytest.raises(ConfigError, match=r"wandb\.tags\.1 = .*: has 65 characters where 64 are allowed"):
        debug_with("wandb", tags=["a" * 64, "b" * 65])


def test_wrong_items_are_named_by_their_place() -> None:
    with pytest.raises(ConfigError) as caught:
        debug_with("tev", quantiles=[0.5, 2.0])
    assert str(caught.value) == "tev.quantiles.1 = 2.0: must be <= 1.0"
    with pytest.raises(ConfigError) as caught:
        debug_with("data", blend={"a": 1, "b": -1})
    assert str(caught.value) == "data.blend.b = -1: must be > 0.0"


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (
            {"knid": "factor", "weight_decay": 0},
            "optim.rules.1.knid = 'factor': unknown key 'knid'; did you mean 'kind'?",
        ),
        ({"kind": "factors", "weight_decay": 0}, "optim.rules.1.kind = 'factors': must be one of embedding, positions"),
        ({"names": "", "weight_decay": 0}, "optim.rules.1.names = '': must not be empty"),
        ({"weight_decay": 0}, "optim.rules.1 = {'weight_decay': 0}: must name its parameters by names or by kind"),
        ({"names": "*", "kind": "factor", "lr_factor": 2}, "must name its parameters by names or by kind, and by one"),
        (
            {"kind": "factor"},
            "optim.rules.1 = {'kind': 'factor'}: changes nothing; give lr_factor, weight_decay or opt",
        ),
        ({"kind": "factor", "lr_factor": -1}, "optim.rules.1.lr_factor = -1: must be >= 0"),
        ({"kind": "factor", "optimizer": "adam"}, "did you mean 'adamw'?"),
        ("factor", "optim.rules.1 = 'factor': must be a mapping, not text"),
    ],
)
def test_a_wrong_rule_is_named_by_its_place(rule: object, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        debug_with("optim", rules=[{"kind": "norm", "lr_factor": 2}, rule])
    assert problem in str(caught.value) and len(caught.value.problems) == 1


def test_models_below_the_configuration_are_found_by_their_path() -> None:
    assert model_at(Config, ["optim"]) is OptimConfig and model_at(Config, ["optim", "rules", 1]) is ParameterRule
    for path in (["optim", "rules"], ["optim", "betas", 0], ["optim", "lr", "x"], ["optim", "rules", 1, "kind"], ["x"]):
        assert model_at(Config, path) is None, path


def test_integers_are_numbers_and_lists_are_tuples() -> None:
    config = debug_with("optim", weight_decay=0, betas=[0, 0.5])
    assert config.optim.weight_decay == 0.0
    assert config.optim.betas == (0.0, 0.5)


def test_factorised_projections_have_one_order() -> None:
    assert debug_with("model", factorised_projections=["o", "q"]).model.factorised_projections == ("q", "o")


def test_derived_sizes() -> None:
    model = ModelConfig(vocab_size=50257, num_layers=2, hidden_size=1024, num_heads=16)
    assert (model.head_dim, model.rank, model.ffn_size, model.padded_vocab_size) == (64, 512, 4096, 50304)
    assert model.base_std == 0.02
    assert [model.is_factorised(name) for name in "qkvo"] == [True, True, True, False]
    dense = model.model_copy(update={"attention": "dense"})
    assert not any(dense.is_factorised(name) for name in "qkvo")
    thin = model.model_copy(update={"hidden_size": 192, "num_heads": 3, "init_width_rule": "inverse_sqrt_width"})
    assert thin.base_std == pytest.approx(0.04)
    small = model.model_copy(update={"init_width_rule": "small"})
    assert small.base_std == pytest.approx((2 / (5 * 1024)) ** 0.5)
    assert model.model_copy(update={"attention_rank": 7}).rank == 7
    assert model.model_copy(update={"attention_rank_ratio": 1e-9}).rank == 1
    assert model.model_copy(update={"vocab_size": 256}).padded_vocab_size == 256


@pytest.mark.parametrize(("num_layers", "factor"), [(24, 2.0), (48, 1.0), (96, 0.5)])
def test_completep_scales_branches_by_depth_and_leaves_the_depth_scaled_init_out(
    num_layers: int, factor: float
) -> None:
    model = debug_with("model", depth_rule="completep", num_layers=num_layers).model
    assert (model.branch_factor, model.residual_scale) == (factor, 1.0)
    other = debug_with("model", num_layers=num_layers).model
    assert other.branch_factor == 1.0 and other.residual_scale == pytest.approx((2 * num_layers) ** -0.5)


@pytest.mark.parametrize(
    ("layer_norm_scaling", "depth_scaled_init", "is_scaled"),
    [(False, None, True), (True, None, False), (False, False, False), (True, True, True)],
)
def test_layer_norm_scaling_leaves_the_depth_scaled_init_out_unless_asked_for(
    layer_norm_scaling: bool, depth_scaled_init: bool | None, is_scaled: bool
) -> None:
    model = debug_with("model", layer_norm_scaling=layer_norm_scaling, depth_scaled_init=depth_scaled_init).model
    assert model.residual_scale == pytest.approx((2 * model.num_layers) ** -0.5 if is_scaled else 1.0)
    assert model.norm_factor(0) == 1.0
    assert model.norm_factor(3) == (0.5 if layer_norm_scaling else 1.0)


def test_factor_of_embeddings() -> None:
    assert debug_with("model").model.embedding_factor == 1.0
    model = debug_with("model", embedding_scale="sqrt_width").model
    assert model.embedding_factor == pytest.approx(model.hidden_size**0.5)
