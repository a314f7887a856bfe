"""Property tests: whatever the values, overrides set what they say and YAML reads back what it wrote."""

import json
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.config import Config, ConfigError, batch_plan, load_config, preset, yaml_text
from mlra_scale.model.validation import validate

# Everything that JSON knows, which is what the deepspeed section and a YAML document may hold.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
PRINTABLE = TEXT.filter(str.isprintable)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PRINTABLE
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PRINTABLE, inner, max_size=3), max_leaves=8
)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model.vocab_size": st.integers(2, 10**6),
    "model.attention_rank": st.none() | st.integers(1, 64),
    "model.attention_rank_ratio": st.floats(0.0, 1.0, exclude_min=True),
    "model.factorised_projections": st.lists(st.sampled_from("qkvo"), unique=True),
    "model.init_width_rule": st.sampled_from(["fixed", "inverse_sqrt_width"]),
    "data.path": st.none() | PRINTABLE.filter(bool),
    "data.blend": st.none() | st.dictionaries(PRINTABLE.filter(bool), st.floats(1e-300, 1e300), max_size=3),
    "data.reset_positions": st.booleans(),
    "data.seed": st.none() | st.integers(0, 2**63 - 1),
    "train.steps": st.integers(1, 10**12),
    "train.peak_tflops": st.none() | st.floats(1e-300, 1e300),
    "optim.lr": st.floats(5e-324, 10.0),
    "optim.eps": st.floats(5e-324, 1.0),
    "optim.betas": st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=2, max_size=2),
    "tev.quantiles": st.lists(st.floats(0.0, 1.0), max_size=4),
    "wandb.tags": st.lists(PRINTABLE.filter(bool), max_size=3),
    "wandb.name": st.none() | PRINTABLE.filter(bool),
    "deepspeed.zero_optimization.reduce_bucket_size": st.integers(1, 10**12) | st.just(5e8),
}


def plain(value: Any) -> Any:
    """Tuples as lists: YAML and JSON know lists only."""
    return json.loads(json.dumps(value))


def at(config: Config, path: str) -> Any:
    value: Any = config.to_dict()
    for part in path.split("."):
        value = value[part]
    return value


@settings(deadline=None)
@given(value=VALUES)
def test_yaml_reads_back_what_it_wrote(value: Any) -> None:
    document = yaml_text.dump({"x": value})
    loaded = yaml_text.load(document)
    assert loaded == {"x": value}
    assert json.dumps(loaded) == json.dumps({"x": value})  # types too: 1 == 1.0 == True
    assert document.isascii()


@settings(deadline=None, max_examples=200)
@given(data=st.data(), paths=st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=6))
def test_overrides_set_what_they_say_and_nothing_else(data: st.DataObject, paths: list[str]) -> None:
    wanted = {path: data.draw(FIELDS[path], label=path) for path in paths}
    # JSON is YAML, so a value can be written either way.
    as_json = data.draw(st.booleans(), label="as JSON")
    texts = [
        f"{path}={json.dumps(value) if as_json else yaml_text.dump(value).removesuffix(chr(10) + '...' + chr(10))}"
        for path, value in wanted.items()
    ]
    config = load_config("debug", overrides=texts)
    for path, value in wanted.items():
        found = at(config, path)
        if path == "model.factorised_projections":
            assert sorted(found) == sorted(value)
        else:
            assert found == plain(value)
    untouched = preset("debug").to_dict()
    resolved = config.to_dict()
    for section, fields in untouched.items():
        if section == "deepspeed" or not isinstance(fields, dict):
            continue
        for name, value in fields.items():
            is_derived = f"{section}.{name}" == "optim.warmup_steps" and "train.steps" in wanted
            if f"{section}.{name}" not in wanted and not is_derived:
                assert resolved[section][name] == value, (section, name)
    assert load_config("debug", overrides=texts[::-1]) == config
    assert Config.from_yaml(config.to_yaml()) == config


@settings(deadline=None)
@given(path=st.sampled_from(sorted(FIELDS)), value=VALUES)
def test_any_value_is_taken_or_refused_in_one_line(path: str, value: Any) -> None:
    try:
        config = load_config("debug", overrides=[f"{path}={json.dumps(value)}"])
    except ConfigError as error:
        for problem in error.problems:
            assert problem.field.startswith(path.split(".")[0])
            assert "\n" not in str(problem)
        return
    assert Config.from_yaml(config.to_yaml()) == config


@settings(deadline=None, max_examples=200)
@given(
    tensor=st.integers(1, 8),
    pipeline=st.integers(1, 8),
    world_size=st.integers(1, 64),
    micro=st.integers(1, 8),
    batch=st.integers(1, 64),
    stage=st.integers(0, 3),
)
def test_a_valid_layout_has_an_exact_batch(
    tensor: int, pipeline: int, world_size: int, micro: int, batch: int, stage: int
) -> None:
    values = preset("debug").to_dict()
    values["parallel"] |= {"tensor": tensor, "pipeline": pipeline}
    values["train"] |= {"micro_batch_size": micro, "global_batch_size": batch}
    values["deepspeed"] = {"zero_optimization": {"stage": stage}}
    config = Config.from_dict(values)
    fits = (
        tensor in (1, 2, 4)
        and pipeline <= 4
        and world_size % (tensor * pipeline) == 0
        and batch % (micro * world_size // (tensor * pipeline)) == 0
        and (pipeline == 1 or stage < 2)
    )
    try:
        validate(config, world_size)
    except ConfigError:
        assert not fits
        return
    assert fits
    plan = batch_plan(config, world_size)
    assert plan.tensor * plan.pipeline * plan.data == world_size
    assert plan.micro_batch_size * plan.accumulation_steps * plan.data == plan.global_batch_size == batch
    assert math.isclose(plan.tokens_per_step, batch * plan.sequence_length)
