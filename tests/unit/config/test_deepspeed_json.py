"""Whose keys are whose, against DeepSpeed's own classes; and what comes out is what DeepSpeed's own parser takes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.config import (
    Config,
    ConfigError,
    batch_plan,
    deepspeed_config,
    load_config,
    offload_optimizer,
    offload_param,
    preset,
    zero_stage,
)
from mlra_scale.config.deepspeed_json import OURS, REFUSED, TABLES, YOURS, check_deepspeed_keys
from mlra_scale.model.validation import validate

FILES = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


def remedies(values: dict[str, Any]) -> dict[str, str]:
    return {problem.field: problem.remedy for problem in check_deepspeed_keys(values)}


def nested(path: str, key: str, value: object) -> dict[str, Any]:
    """{"a": {"b": {key: value}}} for the path "a.b"."""
    result: dict[str, Any] = {key: value}
    for part in reversed(list(filter(None, path.split(".")))):
        result = {part: result}
    return result


def example(kind: str) -> object:
    return {"bool": True, "count": 5e8, "positive count": 5e8, "mapping": {}, "list": [], "0|1|2|3": 1}.get(
        kind, kind.split("|")[-1]
    )


ROWS = [(path, key, owner, note) for path, table in TABLES.items() for key, (owner, note) in table.items()]


@pytest.mark.parametrize(("path", "key", "owner", "note"), ROWS)
def test_every_row_of_the_table(path: str, key: str, owner: str, note: str) -> None:
    field = ".".join(filter(None, ("deepspeed", path, key)))
    if owner == YOURS:
        assert remedies(nested(path, key, example(note))) == {}
        assert "Hugging Face" in remedies(nested(path, key, "auto"))[field]
        assert remedies(nested(path, key, None))[field].startswith("must be ")
    else:
        found = remedies(nested(path, key, True))
        assert found == {
            field: {OURS: "does not belong among DeepSpeed's keys: ", REFUSED: "cannot be used: "}[owner] + note
        }


def test_a_remedy_that_names_a_field_names_a_real_one() -> None:
    sections = "|".join(name for name in Config.model_fields if name not in ("preset", "deepspeed"))
    named = {name for *_, note in ROWS for name in re.findall(rf"\b(?:{sections})\.[a-z_]+", note)}
    values = preset("debug").to_dict()
    assert len(named) > 10
    for name in named - {"metrics.jsonl"}:
        section, field = name.split(".")
        assert field in values[section], name


# A value, where it stands, and what is wrong with it.
WRONG = """
{}: zero_optimisation: unknown to DeepSpeed; did you mean 'zero_optimization'?
1: zero_optimization.stge: unknown to DeepSpeed; did you mean 'stage'?
4: zero_optimization.stage: must be one of 0, 1, 2, 3
"3": zero_optimization.stage: must be one of 0, 1, 2, 3
true: zero_optimization.stage: must be one of 0, 1, 2, 3
1.0: zero_optimization.stage: must be one of 0, 1, 2, 3
true: zero_optimization: must be a mapping (in JSON: { ... })
1: zero_optimization.overlap_comm: must be true or false
0.5: zero_optimization.reduce_bucket_size: must be a whole number >= 1
"nvme": zero_optimization.offload_optimizer.device: must be one of none, cpu
"float": communication_data_type: must be one of fp32, bf16, fp16
"all": comms_logger.prof_ops: must be a list (in JSON: [ ... ])
"""


@pytest.mark.parametrize("line", WRONG.strip().split("\n"))
def test_wrong_keys_and_values(line: str) -> None:
    value, field, remedy = line.split(": ", 2)
    section, _, key = field.rpartition(".")
    assert remedies(nested(section, key, json.loads(value))) == {f"deepspeed.{field}": remedy}


def test_the_tables_know_every_key_of_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import config as deepspeed_runtime
    from deepspeed.runtime.zero import config as zero_config
    from deepspeed.runtime.zero import offload_config

    classes = {
        "zero_optimization": zero_config.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "comms_logger": CommsLoggerConfig,
    }
    for path, model in classes.items():
        names = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
        assert names <= set(TABLES[path]), names - set(TABLES[path])
        yours = {key for key, (owner, _) in TABLES[path].items() if owner == YOURS}
        assert yours <= names, yours - names
    removed = set(deepspeed_runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert removed <= set(TABLES[""])
    assert set(deepspeed_runtime._REMOVED_ZERO_CONFIG_KEYS) <= set(TABLES["zero_optimization"])
    # What is said to be removed is what DeepSpeed says so of.
    for path, theirs in (("", removed), ("zero_optimization", set(deepspeed_runtime._REMOVED_ZERO_CONFIG_KEYS))):
        said = {key for key, (_, text) in TABLES[path].items() if text.startswith("DeepSpeed has removed it")}
        assert said == theirs, said ^ theirs
    # Every name that DeepSpeed's own top-level getters look up.
    source = Path(deepspeed_runtime.__file__).read_text(encoding="utf-8")
    constants = vars(deepspeed_runtime)
    looked_up = {constants[name] for name in re.findall(r"get_scalar_param\(param_dict, ([A-Z_]+),", source)}
    looked_up |= set(re.findall(r"param_dict\.get\(['\"](\w+)['\"]", source))
    assert len(looked_up) > 15
    assert looked_up <= set(TABLES[""]), looked_up - set(TABLES[""])


def parse(config: Config) -> Any:
    """What DeepSpeed makes of the mapping on one rank."""
    from deepspeed.runtime.config import DeepSpeedConfig

    validate(config, 1)
    return DeepSpeedConfig(deepspeed_config(config, batch_plan(config, 1)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeeds_own_parser_takes_what_we_make(file: Path, precision: str) -> None:
    config = load_config(
        "debug", ds_config_file=file, overrides=[f"train.precision={precision}", "optim.grad_clip=0.5"]
    )
    parsed = parse(config)
    plan = batch_plan(config, 1)
    assert parsed.train_batch_size == 8
    assert parsed.train_micro_batch_size_per_gpu == 2
    assert parsed.gradient_accumulation_steps == plan.accumulation_steps == 4
    assert parsed.gradient_clipping == 0.5
    assert parsed.bfloat16_config.enabled == (precision == "bf16")
    assert parsed.float16_config.enabled == (precision == "fp16")
    assert parsed.float16_config.loss_scale == 0
    assert parsed.grad_accum_dtype == ("fp32" if precision == "bf16" else None)
    assert str(parsed.communication_data_type) == ("None" if precision == "fp32" else "torch.float32")
    assert parsed.zero_optimization_stage == zero_stage(config) == int(re.findall(r"\d", file.stem)[0])
    assert parsed.zero_allow_untested_optimizer
    assert not parsed.wall_clock_breakdown and not parsed.timers_config.enabled
    assert parsed.optimizer_name is None and parsed.scheduler_name is None
    assert (parsed.zero_config.offload_optimizer is not None) == offload_optimizer(config) == ("offload" in file.stem)
    assert not offload_param(config)


def test_the_shipped_files() -> None:
    names = {"zero1_pipeline", "zero1", "zero2", "zero3", "zero3_offload"}
    assert {file.stem for file in FILES} == names
    for file in FILES:
        values = json.loads(file.read_text(encoding="utf-8"))
        assert check_deepspeed_keys(values) == []
        config = load_config("gpt2-mlra-72l", ds_config_file=file)
        pipeline = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pipeline": 4})})
        validate(config, 8)
        if zero_stage(config) == 1:
            validate(pipeline, 32)
        else:
            with pytest.raises(ConfigError, match="cannot be used with the pipeline engine"):
                validate(pipeline, 32)


@pytest.mark.parametrize("overrides", [[], ["deepspeed.zero_optimization.stage=0"]], ids=["no file", "stage 0"])
def test_bf16_without_zero_takes_the_optimizer_of_stage_1(overrides: list[str]) -> None:
    """DeepSpeed's optimizer for bf16 at stage 0 waits for the device once per parameter and sums in bf16."""
    config = load_config("debug", overrides=["train.precision=bf16", *overrides])
    assert zero_stage(config) == 1
    parsed = parse(config)
    assert parsed.grad_accum_dtype == "fp32"
    assert parsed.zero_enabled is True and parsed.zero_optimization_stage == 1
    fp32 = load_config("debug", overrides=overrides)
    assert zero_stage(fp32) == 0 and parse(fp32).zero_enabled is False


