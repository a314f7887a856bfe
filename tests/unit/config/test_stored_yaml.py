"""Configurations of earlier versions: every old field gives the updates that it gave then."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from mlra_scale.config import Config, ConfigError, load_config, preset, yaml_text
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import update_rules

WRITTEN = Path(__file__).resolve().parents[2] / "fixtures" / "written_by_3a017c2"


def stored(version: int | None, **optim: object) -> str:
    """A stored configuration of a version, whose optim section has more fields."""
    values = preset("debug").to_dict()
    del values["optim"]["rules"]
    values["optim"] |= optim
    return yaml_text.dump(values if version is None else {"version": version, **values})


def decays(config: Config) -> Mapping[str, set[float]]:
    """The weight decays of every kind of parameter."""
    table, found = ParameterTable(config.model), dict[str, set[float]]()
    for name, rule in update_rules(config.model, config.optim).items():
        assert (rule.optimizer, rule.lr_factor, rule.eps) == ("adamw", 1.0, config.optim.eps)
        found.setdefault(table[name].kind, set()).add(rule.weight_decay)
    return found


@pytest.mark.parametrize("version", [None, 2, 3])
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("embedding", [True, False])
def test_version_3_says_with_two_fields_what_decays(version: int | None, factors: bool, embedding: bool) -> None:
    config = Config.from_yaml(stored(version, decay_factors=factors, decay_embedding=embedding, weight_decay=0.3))
    assert decays(config) == {
        "matrix": {0.3},
        "factor": {0.3 if factors else 0.0},
        "embedding": {0.3 if embedding else 0.0},
        "positions": {0.3 if embedding else 0.0},
        "bias": {0.0},
        "norm": {0.0},
    }
    assert len(config.optim.rules) == (not factors) + 2 * (not embedding)
    assert Config.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize("attention", ["mlra", "dense"])
def test_a_dense_model_has_no_factors_whose_decay_could_be_off(attention: str) -> None:
    """In version 3 the field was allowed for every model: a rule that matches nothing would be an error."""
    values = yaml_text.load(stored(3, decay_factors=False))
    values["model"]["attention"] = attention
    config = Config.from_yaml(yaml_text.dump(values))
    assert decays(config).get("factor", {0.0}) == {0.0}
    assert len(config.optim.rules) == (attention == "mlra")


@pytest.mark.parametrize("version", ["", "version: 3\n"])
def test_whether_a_model_is_dense_is_known_when_all_sources_are_merged(tmp_path: Path, version: str) -> None:
    """`decay_factors: false` has no effect in a dense model, and in a model with factors whatever the file says."""
    file = tmp_path / "c.yaml"
    file.write_text(version + "optim: {decay_factors: false, decay_embedding: false}\n", encoding="utf-8")
    for preset_name, override in (("debug", "model.attention=dense"), ("gpt2", "train.seed=1")):
        config = load_config(preset_name, file, overrides=[override])
        assert [rule.kind for rule in config.optim.rules] == ["embedding", "positions"]
        assert decays(config)["embedding"] == {0.0}
    file.write_text(
        version + "preset: debug\nmodel: {attention: dense}\noptim: {decay_factors: false}\n", encoding="utf-8"
    )
    config = load_config(config_file=file, overrides=["model.attention=mlra"])
    assert decays(config)["factor"] == {0.0}


def test_a_rule_for_factors_that_a_person_wrote_is_an_error_in_a_dense_model(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: debug\noptim: {rules: [{kind: factor, weight_decay: 0}]}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no parameter of this kind"):
        decays(load_config(config_file=file, overrides=["model.attention=dense"]))


def test_a_file_of_this_version_cannot_have_the_old_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(stored(4, decay_embedding=False))
    (problem,) = caught.value.problems
    assert problem.field == "optim.decay_embedding" and "was replaced by optim.rules" in problem.remedy


def test_wrong_old_fields_are_left_for_the_schema_to_refuse() -> None:
    for values in ({"decay_factors": "no"}, {"decay_factors": None}):
        with pytest.raises(ConfigError, match=r"optim\.decay_factors = .*: was replaced by optim\.rules"):
            Config.from_yaml(stored(3, **values))
    with pytest.raises(ConfigError, match=r"optim = 3: must be a mapping"):
        Config.from_yaml("version: 3\noptim: 3\n")


@pytest.mark.parametrize("path", sorted(WRITTEN.rglob("config.yaml")), ids=lambda path: str(path.relative_to(WRITTEN)))
def test_configurations_of_an_early_commit_are_read(path: Path) -> None:
    config = Config.from_yaml(path.read_text(encoding="utf-8"))
    assert (config.optim.name, config.optim.rules, config.model.depth_rule) == ("adamw", (), "none")
    assert {kind for kind, values in decays(config).items() if values == {config.optim.weight_decay}} == {
        *("matrix", "factor", "embedding", "positions"),
    }


def test_a_file_of_a_person_may_have_the_old_fields_without_a_version(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: debug\noptim: {decay_embedding: false}\n", encoding="utf-8")
    assert decays(load_config(config_file=file))["embedding"] == {0.0}
