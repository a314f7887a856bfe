"""The three classes of fields: what a resumed run takes, keeps and refuses."""

from typing import Any

import pytest

from mlra_scale.config import Config, Named, load_config, load_named_config
from mlra_scale.training.resume import (
    FREE,
    NAMED,
    RESETS_GUARD_STATISTICS,
    Change,
    ConfigComparison,
    History,
    compare,
    compare_model,
    flat,
    is_in,
    nested,
    with_watchers_of,
)
from mlra_scale.training.start.resume_choice import ResumePoint

WITH_DATA = ["data.path=d"]


def compared(was: list[str], now: list[str], file: frozenset[str] = frozenset()) -> ConfigComparison:
    """A run of `was`, resumed as `now`; fields of `file` come from the config file instead of the command line."""
    config, named = load_named_config("debug", overrides=[*WITH_DATA, *now])
    named = Named(named.on_command_line - file, file)
    return compare(config, named, load_config("debug", overrides=[*WITH_DATA, *was]))


def changes(comparison: ConfigComparison) -> dict[str, tuple[object, object]]:
    return {change.field: (change.was, change.now) for change in comparison.changes}


def test_every_field_is_in_one_class_at_most() -> None:
    fields = flat(load_config("debug").to_dict())
    assert not [name for name in fields if is_in(FREE, name) and is_in(NAMED, name)]
    for item in FREE + NAMED:
        assert [name for name in fields if is_in((item,), name)], f"{item} is no field"
    never = {name for name in fields if not is_in(FREE + NAMED, name)}
    for name in ("model.num_layers", "model.init_std", "train.seed", "data.seed", "train.sequence_length"):
        assert name in never
    assert "data.document_attention" in never and "model.layer_norm_eps" in never
    for option in (
        "qk_norm",
        "sigma_reparam",
        "layer_norm_scaling",
        "embedding_scale",
        "depth_scaled_init",
        "depth_rule",
    ):
        assert f"model.{option}" in never


def test_flat_and_nested_are_inverse() -> None:
    config = load_config("debug", overrides=["data.blend={a.b: 1, c: 2}", "deepspeed.zero_optimization.stage=1"])
    assert Config.from_dict(nested(flat(config.to_dict()))) == config


def test_free_fields_change_without_being_named() -> None:
    layout = ["parallel.tensor=2", 'deepspeed={"zero_optimization": {"stage": 3}}', "train.micro_batch_size=1"]
    result = compared([], layout)
    assert result.problems == []
    assert set(changes(result)) == {"parallel.tensor", "deepspeed", "train.micro_batch_size"}
    assert result.config.parallel.tensor == 2
    back = compared(layout, [])
    assert back.problems == [] and back.config.parallel.tensor == 1 and changes(back)["parallel.tensor"] == (2, 1)


def test_named_fields_are_taken_from_the_command_line() -> None:
    rules = "optim.rules=[{kind: factor, weight_decay: 0.0}]"
    now = ["train.steps=40", "optim.lr=1e-4", rules, "train.precision=bf16", "tev.every=1"]
    now += ["train.global_batch_size=16", "checkpoint.keep_last=5", "model.residual_dropout=0.1", "model.z_loss=1e-4"]
    result = compared([], now)
    assert result.problems == [] and len(result.changes) == len(now)
    assert changes(result)["train.steps"] == (20, 40) and str(result.changes[0]) == "model.residual_dropout: 0.0 -> 0.1"
    assert (result.config.train.steps, result.config.optim.rules[0].kind) == (40, "factor")
    assert str(Change("data.path", "\x1b[2J", "b")) == r"data.path: \x1b[2J -> b", "nothing that a terminal obeys"


