from dataclasses import replace
from pathlib import Path

import pytest

from mlra_scale.config import ConfigError, batch_plan, load_config, load_named_config
from mlra_scale.model.validation import validate
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import write_cluster_file
from mlra_scale.training.start.device import Devices
from mlra_scale.training.start.plan import plan_report, resolve_layout, short_report


def report_of(preset: str, world_size: int, *overrides: str) -> str:
    config = load_config(preset, overrides=list(overrides))
    return plan_report(config, batch_plan(config, world_size))


def test_the_full_72_layer_model_on_32_ranks() -> None:
    text = report_of("gpt2-mlra-72l", 32, "parallel.tensor=4", "parallel.pipeline=2")
    parts = ["959,441,920", "tokens per step 524,288", "tensor 4 x pipeline 2 x data 4"]
    parts += ["global batch 512 = 4 (micro-batch) x 32 (accumulation) x 4 (data ranks)"]
    parts += ["[0 1 2 3]", "[0 16]", "[0 4 8 12]", "ranks 16-31, blocks 36-71"]
    parts += ["169,925,632", "activation checkpointing: none"]
    assert [part for part in parts if part not in text] == []


def test_one_rank_holds_everything_and_long_groups_are_shortened() -> None:
    text = report_of("debug", 1)
    assert "whole" in text and "236,928" in text
    text = report_of("gpt2-mlra-72l", 512, "train.micro_batch_size=1")
    assert "[0 1 .. 511]" in text and "(512 groups)" in text


def section_of(text: str, title: str) -> list[str]:
    """The lines of a section of the report."""
    (section,) = [part for part in text.split("\n\n") if part.startswith(title)]
    return [line.strip() for line in section.splitlines()[1:]]


def test_the_optimizer_and_what_each_rule_matches_are_shown() -> None:
    assert section_of(report_of("debug", 1), "Optimizer") == [
        "AdamW (betas 0.9, 0.95; epsilon 1e-08)",
        "weight decay 0.1, none on biases and norms",
    ]
    rules = "[{kind: factor, optimizer: spectron}, {names: 'blocks.1.mlp.*', lr_factor: 0.5, weight_decay: 0},"
    rules += "{kind: embedding, weight_decay: 0}, {kind: norm, lr_factor: 2}]"
    deep = ("model.depth_rule=completep", "optim.name=muon", f"optim.rules={rules}")
    lines = section_of(report_of("debug", 1, *deep), "Optimizer")
    assert max(map(len, lines)) <= 112
    assert " ".join(lines) == (
        "spectron for 24 factors, muon for 12 matrices, AdamW (betas 0.9, 0.95; epsilon 1e-08, in blocks times 48/4) "
        "for all else; spectron and muon: Nesterov momentum 0.95, 5 Newton-Schulz steps, updates times 0.2 "
        "sqrt(max(m, n)) "
        "weight decay 0.1, none on biases and norms but by rules "
        "optim.rules.0: kind factor: optimizer spectron (24 parameters, 49,152 weights: "
        "blocks.*.attention.q.down.weight, blocks.*.attention.q.up.weight, blocks.*.attention.k.down.weight, "
        "blocks.*.attention.k.up.weight, blocks.*.attention.v.down.weight, blocks.*.attention.v.up.weight) "
        "optim.rules.1: blocks.1.mlp.*: learning rate times 0.5, weight decay 0 (4 parameters, 33,088 weights: "
        "blocks.1.mlp.fc_in.weight, blocks.1.mlp.fc_in.bias, blocks.1.mlp.fc_out.weight, blocks.1.mlp.fc_out.bias) "
        "optim.rules.2: kind embedding: weight decay 0 (1 parameter, 32,768 weights: embedding.weight) "
        "optim.rules.3: kind norm: learning rate times 2 (18 parameters, 1,152 weights: "
        "blocks.*.attention_norm.weight, blocks.*.attention_norm.bias, blocks.*.mlp_norm.weight, "
        "blocks.*.mlp_norm.bias, final_norm.weight, final_norm.bias)"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("optim.name=spectron", "model.attention=dense"), "muon for 24 matrices, AdamW"),
        (("optim.rules=[{kind: factor, optimizer: muon}, {names: '*', optimizer: adamw}]",), "AdamW"),
        (("optim.name=muon", "optim.rules=[{kind: matrix, optimizer: adamw}]"), "muon for 24 factors, AdamW"),
        (("optim.rules=[{names: blocks.0.mlp.fc_in.weight, optimizer: muon}]",), "muon for 1 matrix, AdamW"),
        (("optim.name=muon", "optim.matrix_scale=none", "optim.nesterov=false"), "muon for 24 factors and 12 matrices"),
    ],
)
def test_only_optimizers_that_update_something_are_named(overrides: tuple[str, ...], said: str) -> None:
    text = report_of("debug", 1, *overrides)
    line = " ".join(section_of(text, "Optimizer"))
    has_muon = "muon" in said
    assert line.startswith(said) and "spectron" not in text
    assert ("muon: " in line) == ("Newton-Schulz" in line) == ("muon: matrices take" in text) == has_muon
    unscaled = "muon: momentum 0.95, 5 Newton-Schulz steps, updates times 1 weight decay"
    assert (unscaled in line) == ("optim.matrix_scale=none" in overrides)


