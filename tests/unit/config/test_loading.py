"""Preset, file, DeepSpeed file and overrides: precedence, and one clear line for whatever is wrong."""

from pathlib import Path

import pytest

from mlra_scale.config import Config, ConfigError, Named, load_config, load_named_config, preset, stored_yaml
from mlra_scale.console import set_up_logging

ZERO1 = Path(__file__).resolve().parents[3] / "ds_configs" / "zero1.json"


def lines(**sources: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(**sources)  # type: ignore[arg-type]
    return str(caught.value).split("\n")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "train: {steps: 7, seed: 8}\noptim:\n  lr: 1e-2\nparallel:\n")
    json = write(tmp_path / "d.json", '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}')
    overrides = ["train.seed=9", "deepspeed.zero_optimization.stage=2", "model.factorised_projections=[q,o]"]
    config = load_config("debug", file, json, overrides)
    assert (config.train.steps, config.train.seed, config.optim.lr) == (7, 9, 0.01)
    assert config.deepspeed == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}
    assert config.model.factorised_projections == ("q", "o")
    assert config.model.hidden_size == preset("debug").model.hidden_size
    assert config.preset == "debug"


def test_a_file_may_name_its_preset(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "preset: debug\ntrain: {seed: 5}\n")
    assert load_config(config_file=file) == load_config("debug", overrides=["train.seed=5"])
    assert lines(preset="laptop", config_file=file)[0].startswith(
        "--preset = 'laptop': the config file starts from 'debug'; name one preset only"
    )


def test_a_run_directorys_file_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        "gpt2-mlra-72l", overrides=["train.steps=20", "data.blend={a.b/c: 2, d: 0.5}", "wandb.tags=[x]"]
    )
    file = write(tmp_path / "config.yaml", config.to_yaml())
    assert load_config(config_file=file) == config
    assert load_config("gpt2-mlra-72l", config_file=file) == config