def test_the_users_communication_type_stays() -> None:
    overrides = ["train.precision=bf16", "deepspeed.communication_data_type=bf16"]
    config = load_config("debug", overrides=overrides)
    assert deepspeed_config(config, batch_plan(config, 1))["communication_data_type"] == "bf16"


def test_stages_send_whole_activations_unless_a_file_names_parts() -> None:
    def pipeline(*overrides: str) -> object:
        config = load_config("debug", overrides=["parallel.pipeline=2", *overrides])
        return deepspeed_config(config, batch_plan(config, 4)).get("pipeline")

    assert pipeline() is None
    whole = {"pipe_partitioned": False, "grad_partitioned": False}
    assert pipeline("parallel.tensor=2") == whole
    assert pipeline("parallel.tensor=2", "parallel.sequence_parallel=true") == whole
    named = pipeline("parallel.tensor=2", "deepspeed.pipeline.pipe_partitioned=true")
    assert named == {"pipe_partitioned": True, "grad_partitioned": False}


def test_the_configuration_is_not_changed() -> None:
    config = load_config("debug", overrides=["deepspeed.zero_optimization.stage=1"])
    before = config.to_yaml()
    made = deepspeed_config(config, batch_plan(config, 2))
    made["zero_optimization"]["stage"] = 3
    assert config.to_yaml() == before
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (8, 2)
