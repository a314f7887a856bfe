"""slurm/check.sh on two nodes: what it says of them, and the file that the planner reads."""

import json
import sys
from pathlib import Path

import pytest

from mlra_scale.config import batch_plan, load_config
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file
from mlra_scale.training.start.plan import plan_report
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import PATIENCE, SMALL
from tests.support.tools import run_tool
from tests.support.training_runs import ROOT, environment

pytestmark = [pytest.mark.timeout(6 * PATIENCE), pytest.mark.usefixtures("calm")]


@pytest.mark.slow_except("links")
@pytest.mark.parametrize("steps", [["links"], ["links", "rates", "training", "alone", "layouts"]], ids=["links", "all"])
def test_two_nodes_are_checked_and_the_planner_reads_the_file(
    cluster: SlurmCluster, steps: list[str], tmp_path: Path
) -> None:
    words = ["--quick", "--minutes", "60", "--steps", *steps, "--output", str(tmp_path / "the check")]
    variables = {**environment(), "PROCESSES_PER_NODE": "1", "VENV": sys.prefix}
    options = [*SMALL, "--nodes=2", f"--output={tmp_path / 'slurm.out'}"]
    job = cluster.sbatch(*options, "slurm/check.sh", *words, env=variables, cwd=ROOT)
    record = cluster.wait_for(job, {"COMPLETED", "FAILED"}, 5 * PATIENCE)
    said = (tmp_path / "slurm.out").read_text()
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in (tmp_path / "the check").glob("*.log"))
    assert record["JobState"] == "COMPLETED", said + logs
    summary = json.loads((tmp_path / "the check" / "check.json").read_text())
    assert summary["task"]["world_size"] == 2 and summary["task"]["devices_per_node"] == 1
    states = {name: "agrees" if name in ("training", "layouts") else "measured" for name in steps}
    assert summary["states"] == states
    assert "between nodes, 1 group(s) of 2 at once" in said and "within a node" not in said

    file = tmp_path / "the check" / "cluster.json"
    found, named = read_cluster_file(file), named_cluster("cpu")
    assert (found.nodes, found.devices_per_node, found.link_intra) == (2, 1, named.link_intra)
    assert found.link_inter != named.link_inter and found.latency_inter != named.latency_inter
    assert (found.block_overhead, found.peak_flops) != (named.block_overhead, named.peak_flops) or steps == ["links"]
    plan = run_tool("plan", "--preset", "debug", "--cluster-file", file, "--top", 1)
    assert plan.code == 0 and "cluster cpu, measured: 2 node(s) of 1 device(s)" in plan.stdout, plan.stderr
    config = load_config("debug", overrides=[f"cluster.file={file}", "train.device=cpu"])
    assert "on 2 x 1 cpu, measured: step " in plan_report(config, batch_plan(config, 2))