def test_a_stored_plan_that_was_removed_is_read_as_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of runs have it since version 2 or before; on the command line it is refused with the reason."""
    stored = "version: 2\npreset: debug\nparallel: {tensor: 2, low_rank_plan: sharded}\n"
    stored_yaml._notice_sharded.cache_clear()
    set_up_logging()
    for _ in range(2):
        config = load_config(config_file=write(tmp_path / "c.yaml", stored))
        assert (config.parallel.low_rank_plan, config.parallel.tensor) == ("auto", 2)
    assert capsys.readouterr().err == (
        "WARNING: parallel.low_rank_plan = 'sharded' in a stored configuration: the plan sharded was removed: it was "
        "the fastest one in 0 of 36 measured cases; auto takes its place\n"
    )
    assert Config.from_yaml(config.to_yaml()) == config and config.to_yaml().startswith("version: 4\n")
    assert lines(preset="debug", overrides=["parallel.low_rank_plan=sharded"]) == [
        "parallel.low_rank_plan = 'sharded': the plan sharded was removed: it was the fastest one in 0 of 36 measured "
        "cases; use auto, replicated or merged"
    ]


def test_a_file_without_preset_needs_every_required_field(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.yaml",
        "model: {num_layers: 2, hidden_size: 8, num_heads: 2}\noptim: {lr: 0.1}\n"
        "train: {steps: 1, global_batch_size: 1, micro_batch_size: 1, sequence_length: 4}\n",
    )
    assert load_config(config_file=file).preset is None
    write(file, "model: {num_layers: 2}\ntrain: {}\n")
    fields = [line.split(" = ")[0] for line in lines(config_file=file)]
    assert fields == [
        "model.hidden_size",
        "model.num_heads",
        "train.steps",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.sequence_length",
        "optim",
    ]


def test_the_configuration_of_a_run_is_taken_as_it_is(tmp_path: Path) -> None:
    """Its preset is a note: it need not exist any more, and nothing in the file counts as named."""
    config = load_config("debug", overrides=["train.steps=7"]).model_copy(update={"preset": "of-long-ago"})
    file = write(tmp_path / "config.yaml", config.to_yaml())
    loaded, named = load_named_config(overrides=["tev.every=3"], run_config=file)
    assert loaded == config.model_copy(update={"tev": config.tev.model_copy(update={"every": 3})})
    assert named == Named(frozenset({"tev.every"}), frozenset())
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(ConfigError, match=r"--run-dir = '.*config.yaml': line 1"):
        load_named_config(run_config=file)


def test_nothing_to_start_from() -> None:
    (line,) = lines()
    assert line.startswith("--preset = None: give one of debug, laptop, ")


def test_a_shorter_run_of_a_preset_has_a_shorter_warmup(tmp_path: Path) -> None:
    full = preset("gpt2-mlra-72l")
    assert load_config("gpt2-mlra-72l", overrides=["train.steps=20"]).optim.warmup_steps == 1
    half = [f"train.steps={full.train.steps // 2}"]
    assert load_config("gpt2-mlra-72l", overrides=half).optim.warmup_steps == full.optim.warmup_steps // 2
    longer = [f"train.steps={full.train.steps * 2}"]
    assert load_config("gpt2-mlra-72l", overrides=longer).optim.warmup_steps == full.optim.warmup_steps
    assert load_config("gpt2-mlra-72l", overrides=["train.steps=20", "optim.warmup_steps=5"]).optim.warmup_steps == 5
    file = write(tmp_path / "c.yaml", "optim: {warmup_steps: 3}")
    assert load_config("gpt2-mlra-72l", file, overrides=["train.steps=20"]).optim.warmup_steps == 3


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "optim.decay_factors=false",
            "optim.decay_factors = False: was replaced by optim.rules; leave true out, and instead of false write "
            "optim.rules=[{kind: factor, weight_decay: 0}]",
        ),
        ("train.step=3", "train.step = 3: unknown key 'step'; did you mean 'steps'?"),
        ("modle.num_layers=3", "modle.num_layers = 3: unknown key 'modle'; did you mean 'model'?"),
        ("learning_rate=1", "learning_rate = 1: unknown key 'learning_rate'; did you mean 'optim.lr'?"),
        ("steps=3", "steps = 3: unknown key 'steps'; did you mean 'train.steps'?"),
        ("seq_len=3", "seq_len = 3: unknown key 'seq_len'; did you mean 'train.sequence_length'?"),
        ("name=x", "name = 'x': unknown key 'name'; did you mean 'optim.name' or 'wandb.name'?"),
        (
            "model.rank=3",
            "model.rank = 3: unknown key 'rank'; did you mean 'attention_rank' or 'attention_rank_ratio'?",
        ),
        ("train.lr=1", "train.lr = 1: unknown key 'lr'; did you mean 'optim.lr'?"),
        (
            "parallel.tensor_parallel=2",
            "parallel.tensor_parallel = 2: unknown key 'tensor_parallel'; did you mean 'tensor",
        ),
        ("mode.num_layers=3", "mode.num_layers = 3: unknown key 'mode'; did you mean 'model'?"),
        ("d=3", "d = 3: unknown key 'd'; known: activations, "),
        ("every=3", "every = 3: unknown key 'every'; did you mean 'tev.every' or 'gradients.every' or 'activations."),
        ("model.zzzz=3", "model.zzzz = 3: unknown key 'zzzz'; known: attention, attention_dropout, "),
        ("model=3", "model = 3: is a section; set one of its fields: vocab_size, "),
        ("train.steps", "override = 'train.steps': must look like section.field=value"),
        ("=3", "override = '=3': must look like section.field=value"),
        ("train.steps.x=3", "train.steps.x = 3: 'steps' is a value and has no fields"),
        ("optim.lr=[", "optim.lr = '[': is not YAML: line 1, column 2: "),
        ("preset=gpt2", "preset = 'gpt2': a preset is where values start from, not an override; use --preset"),
        ("train.steps=", "train.steps = None: must be an integer, not null"),
        (
            "data.blend={a: 1, a: 2}",
            "data.blend = '{a: 1, a: 2}': is not YAML: line 1, column 8: key 'a' is given twice",
        ),
        ("deepspeed.optimizer.type=Adam", "deepspeed.optimizer = {'type': 'Adam'}: does not belong among DeepSpeed's"),
    ],
)
def test_bad_overrides(override: str, line: str) -> None:
    (found,) = lines(preset="debug", overrides=[override])
    assert found.startswith(line)


def test_overrides_reach_into_mappings_only() -> None:
    config = load_config("debug", overrides=["data.blend.some/path.v2=0.5", "data.blend.other=1"])
    assert config.data.blend == {"some/path.v2": 0.5, "other": 1.0}
    overrides = ["deepspeed.zero_optimization=true", "deepspeed.zero_optimization.stage=1"]
    assert lines(preset="debug", overrides=overrides)[0] == (
        "deepspeed.zero_optimization.stage = 1: deepspeed.zero_optimization is already set to True, which has no fields"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "train:\n  steps: 1\n  steps: 2\n",
            "line 3, column 3: key 'steps' is given twice, first on line 2; keep one of",
        ),
        ("- 1\n", "must hold sections (model:, train:, ...) at its top"),
        ("text", "must hold sections (model:, train:, ...) at its top"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, line: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    (found,) = lines(preset="debug", config_file=file)
    assert found.startswith("--config = ") and ": " + line in found


def test_bad_sections_in_files(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "modle: {a: 1}\ntrain: 3\noptim: {learning_rate: 1}\npreset: [x]\n")
    assert lines(preset="debug", config_file=file) == [
        "preset = ['x']: must be the name of a preset",
        "train = 3: must be a mapping, not an integer",
        "optim.learning_rate = 1: unknown key 'learning_rate'; did you mean 'lr'?",
        "modle = {'a': 1}: unknown key 'modle'; did you mean 'model'?",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert lines(preset="debug", config_file=missing) == [
        f"--config = '{missing}': cannot be read: No such file or directory"
    ]
    assert lines(preset="debug", config_file=tmp_path)[0].endswith("cannot be read: Is a directory")
    binary = tmp_path / "binary"
    binary.write_bytes(b"a\xff")
    assert lines(preset="debug", ds_config_file=binary)[0].endswith("is not UTF-8 text (byte 1)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{\n\n", "is not valid JSON: line 3, column 1: "),
        *((text, "must hold a JSON object { ... } at its top") for text in ("[]", "null")),
    ],
)
def test_bad_deepspeed_files(tmp_path: Path, text: str, line: str) -> None:
    file = write(tmp_path / "d.json", text)
    (found,) = lines(preset="debug", ds_config_file=file)
    assert found.startswith("--ds-config = ") and line in found


def test_problems_of_all_sources_are_reported_together(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "train: {steps: x}")
    json = write(tmp_path / "d.json", '{"train_batch_size": 8}')
    found = lines(preset="debgu", config_file=file, ds_config_file=json, overrides=["optim.lrr=1"])
    assert found == [
        "optim.lrr = 1: unknown key 'lrr'; did you mean 'lr'?",
        "preset = 'debgu': unknown preset; did you mean 'debug'?",
        "deepspeed.train_batch_size = 8: does not belong among DeepSpeed's keys: set train.global_batch_size",
        "train.steps = 'x': must be an integer, not text",
    ]


def test_from_yaml_says_what_is_wrong() -> None:
    for text in ("a: [", "[]", "a: 1\na: 2"):
        with pytest.raises(ConfigError):
            Config.from_yaml(text)


def test_what_was_named_and_where_is_known(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "preset: debug\ntrain: {steps: 7}\nevaluation:\ndata:\n  blend: {a: 1}\n")
    config, named = load_named_config(
        config_file=file, overrides=["train.steps=9", "data.blend.b.c/d=2", "tev.every=1"]
    )
    assert config == load_config(config_file=file, overrides=["train.steps=9", "data.blend.b.c/d=2", "tev.every=1"])
    assert named.in_file == {"preset", "train.steps", "data.blend"}
    assert named.on_command_line == {"train.steps", "data.blend", "tev.every"}
    assert load_named_config("debug")[1] == Named()
    for source in ({"overrides": ["deepspeed.zero_optimization.stage=1"]}, {"ds_config_file": ZERO1}):
        _, named = load_named_config("debug", **source)
        assert named == Named(frozenset({"deepspeed"}))


def test_a_default_holds_where_nothing_else_names_the_field(tmp_path: Path) -> None:
    """Preset, default, file, command line: later ones win, and a default is not named."""
    default = ["parallel.layout?=auto", "guard.enabled?=true"]
    config, named = load_named_config("debug", overrides=default)
    assert config.parallel.layout == "auto" and config.guard.enabled and named.on_command_line == frozenset()
    config, named = load_named_config("debug", overrides=[*default, "parallel.layout=manual"])
    assert config.parallel.layout == "manual" and named.on_command_line == {"parallel.layout"}
    file = tmp_path / "mine.yaml"
    file.write_text("parallel: {layout: manual}\nguard: {enabled: false}\n")
    config, _ = load_named_config("debug", file, overrides=default)
    assert config.parallel.layout == "manual" and not config.guard.enabled
    with pytest.raises(ConfigError, match=r"unknown key 'layuot'"):
        load_named_config("debug", overrides=["parallel.layuot?=auto"])
