"""tools/plan.py as a person runs it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mlra_scale.config import load_config, load_named_config
from mlra_scale.model.validation import validate
from mlra_scale.planning.choice import choose
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.train import build_parser
from tests.support.tools import ROOT, run_tool


def loaded_from(command: str) -> tuple[list[str], object]:
    """The configuration that a printed command line trains with."""
    words = shlex.split(command)
    arguments = words[words.index("mlra_scale.train") + 1 :]
    options = build_parser().parse_intermixed_args(arguments)
    file = None if options.ds_config is None else ROOT / options.ds_config
    return words, load_config(options.preset, options.config, file, options.overrides)


def test_the_command_trains_the_chosen_layout(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    ran = run_tool("plan", "--preset", "laptop", "--cluster", "cpu", "--json", file, "data.path=here")
    assert ran.code == 0, ran.stderr
    plan = json.loads(file.read_text())
    best, (command,) = plan["layouts"][plan["chosen"]], plan["commands"]
    words, config = loaded_from(command)
    assert command in ran.stdout and words[:3] == ["torchrun", "--nproc-per-node", "2"]
    validate(config, 2, "cpu")  # type: ignore[arg-type]
    values = config.to_dict()  # type: ignore[attr-defined]
    assert values["parallel"]["tensor"] == best["tensor"] and values["parallel"]["pipeline"] == best["pipeline"]
    assert values["parallel"]["activation_checkpointing"] == best["activation_checkpointing"]
    assert values["train"]["micro_batch_size"] == best["micro_batch_size"]
    assert values["deepspeed"].get("zero_optimization", {}).get("stage", 0) == best["zero_stage"]
    assert values["data"]["path"] == "here" and values["train"]["device"] == "cpu"


def test_every_number_of_a_layout_is_there(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert run_tool("plan", "--preset", "laptop", "--cluster", "cpu", "--json", file).code == 0
    plan = json.loads(file.read_text())
    seconds = [layout["step_seconds"] for layout in plan["layouts"]]
    assert seconds == sorted(seconds)
    for layout in plan["layouts"]:
        memory = layout["memory_bytes"]
        parts = ("weights", "gradients", "master", "moments", "activations", "logits", "temporary")
        assert sum(memory[part] for part in parts) == pytest.approx(memory["device"])
        assert 0.0 < layout["mfu"] < 1.0 and 0.0 <= layout["bubble"] < 1.0
        assert set(layout["sent_bytes"]) == {"tensor", "pipeline", "data"}
    assert plan["cluster"]["source"]


def test_tables_have_as_many_lines_as_asked_for() -> None:
    ran = run_tool("plan", "--preset", "laptop", "--cluster", "cpu", "--top", 3)
    assert ran.code == 0
    assert "the 3 fastest by the estimate (not measured), and the planner's choice (*):" in ran.stdout
    assert sum(line.split()[:1] in (["3"], ["3*"]) for line in ran.stdout.splitlines()) == 2, "times and memory"
    assert "left out:" in ran.stdout


def test_the_marked_layout_and_its_command_are_what_a_job_runs(tmp_path: Path) -> None:
    """Also where that is not the fastest layout, and is not among those that are listed."""
    config, named = load_named_config("gpt2-mlra-72l", overrides=["parallel.layout=auto"])
    choice = choose(config, named, named_cluster("h100"))
    assert choice.chosen is not choice.fastest
    file = tmp_path / "plan.json"
    ran = run_tool("plan", "--preset", "gpt2-mlra-72l", "--cluster", "h100", "--top", 1, "--json", file)
    assert ran.code == 0, ran.stderr
    plan = json.loads(file.read_text())
    marked = [line.split()[0] for line in ran.stdout.splitlines() if re.match(r" *\d+\* ", line)]
    assert marked == [f"{plan['chosen'] + 1}*"] * 2, "times and memory"
    _, loaded = loaded_from(plan["commands"][0])
    assert loaded.parallel.tensor == choice.chosen.plan.tensor  # type: ignore[attr-defined]
    assert loaded.deepspeed == choice.chosen.config.deepspeed  # type: ignore[attr-defined]
    assert loaded.train.micro_batch_size == choice.chosen.plan.micro_batch_size  # type: ignore[attr-defined]
    assert plan["layouts"][plan["chosen"]]["step_seconds"] == pytest.approx(choice.chosen.time.seconds)


def test_tables_are_at_most_120_columns_wide() -> None:
    """The widest numbers: large models on many nodes, with everything that a layout can have."""
    for words in (
        ["--preset", "gpt2-mlra-72l-wide", "--nodes", 8, "--top", 20, "optim.name=spectron"],
        ["--preset", "laptop", "--cluster", "cpu"],
    ):
        ran = run_tool("plan", *words)
        assert ran.code == 0, ran.stderr
        tables, _, commands = ran.stdout.partition("\nthe planner's choice (*), which")
        assert max(map(len, tables.splitlines())) <= 120 and commands, "commands are one line each, to be copied"


def test_the_picture_has_the_listed_layouts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, top in zip(files, (3, 3, 1), strict=True):
        ran = run_tool("plan", "--preset", "laptop", "--cluster", "cpu", "--top", top, "--plot", file)
        assert ran.code == 0 and ran.stdout.endswith(f"picture of the listed layouts: {file}\n"), ran.stderr
    first, again, fewer = (file.read_bytes() for file in files)
    assert first.startswith(b"\x89PNG") and first == again != fewer


def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra report)")
    from mlra_scale.study.report.plan_figure import time_parts

    file = tmp_path / "plan.json"
    assert run_tool("plan", "--preset", "gpt2-mlra-72l", "--nodes", 2, "--json", file).code == 0
    for layout in json.loads(file.read_text())["layouts"]:
        parts = time_parts(layout)
        assert sum(parts.values()) == pytest.approx(layout["step_seconds"]) and min(parts.values()) >= 0.0
        pipeline = sum(parts.values()) - parts["update"] - parts["reduction of gradients"]
        assert parts["pipeline bubble"] == pytest.approx(layout["bubble"] * pipeline, rel=0.1, abs=1e-6)


def test_several_nodes_are_started_by_sbatch_or_torchrun() -> None:
    ran = run_tool("plan", "--preset", "gpt2", "--nodes", 2, "--devices-per-node", 2, "parallel.pipeline=1")
    assert ran.code == 0, ran.stderr
    assert "sbatch --nodes 2 --gpus-per-node 2 slurm/train_mlra_72L.sh --preset gpt2" in ran.stdout
    assert "torchrun --nnodes 2 --nproc-per-node 2" in ran.stdout


def test_one_device_needs_no_launcher() -> None:
    ran = run_tool("plan", "--preset", "debug", "--cluster", "cpu", "--devices-per-node", 1)
    assert "  python -m mlra_scale.train --preset debug" in ran.stdout


def test_numbers_of_the_cluster_can_be_given() -> None:
    numbers = ["--memory-gib", 40, "--peak-tflops", 300, "--utilization", 0.4]
    links = ["--link-gbps-intra", 2400, "--link-gbps-inter", 100]
    ran = run_tool("plan", "--preset", "debug", "--devices-per-node", 2, *numbers, *links)
    assert "40.0 GiB each, peak 300 TFLOP/s of which matrix products reach 40 %" in ran.stdout
    assert "2400 Gbit/s within a node and 100 between nodes" in ran.stdout


def test_where_nothing_fits_the_smallest_and_a_remedy_are_printed() -> None:
    ran = run_tool("plan", "--preset", "gpt2-xl", "--cluster", "a100", "--devices-per-node", 1, "--memory-gib", 16)
    assert ran.code == 2 and ran.stdout == ""
    assert "no layout fits: the smallest needs" in ran.stderr and "offload the optimizer" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--preset", "gpt2-mrla-72l"], "did you mean 'gpt2-mlra-72l'?"),
        (["--preset", "debug", "--cluster", "h10"], "--cluster = 'h10'"),
        (["--preset", "debug", "--devices-per-node", "3", "parallel.tensor=3"], "parallel.tensor = 3"),
        (["--preset", "debug", "optim.warmup_steps=99"], "optim.warmup_steps = 99"),
        (["--preset", "debug", "optim.rules=[{names: nothing.*, lr_factor: 2}]"], "matches no parameter; of the first"),
        (["--preset", "debug", "--nodes", "0"], "'0' is not a whole number from 1 on"),
        (["--preset", "debug", "--utilization", "1.5"], "'1.5' is more than the peak"),
        (["--preset", "debug", "--memory-gib", "-1"], "'-1' is not a positive number"),
        (["--preset", "debug", "--cluster", "cpu", "--json", "."], ". cannot be written"),
        (["--preset", "debug", "--cluster", "cpu", "--plot", "plan.pdf"], "give it a name that ends in .png"),
    ],
)
def test_bad_input_is_reported_in_one_error(arguments: list[str], reported: str) -> None:
    ran = run_tool("plan", *arguments)
    assert ran.code == 2 and ("mlra_scale.train" in ran.stdout) == ("--json" in arguments)
    assert reported in ran.stderr
