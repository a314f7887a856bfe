"""Where a job is submitted from, and with what options: it gets what it asked for, whatever the shell around it has."""

import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, parse_record
from tests.slurm.jobs import PATIENCE, TINY, submit
from tests.support.training_runs import ROOT, environment

pytestmark = [pytest.mark.timeout(6 * PATIENCE), pytest.mark.usefixtures("calm")]

OUTER = {
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_LIST": "0x1",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_MEM_PER_NODE": "100",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_RESTART_COUNT": "7",
    "SLURM_EXACT": "1",
    "SRUN_CPUS_PER_TASK": "1",
}
"""What a step of another job has in its environment, beside what salloc gives."""
FOREIGN = [*(f"{name}={value}" for name, value in OUTER.items()), "SLURM_MEM_PER_CPU=10", "SLURM_NTASKS_PER_GPU=1"]
"""Variables that no rank of a job which is submitted from there may see."""


def python_that_tells(folder: Path) -> tuple[Path, Path]:
    """An interpreter that notes the step it runs in, and the file it notes it in."""
    python, notes = folder / "python", folder / "steps"
    patterns = shlex.join(word for text in FOREIGN for word in ("-e", text))
    # One write, because nodes share the file.
    python.write_text(
        "#!/bin/bash\n"
        'step=$(scontrol --oneliner show step "$SLURM_JOB_ID.$SLURM_STEP_ID")\n'
        f"foreign=$(env | grep -xF {patterns} | paste -sd,)\n"
        'echo "$step CpuBind=${SLURM_CPU_BIND_TYPE:-} Cores=$SLURM_CPUS_ON_NODE Foreign=$foreign" '
        f">> {shlex.quote(str(notes))}\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python, notes


@pytest.mark.slow
def test_a_job_from_inside_another_one_has_its_own_memory_and_cores(
    cluster: SlurmCluster, training_data: Path, tmp_path: Path
) -> None:
    """srun would take memory, tasks per GPU and CPU binding of the shell for options: some are fatal to it.

    And memory is asked for as --mem-per-cpu, beside which sbatch refuses a --mem of the file.
    """
    python, notes = python_that_tells(tmp_path)
    job = submit(
        cluster,
        tmp_path,
        "pretrain_zero3.sh",
        "train.steps=3",
        sbatch=("--nodes=2", "--mem-per-cpu=1500"),
        data=training_data,
        inside=("salloc", "--nodes=1", "--mem-per-cpu=10", "--ntasks-per-gpu=1", "--gpus=2"),
        MLRA_PYTHON=str(python),
        **OUTER,  # type: ignore[arg-type]
    )
    job.wait_for_end()
    assert job.ends() == ["done"] and job.job_file()["num_requeues"] == 0
    steps = [parse_record(line) for line in notes.read_text().splitlines()]
    # The check of the start on the first node, then one task on each.
    assert [step["Nodes"] for step in steps] == ["1", "2", "2"]
    for step in steps:
        assert (step["CpuBind"], step["Cores"], step["Foreign"]) == ("none", "2", ""), step
        assert f"mem={3000 * int(step['Nodes'])}M" in step["TRES"].split(","), step


@pytest.mark.parametrize(
    "options",
    [(), ("--mem-per-cpu=100",), ("--mem=1000",), ("--mem=0",), ("--mem-per-gpu=100",), ("--exclusive",)],
    ids=lambda options: " ".join(options) or "none",
)
def test_memory_can_be_asked_for_in_every_way(cluster: SlurmCluster, options: tuple[str, ...]) -> None:
    for name in ("train_mlra_72L.sh", "sweep.sh"):
        result = cluster.run("sbatch", "--test-only", "--nodes=1", *options, f"slurm/{name}", "data.path=x", cwd=ROOT)
        assert "to start at" in result.stderr, result.stderr


def check(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a user sees on a login node before submitting."""
    return subprocess.run(
        ["bash", "slurm/pretrain_zero3.sh", "--check", *TINY, *arguments],
        cwd=ROOT,
        env={**environment(), "VENV": sys.prefix, "PROCESSES_PER_NODE": "1", "MLRA_NODES": "2", **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_everything_that_a_start_refuses_is_found_on_a_login_node_at_once(training_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    good = check(f"data.path={training_data}", "--run-dir", str(run))
    assert good.returncode == 0, good.stderr
    assert "2 rank(s)" in good.stdout and "the job would be accepted" in good.stdout
    run.mkdir()
    (run / "job.json").write_text("{")
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    # In a shell of another job, as on a node of salloc.
    bad = check(
        "--run-dir", str(run), "parallel.world_size=64", "parallel.tensor=3", SLURM_JOB_ID="1", SLURM_NTASKS="4"
    )
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    for part in ("data.path", "job.json", "parallel.world_size = 64", "--resume = 'auto'", "parallel.tensor"):
        assert part in bad.stderr, bad.stderr
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "job.json"]


def test_a_forgotten_data_path_is_found_before_ranks_start_and_leaves_nothing(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, "pretrain_zero3.sh", "train.micro_batch_size=3")
    record = job.wait_for_end("FAILED")
    assert record["Restarts"] == "0" and record["ExitCode"] == "2:0", job.text()
    assert "data.path" in job.text() and "train.micro_batch_size" in job.text() and "Traceback" not in job.text()
    assert not job.run.exists()
