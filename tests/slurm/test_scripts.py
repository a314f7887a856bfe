"""The shell files of slurm/: sound, accepted by Slurm as they stand, and with a plan that can be seen before."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlra_scale.config import load_named_config, zero_stage
from mlra_scale.planning.choice import choose
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.search import Candidate
from mlra_scale.training.start.device import Devices
from mlra_scale.training.start.plan import best_layout, resolve_layout
from tests.slurm.cluster import SlurmCluster
from tests.support.training_runs import ROOT, environment

FOLDER = ROOT / "slurm"
SWEEP = FOLDER / "sweep.sh"
SOURCED = [FOLDER / "environment.sh", FOLDER / "launch.sh"]
CHECK = FOLDER / "check.sh"
FILES = sorted({*FOLDER.glob("*.sh")} - {SWEEP, CHECK, *SOURCED})
NAMES = [path.name for path in FILES]


def directive(path: Path, name: str) -> str:
    """The value of an #SBATCH line."""
    found = re.search(rf"^#SBATCH --{name}=(\S+)", path.read_text(), re.MULTILINE)
    assert found is not None, (path, name)
    return found[1]


def dry_run(path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The plan, as a user sees it before submitting."""
    return dry_run_in(ROOT, path, *arguments, **variables)


def dry_run_in(folder: Path, path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(path), *arguments],
        cwd=folder,
        env={**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_file_decides_what_the_planner_decides() -> None:
    """Every file of a training leaves the layout to it, but for ZeRO 3, which one of them is named for."""
    assert set(NAMES) >= {"train_mlra_72L.sh", "pretrain_zero3.sh"}
    assert "parallel.layout?=auto" in (FOLDER / "launch.sh").read_text()
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert not any("parallel." in line or "micro_batch" in line for line in lines), path


@pytest.mark.slow_except("h100")
@pytest.mark.parametrize("device", ["h100", "a100", "h200"])
def test_zero_3_is_within_a_tenth_of_the_best_layout_where_its_file_names_it(device: str) -> None:
    """At the file's nodes, against the planner's fastest layout where nothing is named."""
    path = FOLDER / "pretrain_zero3.sh"
    values = dict(re.findall(r"^(preset|ds_config)=(\S+)$", path.read_text(), re.MULTILINE))
    nodes, gpus = int(directive(path, "nodes")), int(directive(path, "gpus-per-node"))
    overrides = ["parallel.layout=auto", f"cluster.device={device}"]
    config, named = load_named_config(values["preset"], None, ROOT / values["ds_config"], overrides)
    devices = Devices(nodes * gpus, gpus, "cuda")
    _, chosen = resolve_layout(config, named, devices)
    assert chosen is not None and zero_stage(chosen.chosen.config) == 3
    assert chosen.chosen.memory.device + chosen.cluster.reserved <= 0.9 * chosen.cluster.memory
    assert chosen.chosen.time.seconds <= 1.1 * best_layout(config, devices).fastest.time.seconds


@pytest.mark.slow_except("h100")
@pytest.mark.parametrize("device", ["h100", "a100", "h200"])
def test_the_layout_of_72_layers_leaves_a_tenth_of_the_memory(device: str) -> None:
    path = FOLDER / "train_mlra_72L.sh"
    overrides = ["parallel.layout=auto", f"cluster.device={device}"]
    config, named = load_named_config("gpt2-mlra-72l", overrides=overrides)
    nodes, gpus = int(directive(path, "nodes")), int(directive(path, "gpus-per-node"))
    _, chosen = resolve_layout(config, named, Devices(nodes * gpus, gpus, "cuda"))
    assert chosen is not None
    assert chosen.chosen.memory.device + chosen.cluster.reserved <= 0.9 * chosen.cluster.memory


def test_a_manual_layout_of_a_file_stays(tmp_path: Path) -> None:
    """What launch.sh sets itself is a default."""
    file = tmp_path / "mine.yaml"
    file.write_text("parallel: {layout: manual, tensor: 8}\n")
    result = dry_run(FOLDER / "train_mlra_72L.sh", "--dry-run", "--config", str(file))
    assert result.returncode == 0, result.stderr
    assert "chosen by the planner" not in result.stdout and "tensor 8 x pipeline 1 x data 4" in result.stdout


def test_a_file_may_be_named_by_a_path_from_anywhere() -> None:
    result = dry_run_in(ROOT.parent, Path(ROOT.name) / "slurm" / "train_mlra_72L.sh", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and "32 rank(s)" in result.stdout, "nodes and GPUs are those of the file"


def numbers_of(path: Path, pattern: str) -> list[int]:
    """The numbers that a file's header says."""
    header = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# "))
    found = re.search(pattern, header)
    assert found is not None, (path, pattern)
    return [int(each) for each in found.groups()]


def chosen_on(preset: str, nodes: int) -> Candidate:
    """The planner's choice on nodes of 8 H100."""
    config, named = load_named_config(preset, overrides=["parallel.layout=auto"])
    return choose(config, named, replace(named_cluster("h100"), nodes=nodes)).chosen


def test_the_header_says_what_is_chosen_for_the_narrow_model() -> None:
    pattern = r"over all GPUs \((\d+) nodes\), else pipeline parallelism \((\d+) nodes: (\d+) stages\)"
    whole, odd, stages = numbers_of(FOLDER / "train_mlra_72L.sh", pattern)
    plan, other = chosen_on("gpt2-mlra-72l", whole).plan, chosen_on("gpt2-mlra-72l", odd).plan
    assert (plan.tensor, plan.pipeline, plan.data) == (1, 1, 8 * whole)
    assert (other.tensor, other.pipeline) == (1, stages)


@pytest.mark.slow
def test_the_headers_say_what_is_chosen_for_the_wide_model() -> None:
    up_to, most = numbers_of(
        FOLDER / "train_mlra_72L.sh", r"up to (\d+) nodes of H100, and tensor and pipeline parallelism on (\d+)"
    )
    few, many = numbers_of(FOLDER / "pretrain_zero3.sh", r"on (\d+) nodes and still on (\d+);")
    chosen = {nodes: chosen_on("gpt2-mlra-72l-wide", nodes) for nodes in {few, many, up_to, most}}
    for nodes in {few, many, up_to}:
        assert (chosen[nodes].plan.tensor, chosen[nodes].plan.pipeline) == (1, 1)
    assert chosen[most].plan.tensor > 1 and chosen[most].plan.pipeline > 1
    assert zero_stage(chosen[few].config) == zero_stage(chosen[many].config) == 3 > zero_stage(chosen[up_to].config)


def test_a_named_layout_stays_and_is_compared_with_the_best() -> None:
    """The command that the file's header shows."""
    header = (FOLDER / "train_mlra_72L.sh").read_text()
    assert "sbatch slurm/train_mlra_72L.sh parallel.tensor=2 parallel.pipeline=4 data.path" in header
    plan = dry_run(FOLDER / "train_mlra_72L.sh", "--dry-run", "parallel.tensor=2", "parallel.pipeline=4")
    assert plan.returncode == 0, plan.stderr
    assert "32 rank(s): tensor 2" in plan.stdout and "x pipeline 4 x data 4" in plan.stdout
    assert "kept as named: parallel.tensor, parallel.pipeline" in plan.stdout
    assert re.search(r"this layout takes \d+ % longer than the planner's\s+choice", plan.stdout), plan.stdout


@pytest.mark.parametrize("path", [*FILES, SWEEP, CHECK, *SOURCED], ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], timeout=30, check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (Debian: shellcheck)")
    command = ["shellcheck", "--external-sources", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow_except("train_mlra_72L.sh")
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_plan_fits_the_documented_nodes(path: Path) -> None:
    ranks = int(directive(path, "nodes")) * int(directive(path, "gpus-per-node"))
    plan = dry_run(path, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert f"{ranks} rank(s)" in plan.stdout and "Memory per rank" in plan.stdout
    assert "Layout, chosen by the planner" in plan.stdout
    table = (ROOT / "docs" / "slurm.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("|") and f"`{path.name}`" in line)
    assert row.endswith(f"| {directive(path, 'nodes')} |")
    # One of its GPUs of 80 GB must hold it, and keep a tenth free.
    sums = [line.split()[-3] for line in plan.stdout.splitlines() if re.match(r"^ +\d+( +\d+\.\d+){10}$", line)]
    reserved = named_cluster("h100").reserved
    assert sums and all(float(value) + reserved / 2**30 < 0.9 * 80e9 / 2**30 for value in sums)
    # The plan for another number of ranks on each node can be seen too.
    more = dry_run(path, "--dry-run", PROCESSES_PER_NODE="16")
    assert f"{2 * ranks} rank(s)" in more.stdout, more.stderr


@pytest.mark.parametrize("variable", ["MLRA_NODES", "PROCESSES_PER_NODE"])
@pytest.mark.parametrize("value", ["abc", "-2", "0"])
def test_a_number_that_is_none_is_refused_in_one_line(variable: str, value: str) -> None:
    plan = dry_run(FOLDER / "train_mlra_72L.sh", "--dry-run", **{variable: value})
    assert plan.returncode == 2 and plan.stdout == ""
    assert f"{variable} = '{value}'" in plan.stderr and plan.stderr.count("\n") == 1


def test_a_device_that_is_named_is_planned_for() -> None:
    command = ["--dry-run", "--preset", "laptop", "train.device=cpu"]
    plan = dry_run(FOLDER / "train_mlra_72L.sh", *command, MLRA_NODES="1", PROCESSES_PER_NODE="2")
    assert plan.returncode == 0, plan.stderr
    assert "1 x 2 cpu" in plan.stdout and "h100" not in plan.stdout, plan.stdout


def test_outside_of_a_job_only_the_plan_is_shown() -> None:
    result = dry_run(FILES[0], "train.steps=5")
    assert result.returncode == 2 and "Submit it: sbatch" in result.stderr


def test_a_task_of_an_array_is_a_cell() -> None:
    study = "docs/studies/init.yaml"
    cell = dry_run(SWEEP, study, "--dry-run", "--jobs", "3", SLURM_ARRAY_TASK_ID="5")
    assert cell.returncode == 0, cell.stderr
    rows = [line.split()[:2] for line in cell.stdout.splitlines() if "-seed" in line]
    assert rows == [["5", "control-L24-seed1"]]
    beyond = dry_run(SWEEP, study, "--dry-run", SLURM_ARRAY_TASK_ID="192")
    assert beyond.returncode == 2 and "the indices are 0 to 191" in beyond.stderr
    for arguments, variables in ((["x.yaml"], {}), ([], {"SLURM_ARRAY_TASK_ID": "5"})):
        refused = dry_run(SWEEP, *arguments, **variables)
        assert refused.returncode == 2 and "this is no task of a Slurm array" in refused.stderr


def test_slurm_accepts_every_file_as_it_stands(cluster: SlurmCluster) -> None:
    cluster.start_nodes(max(int(directive(path, "nodes")) for path in FILES))
    for path in (*FILES, CHECK):
        result = cluster.run("sbatch", "--test-only", f"slurm/{path.name}", "data.path=x", cwd=ROOT)
        assert "to start at" in result.stderr and " processors on nodes " in result.stderr, result.stderr
    more = cluster.run("sbatch", "--test-only", "--nodes=2", "--time=1:00:00", f"slurm/{FILES[0].name}", cwd=ROOT)
    assert "to start at" in more.stderr
