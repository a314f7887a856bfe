"""Jobs whose layout the planner chooses, on a real Slurm cluster: named fields stay, a lost node changes the rest."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.config import Config, load_named_config
from mlra_scale.planning.choice import engines
from mlra_scale.planning.cluster import FREE_SHARE, GIB, named_cluster
from mlra_scale.planning.search import Candidate, search
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import EARLY, ENDLESS, MIDDLE, PATIENCE, TINY, compared, submit
from tests.support.pool import WorkerPool
from tests.support.training_runs import Finished, events, main_on_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * PATIENCE), pytest.mark.usefixtures("calm")]

AUTO = "parallel.layout=auto"


def layouts_on(num_nodes: int) -> list[Candidate]:
    """The layouts of one rank per node, fastest first, where memory is no matter."""
    overrides = [*TINY, *ENDLESS, AUTO, "train.device=cpu"]
    config, named = load_named_config("gpt2-mlra-72l", overrides=overrides)
    cluster = replace(named_cluster("cpu"), nodes=num_nodes, devices_per_node=1)
    return search(config, named, cluster, engines()).feasible


def fastest_within(layouts: list[Candidate], num_bytes: float) -> Config:
    """The fastest layout that needs at most so many bytes."""
    return next(each.config for each in layouts if each.memory.device <= num_bytes)


def memory_that_forces_a_change() -> tuple[float, Config, Config]:
    """Bytes for tensors with which two nodes run a pipeline and one node must checkpoint, and both configurations."""
    two, one = layouts_on(2), layouts_on(1)
    without = [each for each in one if each.config.parallel.activation_checkpointing != "block"]
    least = min(each.memory.device for each in one)
    num_bytes = (least + min(each.memory.device for each in without)) / 2
    return num_bytes, fastest_within(two, num_bytes), fastest_within(one, num_bytes)


def undisturbed(pool: WorkerPool, config: Config, data: Path, folder: Path, last_step: int) -> list[dict[str, Any]]:
    """The record of the run with the layout of its first nodes, without Slurm and to a step."""
    parallel = config.parallel
    layout = [f"parallel.pipeline={parallel.pipeline}", f"parallel.tensor={parallel.tensor}"]
    arguments = ["--preset", "gpt2-mlra-72l", "--run-dir", str(folder), "guard.enabled=true", *TINY, *ENDLESS, *layout]
    arguments += [f"train.steps={last_step + 1}", f"data.path={data}", "wandb.mode=disabled"]
    finished: list[Finished] = pool.run(main_on_rank, tuple(arguments), timeout=PATIENCE)
    assert [result.code for result in finished] == [0, 0], finished[0].stderr[-3000:]
    return compared(folder, last_step)


def test_a_lost_node_changes_the_layout_and_not_the_samples(
    cluster: SlurmCluster, worker_pool: Callable[[int], WorkerPool], training_data: Path, tmp_path: Path
) -> None:
    num_bytes, on_two, on_one = memory_that_forces_a_change()
    assert on_two.parallel.pipeline == 2 and on_two.parallel.activation_checkpointing == "none"
    assert on_one.parallel.pipeline == 1 and on_one.parallel.activation_checkpointing == "block"
    memory = (named_cluster("cpu").reserved + num_bytes) / (1 - FREE_SHARE) / GIB
    sbatch = ("--nodes=1-2", "--no-kill", "--no-requeue")
    overrides = (*ENDLESS, AUTO, "cluster.elastic=true", f"cluster.device_memory_gib={memory!r}")
    job = submit(cluster, tmp_path, "train_mlra_72L.sh", *overrides, sbatch=sbatch, data=training_data)
    job.wait_for_step(EARLY)
    cluster.kill_node(job.nodes()[1])
    job.wait_for_attempt(2, MIDDLE)
    last = job.stop(may_requeue=False)
    assert job.ends() == ["lost_node", "preempted"]
    assert [attempt["num_ranks"] for attempt in job.job_file()["attempts"]] == [2, 1]
    changed = {event["field"]: (event["was"], event["now"]) for event in events(job.run) if event["event"] == "changed"}
    assert changed["parallel.pipeline"] == (2, 1)
    assert changed["parallel.activation_checkpointing"] == ("none", "block")
    assert job.text().count("Layout, chosen by the planner") == 2
    ours = compared(job.run)
    theirs = undisturbed(worker_pool(2), on_two, training_data, tmp_path / "reference", last)
    assert [item["consumed_samples"] for item in ours] == [item["consumed_samples"] for item in theirs]
    losses = [item.get("loss", 0.0) for item in theirs]
    assert [item.get("loss", 0.0) for item in ours] == pytest.approx(losses, rel=1e-5)


def test_a_named_mesh_stays_and_the_planner_chooses_the_rest(
    cluster: SlurmCluster, training_data: Path, tmp_path: Path
) -> None:
    """The command in the file's header: tensor 2 x pipeline 4, on eight ranks."""
    named = ("parallel.tensor=2", "parallel.pipeline=4", AUTO, "train.steps=2")
    job = submit(cluster, tmp_path, "train_mlra_72L.sh", *named, processes=4, data=training_data)
    job.wait_for_end()
    assert "8 rank(s): tensor 2" in job.text() and "x pipeline 4 x data 1" in job.text()
    assert "kept as named: parallel.tensor, parallel.pipeline, train.micro_batch_size" in job.text()
    stored = Config.from_yaml((job.run / "config.yaml").read_text())
    assert (stored.parallel.layout, stored.parallel.tensor, stored.parallel.pipeline) == ("auto", 2, 4)
    assert compared(job.run)[-1]["step"] == 2