def test_what_only_the_preset_says_is_kept_from_the_run() -> None:
    was = ["train.steps=40", "optim.lr=1e-4", "optim.warmup_steps=5", "train.precision=bf16", "checkpoint.every=3"]
    result = compared(was, [])
    assert result.problems == [] and result.changes == []
    assert result.config == load_config("debug", overrides=[*WITH_DATA, *was])
    longer = compared(was, ["train.steps=60"])
    assert changes(longer) == {"train.steps": (40, 60)} and longer.config.optim.warmup_steps == 5


def test_a_preset_does_not_change_who_watches_the_run() -> None:
    own = load_config("debug", overrides=["wandb.mode=disabled", "wandb.project=mine", "tensorboard.enabled=true"])
    for overrides, mode in (([], "disabled"), (["wandb.mode=online"], "online")):
        config, named = load_named_config("debug", overrides=[*WITH_DATA, "train.steps=9", *overrides])
        for each in (named, Named(frozenset(), named.on_command_line)):
            kept = with_watchers_of(own, config, each)
            assert (kept.wandb.mode, kept.wandb.project, kept.tensorboard.enabled) == (mode, "mine", True)
            assert kept.train == config.train and kept.data == config.data


def test_a_file_cannot_change_the_run_by_itself() -> None:
    file = frozenset({"optim.lr", "train.steps"})
    result = compared([], ["optim.lr=1e-4", "train.steps=40", "tev.every=1"], file)
    refused = {problem.field: problem.remedy for problem in result.problems}
    assert set(refused) == file
    assert "has 0.003" in refused["optim.lr"] and "on the command line: optim.lr=0.0001" in refused["optim.lr"]
    assert changes(result) == {"tev.every": (5, 1)}
    assert compared(["optim.lr=1e-4", "train.steps=40"], ["optim.lr=1e-4", "train.steps=40"], file).problems == []


def test_another_optimizer_has_to_be_named_on_the_command_line() -> None:
    rules = "optim.rules=[{kind: factor, optimizer: spectron}]"
    result = compared(["optim.name=muon"], ["optim.name=adamw", rules])
    assert result.problems == [] and result.config.optim.name == "adamw" and len(result.config.optim.rules) == 1
    assert changes(result)["optim.name"] == ("muon", "adamw")
    (problem,) = compared(["optim.name=muon"], [rules], frozenset({"optim.rules"})).problems
    assert problem.field == "optim.rules" and "on the command line: optim.rules=[" in problem.remedy
    (problem,) = compared(["optim.name=muon"], ["optim.name=spectron"], frozenset({"optim.name"})).problems
    assert "has muon; if the change is meant, name it on the command line: optim.name=spectron" in problem.remedy
    kept = compared(["optim.name=muon", rules], [])
    assert kept.changes == [] and kept.config.optim.name == "muon" and len(kept.config.optim.rules) == 1


def test_what_the_run_is_never_changes() -> None:
    now = ["model.num_layers=5", "train.seed=7", "data.seed=8", "model.attention_rank=8", "train.sequence_length=32"]
    for file in (frozenset(), frozenset({"model.num_layers", "train.seed"})):
        result = compared([], now, file)
        refused = {problem.field: problem.remedy for problem in result.problems}
        names = ["data.seed", "model.attention_rank", "model.num_layers", "train.seed", "train.sequence_length"]
        assert sorted(refused) == names, "all at once"
        assert refused["model.num_layers"] == "the run to be resumed has 4; leave it so, or start a new run"


def test_data_that_are_not_named_are_those_of_the_run() -> None:
    stored = load_config("debug", overrides=["data.blend={a: 1, b: 2}", "data.validation_path=v", "data.tokenizer=t"])
    result = compare(load_config("debug"), Named(), stored)
    assert result.problems == [] and result.changes == [] and result.config.data == stored.data


