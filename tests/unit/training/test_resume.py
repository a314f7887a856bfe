from pathlib import Path

import pytest

from mlra_scale.config import ConfigError, load_config, preset
from mlra_scale.training.resume import Origin, changed_data, changed_fields, changed_layout, read_origin

ORIGIN = Origin(step=10, world_size=4, data_parallel=2, data_fingerprints={"data.path": "a" * 64})


def changes(tmp_path: Path, was: list[str], now: list[str]) -> dict[str, str]:
    """field -> remedy of everything that a run of `was` refuses when it is resumed as `now`."""
    stored = tmp_path / "config.yaml"
    stored.write_text(load_config("debug", overrides=was).to_yaml())
    return {item.field: item.remedy for item in changed_fields(load_config("debug", overrides=now), stored)}


def test_only_some_fields_may_change(tmp_path: Path) -> None:
    allowed = ["train.steps=40", "optim.lr=1e-4", "tev.every=1", "evaluation.every=3", "checkpoint.every=2"]
    allowed += ["optim.weight_decay=0.2", "optim.betas=[0.8, 0.9]", "optim.eps=1e-6", "optim.schedule=constant"]
    assert changes(tmp_path, [], [*allowed, "train.log_every=1", "data.path=moved"]) == {}
    refused = changes(tmp_path, [], ["model.num_layers=5", "train.seed=7", "data.seed=8", "parallel.tensor=2"])
    assert list(refused) == ["data.seed", "model.num_layers", "parallel.tensor", "train.seed"]
    assert "has 4" in refused["model.num_layers"]


@pytest.mark.parametrize("field", ["optim.decay_embedding", "optim.decay_factors"])
def test_what_groups_the_parameters_may_not_change(tmp_path: Path, field: str) -> None:
    assert list(changes(tmp_path, [], [f"{field}=false"])) == [field]


def test_a_blend_may_move_but_not_change_its_order_or_weights(tmp_path: Path) -> None:
    was = ["data.blend={a: 0.7, b: 0.3}"]
    assert changes(tmp_path, was, ["data.blend={c: 0.7, d: 0.3}"]) == {}
    for now in ("{b: 0.3, a: 0.7}", "{a: 0.6, b: 0.4}", "{a: 1.0}"):
        refused = changes(tmp_path, was, [f"data.blend={now}"])
        assert list(refused) == ["data.blend"] and "[0.7, 0.3], in this order" in refused["data.blend"]
    assert list(changes(tmp_path, was, ["data.path=a"])) == ["data.blend"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_divides_the_optimizer_over_as_many_ranks_as_before(stage: int) -> None:
    overrides = ["parallel.tensor=2", f'deepspeed.zero_optimization={{"stage": {stage}}}']
    config = load_config("debug", overrides=overrides)
    assert changed_layout(config, ORIGIN, 4) == []
    problems = changed_layout(config, ORIGIN, 2)
    assert len(problems) == (stage > 0)
    for problem in problems:
        assert problem.value == 2 and "start 4 ranks" in problem.remedy and f"stage {stage}" in problem.remedy


def test_the_bf16_pipeline_engine_divides_the_optimizer_without_zero() -> None:
    overrides = ["parallel.tensor=2", "train.precision=bf16"]
    assert changed_layout(load_config("debug", overrides=overrides), ORIGIN, 2) == []
    (problem,) = changed_layout(load_config("debug", overrides=[*overrides, "parallel.engine=pipeline"]), ORIGIN, 2)
    assert "bf16 pipeline engine" in problem.remedy


def test_other_data_are_named() -> None:
    assert changed_data({"data.path": "a" * 64}, ORIGIN) == []
    (problem,) = changed_data({"data.path": "b" * 64}, ORIGIN)
    assert problem.field == "data.path" and "a" * 16 in problem.remedy and "b" * 16 in problem.value
    (problem,) = changed_data({"data.path": "a" * 64, "data.validation_path": "c"}, ORIGIN)
    assert problem.field == "data.validation_path" and "leave it out" in problem.remedy
    with_validation = Origin(1, 1, 1, {**ORIGIN.data_fingerprints, "data.validation_path": "c"})
    (problem,) = changed_data(ORIGIN.data_fingerprints, with_validation)
    assert problem.field == "data.validation_path" and "name them" in problem.remedy


def test_the_origin_is_read_back_and_damage_is_told(tmp_path: Path) -> None:
    ORIGIN.write(tmp_path)
    assert read_origin(tmp_path) == ORIGIN
    for damage in ("", "[]", "{}", '{"step": 1}'):
        (tmp_path / "origin.json").write_text(damage)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_origin(tmp_path)


def test_an_unreadable_stored_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: [")
    (problem,) = changed_fields(preset("debug"), tmp_path / "config.yaml")
    assert "cannot be read" in problem.remedy
