"""The layout of a start: what stays named over starts, what fits no device, and devices without constants."""

from pathlib import Path

import pytest

from mlra_scale.cluster.check import with_absolute_paths
from mlra_scale.config import Config, ConfigError, Named, batch_plan, load_config, load_named_config, zero_stage
from mlra_scale.planning.choice import FIELDS, RECORD, LayoutChoice, choice_lines
from mlra_scale.training.start.device import Devices
from mlra_scale.training.start.plan import best_layout, cluster_for, plan_report, resolve_layout, with_layout_of

GIB = 2.0**30
H100 = Devices(4, 4, "cuda", "NVIDIA H100 80GB HBM3", 79.1 * GIB)
ALL = (
    *("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false"),
    *("parallel.activation_checkpointing=none", "train.micro_batch_size=64", "deepspeed.zero_optimization.stage=1"),
)


def auto(*overrides: str, file: Path | None = None, preset: str | None = "gpt2") -> tuple[Config, Named]:
    return load_named_config(preset, file, overrides=["parallel.layout=auto", *overrides])


def choice_of(config: Config, named: Named) -> LayoutChoice:
    choice = resolve_layout(config, named, H100)[1]
    assert choice is not None
    return choice


@pytest.mark.parametrize("way", ["run directory", "config file"])
def test_what_was_named_stays_named_and_what_was_chosen_does_not(tmp_path: Path, way: str) -> None:
    first, _ = resolve_layout(*auto("parallel.tensor=2", "train.micro_batch_size=4"), H100)
    file = tmp_path / "config.yaml"
    file.write_text(first.to_yaml())
    if way == "run directory":
        config, named = load_named_config(run_config=file)
    else:
        config, named = load_named_config(config_file=file)
    again = choice_of(config, named)
    assert again.kept == ("parallel.tensor", "train.micro_batch_size") and again.chosen.config == first
    config, named = load_named_config(run_config=file, overrides=["parallel.pipeline=2"])
    assert choice_of(config, named).kept == ("parallel.tensor", "parallel.pipeline", "train.micro_batch_size")
    config, named = load_named_config(run_config=file, overrides=[f"{RECORD}=[]"])
    assert choice_of(config, named).kept == ()


def test_the_ranks_of_a_job_choose_nothing_and_keep_the_record() -> None:
    choice = choice_of(*auto("parallel.tensor=2"))
    config, named = auto("parallel.tensor=2", *choice.overrides)
    assert resolve_layout(config, named, Devices(4, 4, "cuda", "NVIDIA V100", 1e6)) == (config, None)
    assert config.parallel.named_layout_fields == ("parallel.tensor",)
    assert RECORD not in "\n".join(choice_lines(choice))


def test_a_layout_that_ranks_have_begun_with_is_not_chosen_again() -> None:
    """After a damaged checkpoint the start is prepared again, in the process groups of the first layout."""
    config, named = auto("parallel.tensor=2")
    chosen, _ = resolve_layout(config, named, H100)
    other = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 24})})
    kept, all_named = with_layout_of(chosen, other, named)
    after, choice = resolve_layout(kept, all_named, H100)
    assert choice is None and after == kept and after.train.global_batch_size == 24
    assert after.parallel == chosen.parallel and after.deepspeed == chosen.deepspeed
    assert after.train.micro_batch_size == chosen.train.micro_batch_size


def test_a_deepspeed_setting_without_a_stage_leaves_the_stage_open() -> None:
    free = choice_of(*auto("train.precision=bf16"))
    choice = choice_of(*auto("train.precision=bf16", "deepspeed.communication_data_type=fp32"))
    assert zero_stage(choice.chosen.config) == zero_stage(free.chosen.config) > 0
    assert choice.chosen.config.deepspeed == free.chosen.config.deepspeed | {"communication_data_type": "fp32"}
    assert choice.num_fitting == free.num_fitting


def test_a_named_layout_that_does_not_fit_is_refused_or_said_not_to_fit() -> None:
    config, named = auto(*ALL, preset="gpt2-xl")
    assert named.on_command_line >= set(FIELDS)
    with pytest.raises(ConfigError, match="no layout fits"):
        resolve_layout(config, named, H100)
    config = load_config("gpt2-xl", overrides=["train.global_batch_size=256", *ALL])
    text = " ".join(plan_report(config, batch_plan(config, 4), None, H100).split())
    assert "it does not fit: " in text and "GiB of tensors" in text and "usable" in text
    small = load_config("gpt2", overrides=["train.micro_batch_size=1"])
    assert "does not fit" not in plan_report(small, batch_plan(small, 4), None, H100)


def test_auto_says_when_it_has_nothing_to_choose() -> None:
    config, layout = resolve_layout(*auto(*ALL[:-2], "train.micro_batch_size=1", ALL[-1]), H100)
    assert layout is None and config.parallel.named_layout_fields == FIELDS
    assert "has nothing to choose" in plan_report(config, batch_plan(config, 4), None, H100)
    assert best_layout(config, H100).kept == ()


@pytest.mark.parametrize(
    ("name", "generation"),
    [("Tesla V100-SXM2-32GB", "h100"), ("NVIDIA A100-PCIE-40GB", "a100"), ("NVIDIA B200", "h100")],
)
def test_the_plan_says_whose_constants_an_unknown_device_gets(name: str, generation: str) -> None:
    cluster = cluster_for(auto()[0], Devices(4, 4, "cuda", name, 40e9))
    assert cluster.name == f"({name}, for which the planner has no constants: those of {generation})"
    assert cluster.flops == cluster_for(auto(f"cluster.device={generation}")[0], H100).flops
    assert cluster_for(auto()[0], H100).name == "h100"


@pytest.mark.parametrize(("device", "kind"), [("h100", "cpu"), ("cpu", "cuda")])
def test_constants_of_a_device_of_another_kind_are_refused(device: str, kind: str) -> None:
    config = load_config("debug", overrides=[f"cluster.device={device}"])
    with pytest.raises(ConfigError, match=rf"cluster\.device = '{device}': this is for {kind}"):
        resolve_layout(config, Named(), Devices(1, 1, kind))


def test_a_cluster_file_is_read_before_ranks_meet_also_for_a_manual_layout() -> None:
    config = load_config("debug", overrides=["cluster.file=/no/such/file"])
    with pytest.raises(ConfigError, match=r"cluster\.file"):
        resolve_layout(config, Named(), Devices(1, 1, "cpu"))


def test_a_job_names_the_cluster_file_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = with_absolute_paths(["--preset", "debug", "--run-dir", "run", "cluster.file=mine.json"])
    assert words[-1] == f"cluster.file={tmp_path / 'mine.json'}"
    assert with_absolute_paths(["--preset", "debug", "--run-dir", "run", "cluster.file=null"])[-1].endswith("/run")