@pytest.mark.parametrize(
    ("was", "now", "file", "refused"),
    [
        ("data.path=a", ["data.path=b"], (), False),
        ("data.path=a", ["data.blend={a: 1, b: 1}"], (), False),
        ("data.path=a", ["data.blend={a: 1, b: 1}"], ("data.blend",), True),
        ("data.blend={a: 1, b: 1}", ["data.path=a"], (), True),
        ("data.blend={a: 1, b: 1}", ["data.path=a", "data.blend=null"], (), False),
        ("data.blend={a: 1, b: 1}", ["data.blend={c: 1, d: 1}"], ("data.blend",), False),
    ],
)
def test_another_mix_has_to_be_named(was: str, now: list[str], file: tuple[str, ...], refused: bool) -> None:
    """Whether the data are the same is for their fingerprints to say; here only whether somebody asked for others."""
    config, named = load_named_config("debug", overrides=now)
    named = Named(named.on_command_line - set(file), frozenset(file))
    result = compare(config, named, load_config("debug", overrides=[was]))
    assert [problem.field for problem in result.problems] == (["data.blend"] if refused else [])
    for problem in result.problems:
        assert "data.blend=" in problem.remedy
    if not refused:
        assert result.config.data == config.data


def test_weights_to_begin_with_need_the_same_architecture_only() -> None:
    stored = load_config("debug", overrides=["model.attention_rank=32", "model.ffn_hidden_size=256"]).model
    now = ["model.init_std=0.5", "model.residual_dropout=0.1", "model.z_loss=1", "model.vocab_padding_multiple=64"]
    assert compare_model(load_config("debug", overrides=now), stored) == [], "the same rank, written in another way"
    problems = compare_model(load_config("debug", overrides=["model.num_heads=2", "model.attention_rank=8"]), stored)
    assert [problem.field for problem in problems] == ["model.num_heads", "model.attention_rank"]
    dense = load_config("debug", overrides=["model.attention=dense"])
    same = load_config("debug", overrides=["model.attention=dense", "model.attention_rank=3"]).model
    assert compare_model(dense, same) == []
    assert "model.attention" in [problem.field for problem in compare_model(dense, stored)]
    # The base depth matters only where it is used.
    assert compare_model(load_config("debug", overrides=["model.base_depth=3"]), load_config("debug").model) == []
    deep = load_config("debug", overrides=["model.depth_rule=completep"])
    assert [each.field for each in compare_model(deep, load_config("debug").model)] == [
        "model.depth_rule",
        "model.base_depth",
    ]


def test_which_changes_reset_the_statistics_of_the_guard() -> None:
    for field in ("data.blend", "train.global_batch_size", "optim.lr", "data.path"):
        is_reset = ResumePoint(changes=(Change(field, None, 1),)).resets_guard_statistics
        assert is_reset == (field in ("data.blend", "train.global_batch_size")), field
    assert all(is_in(NAMED, name) for name in RESETS_GUARD_STATISTICS), "others never change"


LR, BATCH = Change("optim.lr", 1e-3, 3e-4), Change("train.global_batch_size", 8, 16)


def test_changes_follow_each_other_and_survive_a_checkpoint() -> None:
    history = History().followed_by([LR], 10).followed_by([], 15).followed_by([BATCH], 20)
    again = History.of({"history": history.to_dict()}, 25)
    assert again == history and again.changes == ((10, LR), (20, BATCH)) and again.known_from == 0
    # After a rollback the steps that are done again have the present settings.
    assert history.after_rollback_to(15).changes == ((10, LR), (15, BATCH))
    assert History().followed_by([LR], 0) == History(), "before the first step nothing changes"
    old = History.of({"progress": {"step": 7}}, 7).followed_by([LR], 7)
    assert old.known_from == 7 and old.changes == ((7, LR),), "an old checkpoint has none"


@pytest.mark.parametrize("stored", [[], {"changes": [{}]}, {"changes": 3}, {"changes": [], "known_from": "x"}])
def test_a_garbled_history_is_an_error(stored: Any) -> None:
    with pytest.raises(ValueError, match="not a history of changes"):
        History.of({"history": stored}, 3)
