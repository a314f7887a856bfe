"""The cluster that other tests stand on: it starts, loses nodes like machines, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, parse_record, wait_until

pytestmark = pytest.mark.usefixtures("calm")

# A process that has left its step in every way there is: another session, another parent, signals ignored.
ESCAPING = "trap '' TERM HUP; (setsid sleep 1000 &); srun sleep 1000"


def processes_of(cluster_conf: str) -> list[str]:
    """The command lines of all live processes on this machine that were started for a cluster."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"SLURM_CONF={cluster_conf}".encode() in variables:
            found.append(f"{folder.name} {command}")
    return found


def test_records_are_parsed() -> None:
    line = "JobId=7 JobName=a b=c Command=/x/y z.sh --nodes=2 TRES=cpu=2,node=1 CPUs/Task=1 Power= NtasksPerN:B:S:C=0:0"
    record = parse_record(line)
    assert record["JobName"] == "a b=c"
    assert record["Command"] == "/x/y z.sh --nodes=2"
    assert (record["TRES"], record["CPUs/Task"], record["Power"]) == ("cpu=2,node=1", "1", "")


def test_a_killed_node_is_gone_at_once_and_comes_back(cluster: SlurmCluster) -> None:
    job_id = cluster.sbatch("--nodelist=n2", "--no-requeue", f"--wrap={ESCAPING}")
    cluster.wait_for(job_id, "RUNNING")
    # slurmd, two step daemons, the script, srun (itself two processes), two sleeps
    wait_until(lambda: len(cluster.processes("n2")) >= 8, 20, lambda: str(cluster.processes("n2")))
    pids, others = cluster.processes("n2"), cluster.processes("n1")
    cluster.kill_node("n2")
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert cluster.processes("n2") == [] and cluster.processes("n1") == others
    cluster.mark_down("n2")
    cluster.wait_for(job_id, "NODE_FAIL")
    cluster.start_nodes(3)
    cluster.wait_for(cluster.sbatch("--nodelist=n2", "--wrap=srun true"), "COMPLETED")


def test_nothing_is_left_after_stop(tmp_path: Path) -> None:
    with SlurmCluster(tmp_path / "own", nodes=2) as own:
        own.wait_for(own.sbatch("--nodes=2", f"--wrap={ESCAPING}"), "RUNNING")
        time.sleep(1)
        assert len(processes_of(own.environment["SLURM_CONF"])) >= 9
        with pytest.raises(AssertionError, match="is COMPLETED"):
            own.wait_for(own.sbatch("--wrap=true"), "FAILED")
    assert processes_of(own.environment["SLURM_CONF"]) == []


@pytest.mark.slow_except("9")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path, end: signal.Signals) -> None:
    program = f"""
import time
from pathlib import Path
from tests.slurm.cluster import SlurmCluster
with SlurmCluster(Path({str(tmp_path / "own")!r}), nodes=1) as own:
    own.wait_for(own.sbatch("--wrap", {ESCAPING!r}), "RUNNING")
    print("runs", flush=True)
    time.sleep(600)
"""
    conf = str(tmp_path / "own" / "slurm.conf")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program]
    variables = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=variables, start_new_session=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"runs\n"
            assert processes_of(conf)
        finally:
            os.killpg(owner.pid, end)  # as timeout(1) and a terminal do: the whole group at once
    wait_until(lambda: not processes_of(conf), 20, lambda: str(processes_of(conf)))
