"""The sbatch files on a real Slurm cluster: whole runs, what interrupts them, and what must not be queued again."""

import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import keeper
from tests.slurm.cluster import SlurmCluster, wait_until
from tests.slurm.jobs import (
    EARLY,
    ENDLESS,
    LATE,
    MIDDLE,
    PATIENCE,
    TINY,
    Submitted,
    compared,
    moment,
    timed,
)
from tests.support.pool import WorkerPool
from tests.support.training_runs import ROOT, Finished, environment, events, main_on_rank
from tests.support.wandb_reader import history, run_ids

pytestmark = [pytest.mark.timeout(6 * PATIENCE), pytest.mark.usefixtures("calm")]

PIPELINE = ("parallel.tensor=1", "parallel.pipeline=2")
# Four ranks on few cores are slow.
TP2_PP2 = ("parallel.tensor=2", "parallel.pipeline=2", "train.steps=8")
TP2_DP2 = ("parallel.tensor=2", "train.steps=8")
ZERO3 = "ds_configs/zero3.json"
ZERO1 = "ds_configs/zero1_pipeline.json"
WITH_ZERO1 = ("--ds-config", ZERO1)

Reference = Callable[..., Path]
Start = Callable[..., Submitted]


@pytest.fixture
def reference(
    worker_pool: Callable[[int], WorkerPool], training_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """reference(overrides, ds_config, ranks): the run directory of the same run without Slurm and interruption."""

    def run(overrides: tuple[str, ...], ds_config: str, ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("reference") / "run"
        command = ["--preset", "gpt2-mlra-72l", "--ds-config", str(ROOT / ds_config), "--run-dir", str(folder)]
        command.append("guard.enabled=true")  # as the files of slurm/ have it
        arguments = (*command, *TINY, *overrides, f"data.path={training_data}", "wandb.mode=disabled")
        finished: list[Finished] = worker_pool(ranks).run(main_on_rank, arguments, timeout=PATIENCE)
        assert [result.code for result in finished] == [0] * ranks, finished[0].stderr[-3000:]
        return folder

    return run


@pytest.mark.slow
def test_a_pipeline_over_two_nodes_is_the_run_without_slurm(
    cluster: SlurmCluster, reference: Reference, start: Start
) -> None:
    job = start("train_mlra_72L.sh", *WITH_ZERO1, *TP2_PP2, processes=2)
    record = job.wait_for_end()
    assert record["NumNodes"] == "2" and record["Restarts"] == "0"
    assert compared(job.run) == compared(reference(TP2_PP2, ZERO1, 4))
    assert job.job_file()["state"] == "done" and job.ends() == ["done"]
    assert "checks passed: 4 rank(s) on 2 node(s)" in job.text()
    logs = sorted(path.name for path in (job.run / "logs" / "attempt-001").glob("rank-*.log"))
    assert logs == [f"rank-{rank:05d}.log" for rank in range(4)]
    assert "[0] step 8/8" in (job.run / "logs" / "console.log").read_text()
    exported = subprocess.run(
        [sys.executable, "tools/export_hf.py", str(job.run), str(job.run / "exported")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert exported.returncode == 0, exported.stderr
    assert (job.run / "exported" / "model.safetensors").is_file()


@pytest.mark.slow
def test_zero_3_over_two_nodes_is_the_run_without_slurm(
    cluster: SlurmCluster, reference: Reference, start: Start
) -> None:
    job = start("pretrain_zero3.sh", *TP2_DP2, processes=2)
    job.wait_for_end()
    assert compared(job.run) == compared(reference(TP2_DP2, ZERO3, 4))


def uninterrupted(reference: Reference, overrides: tuple[str, ...], ds_config: str, last_step: int) -> list[Any]:
    """The record of an endless run up to a step, without Slurm and interruption."""
    # One step more: at its last step a run evaluates.
    run = reference((*overrides, *ENDLESS, f"train.steps={last_step + 1}"), ds_config, 2)
    return compared(run, last_step)


def test_a_requeue_loses_nothing(cluster: SlurmCluster, reference: Reference, start: Start) -> None:
    job = start("train_mlra_72L.sh", *WITH_ZERO1, *PIPELINE, *ENDLESS)
    job.wait_for_step(EARLY)
    cluster.run("scontrol", "requeue", job.job_id)
    job.wait_for_attempt(2, MIDDLE)
    last = job.stop()
    assert cluster.job(job.job_id)["NumNodes"] == "2" and job.ends() == ["preempted"] * 2
    assert "checks passed: 2 rank(s) on 2 node(s)" in job.text()
    stops = [event["step"] for event in events(job.run) if event["event"] == "preempted"]
    assert stops[-1] == last
    assert [event["step"] for event in events(job.run) if event["event"] == "resume"] == stops[:1]
    assert compared(job.run) == uninterrupted(reference, PIPELINE, ZERO1, last)


@pytest.mark.slow
def test_requeue_sigterm_and_time_limit_lose_nothing(cluster: SlurmCluster, reference: Reference, start: Start) -> None:
    job = start("train_mlra_72L.sh", *WITH_ZERO1, *PIPELINE, *ENDLESS)
    job.wait_for_step(EARLY)
    cluster.run("scontrol", "requeue", job.job_id)
    job.wait_for_attempt(2, MIDDLE)
    assert "Slurm is ending the job already: preempted" in job.text()
    cluster.run("scancel", "--signal=TERM", job.job_id)
    job.wait_for_attempt(3, LATE)
    # The file asks for SIGUSR1 600 s before the time limit. From now on less is left; Slurm looks every 30 s.
    hours, minutes, _ = map(int, cluster.job(job.job_id)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={60 * hours + minutes + 9}")
    wait_until(lambda: len(job.job_file()["attempts"]) >= 4 or job.has_ended(), PATIENCE, job.text)
    # Slurm may have signalled the fourth too, whose limit is as short.
    cluster.run("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=UNLIMITED")
    job.wait_for_attempt(4, job.step() + 1)
    last = job.stop()
    assert int(cluster.job(job.job_id)["Restarts"]) >= 3
    assert set(job.ends()) == {"preempted"} and len(job.ends()) >= 4
    # Each began where the one before it had stopped (one that was stopped before it began did nothing): no step twice.
    stops = [event["step"] for event in events(job.run) if event["event"] == "preempted"]
    assert 4 <= len(stops) <= len(job.ends()) and stops[-1] == last
    assert [event["step"] for event in events(job.run) if event["event"] == "resume"] == stops[:-1]
    assert all(event["records_cut"] == 0 for event in events(job.run) if event["event"] == "resume")
    assert compared(job.run) == uninterrupted(reference, PIPELINE, ZERO1, last)
    assert len(set(run_ids(job.run))) == 1 and len(run_ids(job.run)) >= 4
    logged = {row["_step"]: row["loss"] for row in history(job.run) if "loss" in row}
    assert logged == {item["step"]: item["loss"] for item in compared(job.run) if "loss" in item}


@pytest.mark.slow
def test_a_killed_and_a_stopped_rank_are_named_and_the_run_continues(
    cluster: SlurmCluster, reference: Reference, start: Start
) -> None:
    """The ranks that follow the first end have waited for it."""
    overrides = (*PIPELINE, *ENDLESS, "cluster.hang_minutes=0.5", "cluster.spares=true")
    job = start("train_mlra_72L.sh", *WITH_ZERO1, *overrides)
    job.wait_for_spares(1)
    job.wait_for_step(EARLY)
    second = job.nodes()[1]
    killed_at = timed(lambda: job.signal_rank(second, signal.SIGKILL))
    job.wait_for_attempt(2, MIDDLE)
    first = job.nodes()[0]
    stopped_at = timed(lambda: job.signal_rank(first, signal.SIGSTOP))
    job.wait_for_attempt(3, job.step() + 1)
    last = job.stop()
    text, attempts = job.text(), job.job_file()["attempts"]
    assert job.ends() == ["failed", "hung", "preempted"]
    assert cluster.job(job.job_id)["Restarts"] == "0", "the job stayed in its allocation"
    assert "the spare ranks begin" in text[: text.index("attempt 2: training since")]
    assert f"rank 1 on {second} was killed by SIGKILL" in attempts[0]["reason"]
    assert "rank 0 no sign of life" in attempts[1]["reason"] and ": stopped)" in attempts[1]["reason"]
    stacks = job.run / "logs" / "attempt-002" / "rank-00001.stacks"
    assert "mlra_scale" in stacks.read_text(), "the rank that still answers shows where it is"
    assert compared(job.run) == uninterrupted(reference, PIPELINE, ZERO1, last)
    noticed = moment(text, "was killed by SIGKILL; the attempt ends") - killed_at
    hung = moment(text, "hang: no progress") - stopped_at
    back = moment(text, "attempt 2: training since") - killed_at
    print(
        f"killed rank: noticed after {noticed:.1f} s, first new step after {back:.1f} s; hang: named after {hung:.1f} s"
    )
    assert hung >= 29


@pytest.mark.slow
def test_a_lost_node_is_noticed_and_the_job_continues_without_it(
    cluster: SlurmCluster, reference: Reference, start: Start
) -> None:
    job = start("pretrain_zero3.sh", *ENDLESS)
    job.wait_for_step(EARLY)
    lost = job.nodes()[1]
    killed_at = timed(lambda: cluster.kill_node(lost))
    job.wait_for_attempt(2, MIDDLE)
    last = job.stop()
    assert cluster.job(job.job_id)["Restarts"] == "1" and lost not in job.nodes()
    assert job.ends() == ["lost_node", "preempted"]
    assert "its connection broke" in job.job_file()["attempts"][0]["reason"]
    assert compared(job.run) == uninterrupted(reference, (), ZERO3, last)
    noticed = moment(job.text(), f"node {lost} is lost") - killed_at
    back = moment(job.text(), "attempt 2: training since") - killed_at
    print(f"lost node: noticed after {noticed:.1f} s, first new step on other nodes after {back:.1f} s")


@pytest.mark.slow
def test_an_elastic_job_continues_with_the_nodes_that_are_left(
    cluster: SlurmCluster, reference: Reference, start: Start
) -> None:
    # Slurm without accounting takes no update of a job once its size has changed.
    sbatch = ("--nodes=1-2", "--no-kill", "--no-requeue")
    elastic = (*ENDLESS, "cluster.elastic=true")
    job = start("pretrain_zero3.sh", *elastic, sbatch=sbatch)
    job.wait_for_step(EARLY)
    lost = job.nodes()[1]
    killed_at = timed(lambda: cluster.kill_node(lost))
    job.wait_for_attempt(2, MIDDLE)
    last = job.stop(may_requeue=False)
    assert cluster.job(job.job_id)["Restarts"] == "0" and job.ends() == ["lost_node", "preempted"]
    attempts = job.job_file()["attempts"]
    assert [attempt["num_ranks"] for attempt in attempts] == [2, 1]
    changed = [event for event in events(job.run) if event["event"] == "changed"]
    assert ("number of ranks", 2, 1) in [(event["field"], event["was"], event["now"]) for event in changed]
    ours, theirs = compared(job.run), uninterrupted(reference, (), ZERO3, last)
    assert [item["consumed_samples"] for item in ours] == [item["consumed_samples"] for item in theirs]
    assert [item.get("loss", 0.0) for item in ours] == pytest.approx(
        [item.get("loss", 0.0) for item in theirs], rel=1e-5
    )
    back = moment(job.text(), "attempt 2: training since") - killed_at
    print(f"elastic: first new step on the node that is left after {back:.1f} s")


@pytest.mark.slow
def test_a_bad_node_is_named_and_excluded(cluster: SlurmCluster, start: Start, tmp_path: Path) -> None:
    """One node has another release of a library: its interpreter finds other metadata first."""
    other = tmp_path / "other" / "deepspeed-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.9.9\n")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f"if [[ $SLURMD_NODENAME == n2 ]]; then export PYTHONPATH={other.parent}:$PYTHONPATH; fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    job = start("pretrain_zero3.sh", sbatch=("--nodes=2", "--nodelist=n2"), MLRA_PYTHON=str(python))
    wait_until(lambda: "bad node n2" in job.text() or job.has_ended(), PATIENCE, job.text)
    # The test asked for the node by name, which no user would; the exclusion must not wait for it.
    wait_until(lambda: cluster.job(job.job_id)["ExcNodeList"] == "n2" or job.has_ended(), PATIENCE, job.text)
    cluster.run("scontrol", "update", f"JobId={job.job_id}", "ReqNodeList=")
    record = job.wait_for_end()
    assert record["Restarts"] == "1" and "n2" not in job.nodes()
    assert job.ends() == ["bad_node", "done"]
    assert job.job_file()["excluded"] == {"n2": "has deepspeed 9.9.9 instead of 0.19.8"}


FLIPPING = """
import sys, threading, time

def flip_when_loaded():
    while "mlra_scale.training.loop.trainer" not in sys.modules:
        time.sleep(0.01)
    import torch
    from mlra_scale.stability.corruption import CorruptionCheck
    before_step = CorruptionCheck.before_step

    def flipping(check, step):
        before_step(check, step)
        if step.number == 7:
            weights = check._engine._view.adam.masters[0].data.view(-1)
            weights[:1].view(torch.int32).bitwise_xor_(1 << 20)

    CorruptionCheck.before_step = flipping

threading.Thread(target=flip_when_loaded, daemon=True).start()
"""


@pytest.mark.slow
def test_a_node_whose_memory_flips_a_bit_is_named_and_excluded_and_nothing_is_lost(
    cluster: SlurmCluster, start: Start, reference: Reference, tmp_path: Path
) -> None:
    """At step 7 of every start there: the run is back at the checkpoint of step 5 when its job is queued again."""
    (tmp_path / "sitecustomize.py").write_text(FLIPPING)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f"if [[ $SLURMD_NODENAME == n2 ]]; then export PYTHONPATH={tmp_path}:$PYTHONPATH; fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    job = start(
        "pretrain_zero3.sh",
        "guard.checksum_every=1",
        "checkpoint.every=5",
        "train.steps=12",
        sbatch=("--nodes=2", "--nodelist=n2"),
        MLRA_PYTHON=str(python),
    )
    wait_until(lambda: cluster.job(job.job_id)["ExcNodeList"] == "n2" or job.has_ended(), PATIENCE, job.text)
    cluster.run("scontrol", "update", f"JobId={job.job_id}", "ReqNodeList=")
    job.wait_for_end()
    assert "n2" not in job.nodes() and job.ends() == ["bad_node", "done"]
    ((node, reason),) = job.job_file()["excluded"].items()
    assert node == "n2" and "on n2 holds weights or moments that changed without an update" in reason
    assert compared(job.run) == compared(reference(("checkpoint.every=5", "train.steps=12"), ZERO3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["a file/run", "/proc/1/run"])
def test_a_run_directory_that_cannot_be_made_is_bad_input(start: Start, tmp_path: Path, run: str) -> None:
    (tmp_path / "a file").write_text("")
    folder = tmp_path / run
    job = start("train_mlra_72L.sh", *WITH_ZERO1, *PIPELINE, run=folder)
    record = job.wait_for_end("FAILED")
    assert record["Restarts"] == "0" and record["ExitCode"] == "2:0"
    assert "--run-dir" in job.text() and "Traceback" not in job.text()


@pytest.mark.slow
def test_a_crash_loop_ends(cluster: SlurmCluster, start: Start) -> None:
    job = start("pretrain_zero3.sh", *ENDLESS, "checkpoint.every=1000000", "cluster.max_failures=2")

    def kill_until_it_gives_up() -> bool:
        if (job.run / "job.json").exists():
            for node in ("n1", "n2", "n3"):
                keeper.send(job.rank_pids(node)[:1], signal.SIGKILL)
        return job.has_ended()

    wait_until(kill_until_it_gives_up, PATIENCE, job.text)
    record = job.wait_for_end("FAILED")
    assert record["Restarts"] == "0" and job.ends() == ["failed", "failed"]
    assert "2 failures in a row without a newer checkpoint" in job.job_file()["reason"]


@pytest.mark.slow
def test_two_jobs_on_the_same_nodes_do_not_meet(reference: Reference, start: Start, tmp_path: Path) -> None:
    words, sbatch = (*WITH_ZERO1, *PIPELINE, *ENDLESS), ("--nodes=2", "--nodelist=n1,n2")
    folders = [tmp_path / "first", tmp_path / "second"]
    jobs = [start("train_mlra_72L.sh", *words, sbatch=sbatch, folder=folder) for folder in folders]
    for job in jobs:
        job.wait_for_step(EARLY)
    assert all(not job.has_ended() for job in jobs), "both run at the same time"
    last = [job.stop() for job in jobs]
    wanted = uninterrupted(reference, PIPELINE, ZERO1, max(last))
    for job, step in zip(jobs, last, strict=True):
        assert compared(job.run) == [item for item in wanted if item["step"] <= step]


@pytest.mark.slow
def test_jobs_are_listed(cluster: SlurmCluster, start: Start, tmp_path: Path) -> None:
    """tools/jobs.py on a running job, with the real squeue."""

    def listed() -> str:
        tool = (sys.executable, str(ROOT / "tools" / "jobs.py"), str(tmp_path))
        return cluster.run(*tool, env=environment(), cwd=ROOT).stdout

    job = start("pretrain_zero3.sh", *ENDLESS, sbatch=("--nodes=1",))
    # Ranks report to their node every second, and nodes to the job.
    wait_until(lambda: job.has_ended() or (job.step() > 0 and job.job_file()["state"] == "running"), PATIENCE, job.text)
    assert "running" in (text := listed()) and job.job_id in text, text
    cluster.run("scontrol", "requeuehold", job.job_id)
    wait_until(lambda: cluster.job(job.job_id)["JobState"] == "PENDING", PATIENCE, job.text)
    assert "queued" in (text := listed()), text