def test_the_factor_of_the_branches_is_shown() -> None:
    """A base depth above the model's multiplies them, which a look must show."""
    assert "branches" not in report_of("debug", 1)
    lines = section_of(report_of("debug", 1, "model.depth_rule=completep"), "Model")
    assert lines[-1] == "depth rule completep: branches times 48/4 = 12 (model.base_depth / model.num_layers)"


def test_all_fields_and_the_rules_are_checked_together() -> None:
    overrides = ["model.num_heads=5", "optim.rules=[{names: blocks.7.*, lr_factor: 2}]"]
    with pytest.raises(ConfigError) as caught:
        validate(load_config("debug", overrides=overrides), 1)
    assert [problem.field for problem in caught.value.problems] == ["model.num_heads", "optim.rules.0"]
    validate(load_config("debug"), 1)
    config, named = load_named_config("debug", overrides=[*overrides, "parallel.layout=auto"])
    with pytest.raises(ConfigError) as caught:
        resolve_layout(config, named, Devices(1, 1, "cuda"))
    assert [problem.field for problem in caught.value.problems] == ["model.num_heads", "optim.rules.0"]


def test_the_short_report_names_model_batch_and_layout() -> None:
    for preset in ("debug", "laptop", "gpt2", "gpt2-192l"):
        config = load_config(preset)
        text = short_report(config, batch_plan(config, 1), "cpu")
        assert preset in text and "global batch" in text and "1 rank(s)" in text
        assert len(text.splitlines()) < 10


def test_the_step_is_estimated_for_a_named_cluster_and_marked_as_such() -> None:
    text = report_of("gpt2-mlra-72l", 16, "parallel.tensor=2", "parallel.pipeline=2")
    assert "Estimate of a step, not measured" in text
    assert "on 2 x 8 h100: step " in text and "MFU" in text and "bubble" in text
    assert "GB that a rank sends per step: tensor" in text and "datasheet" in text
    assert "on 1 x 1 cpu: step " in report_of("debug", 1, "train.device=cpu")


def test_the_step_is_estimated_for_a_cluster_that_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "cluster.json"
    cluster = replace(named_cluster("h100"), name="our nodes", source="measured here", utilization=0.01)
    write_cluster_file(file, cluster, ["utilization"])
    text = report_of("gpt2-mlra-72l", 16, "parallel.tensor=2", f"cluster.file={file}")
    assert "on 2 x 8 our nodes: step " in text and "(measured here)" in text
    for overrides, said in (
        (["train.device=cpu"], "was measured on GPUs, and this is planned for cpu; name a file of such"),
        (["cluster.device=h200"], "and so does cluster.device=h200; leave one out"),
    ):
        with pytest.raises(ConfigError, match=rf"cluster\.file = '{file}': .*{said}"):
            report_of("debug", 1, f"cluster.file={file}", *overrides)
    file.write_text("{}")
    with pytest.raises(ConfigError, match=rf"cluster\.file {file}: format = None: must be"):
        report_of("debug", 1, f"cluster.file={file}")


def test_the_planner_chooses_by_what_was_measured(tmp_path: Path) -> None:
    """Where tensor parallelism is cheap it splits what does not fit, and where links are slow it does not."""
    config, named = load_named_config("gpt2-mlra-72l", None, None, ["parallel.layout=auto"])
    chosen = {}
    for name, bandwidth in (("fast", 1e12), ("slow", 1e8)):
        cluster = replace(named_cluster("h100"), memory=24e9, link_intra=bandwidth, link_inter=bandwidth)
        write_cluster_file(tmp_path / name, cluster, ["link_intra"])
        section = config.cluster.model_copy(update={"file": str(tmp_path / name)})
        given = config.model_copy(update={"cluster": section})
        choice = resolve_layout(given, named, Devices(8, 8, "cuda"))[1]
        assert choice is not None
        chosen[name] = choice
    assert chosen["fast"].cluster.link_intra == 1e12 and chosen["slow"].cluster.memory == 24e9
    assert chosen["fast"].overrides != chosen["slow"].overrides
