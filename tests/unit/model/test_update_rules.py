"""Which parameters a rule is for, what it changes, and what is refused."""

from typing import Any

import pytest

from mlra_scale.config import Config, ConfigError, load_config
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import UpdateRule, matches, other_factor, update_rules


def config_of(*overrides: str) -> Config:
    """The debug preset: 4 blocks of width 64 and rank 32 (q, k, v), a vocabulary of 512."""
    return load_config("debug", overrides=list(overrides))


def rules_of(*overrides: str) -> dict[str, UpdateRule]:
    config = config_of(*overrides)
    return update_rules(config.model, config.optim)


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        rules_of(*overrides)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_adamw_updates_everything_alike_but_for_the_decay_of_biases_and_norms() -> None:
    table = ParameterTable(config_of().model)
    for name, rule in rules_of().items():
        decay = 0.0 if table[name].kind in ("bias", "norm") else 0.1
        assert rule == UpdateRule("adamw", 1.0, decay, 1e-8), name


@pytest.mark.parametrize("name", ["muon", "spectron"])
def test_matrices_of_blocks_go_to_the_named_optimizer_and_all_else_stays(name: str) -> None:
    config = config_of(f"optim.name={name}", "model.qk_norm=true", "model.sigma_reparam=true")
    table = ParameterTable(config.model)
    for parameter, rule in update_rules(config.model, config.optim).items():
        kind = table[parameter].kind
        # Spectron is for the factors of a low-rank map; other matrices are updated as Muon does.
        expected = {"factor": name, "matrix": "muon"}.get(kind, "adamw")
        assert rule.optimizer == expected, parameter
        assert len(table[parameter].shape) == 2 or expected == "adamw"


def test_updates_are_scaled_by_the_larger_side_of_a_matrix_and_spectrons_by_that_of_the_product() -> None:
    name = "blocks.0.attention.q.up.weight"
    shapes = ("model.factorised_projections=[q,o]", "model.attention_rank=8", "model.ffn_hidden_size=100")
    muon, spectron = (rules_of(f"optim.name={optimizer}", *shapes) for optimizer in ("muon", "spectron"))
    assert muon["blocks.0.mlp.fc_in.weight"].scale == pytest.approx(0.2 * 10)
    assert muon[name].scale == muon[other_factor(name)].scale == pytest.approx(0.2 * 8)
    wide = rules_of("optim.name=muon", "model.attention_rank=64", "model.hidden_size=64")
    assert wide[name].scale == pytest.approx(0.2 * 8)
    for projection in ("q", "o"):
        for factor in ("up", "down"):
            assert spectron[f"blocks.1.attention.{projection}.{factor}.weight"].scale == pytest.approx(0.2 * 8)
    assert spectron["blocks.0.mlp.fc_out.weight"] == muon["blocks.0.mlp.fc_out.weight"]
    assert {rule.scale for rule in muon.values() if rule.is_adamw} == {1.0}
    for optimizer in ("muon", "spectron"):
        unscaled = rules_of(f"optim.name={optimizer}", "optim.matrix_scale=none", *shapes)
        assert {rule.scale for rule in unscaled.values()} == {1.0}
        assert sum(not rule.is_adamw for rule in unscaled.values()) == 4 * 8


def test_names_and_kinds_select_parameters() -> None:
    config = config_of(
        "optim.rules=["
        "{kind: factor, lr_factor: 2}, {kind: embedding, lr_factor: 3}, {names: '*.bias', lr_factor: 4},"
        "{names: 'blocks.[13].mlp.fc_in.weight', lr_factor: 5}, {names: final_norm.weight, lr_factor: 6}]"
    )
    table = ParameterTable(config.model)
    found = [matches(rule, table) for rule in config.optim.rules]
    assert len(found[0]) == 4 * 3 * 2 and found[0][0] == "blocks.0.attention.q.down.weight"
    assert found[1] == ["embedding.weight"], "the kind positions is another one"
    assert all(name.endswith(".bias") for name in found[2]) and "final_norm.bias" in found[2]
    assert len(found[2]) == sum(name.endswith(".bias") for name in table)
    assert found[3] == ["blocks.1.mlp.fc_in.weight", "blocks.3.mlp.fc_in.weight"]
    assert found[4] == ["final_norm.weight"]
    rules = update_rules(config.model, config.optim)
    for factor, names in zip((2.0, 3.0, 4.0, 5.0, 6.0), found, strict=True):
        assert {rules[name].lr_factor for name in names} == {factor}
    assert {rule.lr_factor for name, rule in rules.items() if not any(name in each for each in found)} == {1.0}


def test_of_several_rules_the_last_one_that_gives_a_field_counts() -> None:
    rules = rules_of(
        "optim.rules=["
        "{names: 'blocks.*', weight_decay: 0.5, lr_factor: 2}, {kind: matrix, weight_decay: 0.25},"
        "{names: 'blocks.0.*.fc_in.weight', optimizer: muon, lr_factor: 0}]"
    )
    first, second = rules["blocks.0.mlp.fc_in.weight"], rules["blocks.1.mlp.fc_in.weight"]
    assert (first.optimizer, first.lr_factor, first.weight_decay) == ("muon", 0.0, 0.25)
    assert (second.optimizer, second.lr_factor, second.weight_decay) == ("adamw", 2.0, 0.25)
    assert rules["blocks.1.mlp_norm.bias"].weight_decay == 0.5, "a rule may let biases decay"
    assert rules["final_norm.weight"].weight_decay == 0.0


def test_a_rule_that_is_too_wide_for_its_optimizer_is_refused_with_a_name() -> None:
    text = problem("optim.rules=[{names: 'blocks.0.*', optimizer: muon}]")
    assert "optim.rules.0 = " in text and "blocks.0.attention_norm.weight is of kind norm" in text
    assert "muon is for kinds factor and matrix; use a narrower pattern" in text
    # adamw is for all.
    assert rules_of("optim.name=muon", "optim.rules=[{names: '*', optimizer: adamw}]") == rules_of()


@pytest.mark.parametrize(
    ("rule", "overrides", "remedy"),
    [
        (
            "names: blocks.9.*",
            (),
            "matches no parameter; of the first block, and outside the blocks, there are embedding.",
        ),
        (
            "kind: factor",
            ("model.attention=dense",),
            "the model has no parameter of this kind; its kinds are embedding, ",
        ),
        ("names: blocks.0.attention.q.weight", (), "blocks.0.attention.q.down.weight"),
        ("names: Embedding.weight", (), "there are embedding.weight, positions.weight"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_that_says_what_there_is(
    rule: str, overrides: tuple[str, ...], remedy: str
) -> None:
    text = problem(f"optim.rules=[{{kind: norm, lr_factor: 2}}, {{{rule}, weight_decay: 0}}]", *overrides)
    assert text.startswith("optim.rules.1 = {") and remedy in text


def test_spectron_has_both_factors_of_a_map_or_none() -> None:
    half = "optim.rules=[{names: 'blocks.*.attention.k.up.weight', optimizer: %s}]"
    for name, given in (("adamw", "spectron"), ("spectron", "muon"), ("spectron", "adamw")):
        text = problem(f"optim.name={name}", half % given)
        assert "spectron updates both factors of a map: give blocks.0.attention.k." in text
    rules = rules_of("optim.rules=[{names: 'blocks.*.attention.k.*.weight', optimizer: spectron}]")
    assert rules["blocks.2.attention.k.up.weight"].optimizer == "spectron"
    assert rules["blocks.2.attention.q.up.weight"].optimizer == "adamw"


def test_all_wrong_rules_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        rules_of("optim.rules=[{names: x, lr_factor: 2}, {kind: norm, optimizer: muon}, {names: y, lr_factor: 2}]")
    assert [each.field for each in caught.value.problems] == ["optim.rules.0", "optim.rules.1", "optim.rules.2"]


@pytest.mark.parametrize("options", [(), ("model.qk_norm=true", "model.sigma_reparam=true")])
def test_completep_changes_adams_epsilon_for_all_parameters_of_blocks_and_no_others(options: tuple[str, ...]) -> None:
    deep: tuple[Any, ...] = ("model.depth_rule=completep", "model.base_depth=2", "optim.eps=1e-6", *options)
    for name, rule in rules_of(*deep).items():
        expected = 5e-7 if name.startswith("blocks.") else 1e-6
        assert rule.eps == pytest.approx(expected, rel=1e-12), name
    assert {rule.eps for rule in rules_of(*deep, "model.depth_rule=none").values()} == {1e-6}
    plain = rules_of("optim.eps=1e-6", *options)
    for name, rule in rules_of(*deep).items():
        assert (rule.lr_factor, rule.weight_decay) == (plain[name].lr_factor, plain[name].weight_decay), name
