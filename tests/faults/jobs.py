"""Kills and disturbances of jobs on a Slurm cluster of this machine's own (tests/slurm/cluster.py)."""

import contextlib
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.bench import Bench
from tests.faults.case import SAME, Case, assert_refused, run_to_end
from tests.faults.launching import Forked
from tests.faults.places import disk, fill
from tests.slurm import keeper
from tests.slurm.cluster import SlurmCluster, wait_until
from tests.slurm.jobs import EARLY, MIDDLE, PATIENCE, TINY, Submitted, compared, submit
from tests.support.training_runs import ROOT

SCRIPT = "pretrain_zero3.sh"
TWO_NODES = ("--nodes=2",)
Act = Callable[[Bench, Path, SlurmCluster], object]
SAID = "it is a failure that counts; submitted again, the job ends as done with the undisturbed run"
DONE = "the job ends as done, and the run is the undisturbed one"


def undisturbed(bench: Bench, num_ranks: int) -> Path:
    """The run of the job without Slurm."""
    with bench.lock:
        run = bench.folder / f"undisturbed-job-{num_ranks}"
        if not run.exists():
            command = ["--preset", "gpt2-mlra-72l", "--ds-config", str(ROOT / "ds_configs/zero3.json")]
            command += ["--run-dir", str(run), "guard.enabled=true", *TINY, f"data.path={bench.data}"]
            launch = Forked([*command, "wandb.mode=disabled"], num_ranks, bench.folder / f"{run.name}.log")
            assert launch.wait(PATIENCE) == 0, launch.output()[-3000:]
        return run


def job(
    name: str, done: str, act: Callable[[Bench, Path, SlurmCluster], object], promise: str, num_kills: int = 0
) -> Case:
    """A case with the cluster; nothing of it is left in the queue."""

    def do(bench: Bench, place: Path) -> None:
        cluster = bench.cluster()
        cluster.start_nodes(3)
        try:
            act(bench, place, cluster)
        except TimeoutError as error:
            raise AssertionError(str(error)) from error
        finally:
            cluster.cancel_all()

    return Case(name, done, promise, do, num_kills, needs="slurm")


def pids(cluster: SlurmCluster, module: str, node: str | None = None) -> list[int]:
    """Processes of a module of ours on the nodes."""
    found = []
    for name in ("n1", "n2", "n3") if node is None else (node,):
        for pid in cluster.processes(name):
            with contextlib.suppress(OSError):
                if f"-m\0{module}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
    return found


def kill(cluster: SlurmCluster, module: str, node: str | None = None) -> None:
    """Kills them, as soon as there are any."""
    wait_until(lambda: bool(pids(cluster, module, node)), PATIENCE, lambda: f"{module} does not run")
    keeper.send(pids(cluster, module, node), signal.SIGKILL)


def assert_job_is_undisturbed(bench: Bench, submitted: Submitted, num_ranks: int) -> None:
    """Waits for the end of the job, and compares."""
    submitted.wait_for_end()
    assert "Traceback" not in submitted.text(), submitted.text()[-3000:]
    assert submitted.job_file()["state"] == "done"
    assert compared(submitted.run) == compared(undisturbed(bench, num_ranks))


def kills_at_restarts(bench: Bench, place: Path, cluster: SlurmCluster) -> None:
    """Ranks, then the agent of a node while it restarts, then the process of the job while that restarts."""
    first = submit(cluster, place, SCRIPT, sbatch=TWO_NODES, data=bench.data)
    first.wait_for_step(EARLY)
    kill(cluster, "mlra_scale.cluster.rank", first.nodes()[1])
    wait_until(lambda: len(first.job_file()["attempts"]) == 2, PATIENCE, first.text)
    second = first.nodes()[1]
    wait_until(lambda: bool(pids(cluster, "mlra_scale.cluster.rank", second)), PATIENCE, first.text)
    kill(cluster, "mlra_scale.cluster.node", second)
    wait_until(lambda: len(first.job_file()["attempts"]) == 3 or first.has_ended(), PATIENCE, first.text)
    kill(cluster, "mlra_scale.cluster.job")
    wait_until(first.has_ended, PATIENCE, first.text)
    again = submit(cluster, place / "again", SCRIPT, sbatch=TWO_NODES, data=bench.data, run=first.run)
    again.wait_for_step(MIDDLE)
    kill(cluster, "mlra_scale.cluster.job")
    wait_until(again.has_ended, PATIENCE, again.text)
    last = submit(cluster, place / "last", SCRIPT, sbatch=TWO_NODES, data=bench.data, run=first.run)
    assert_job_is_undisturbed(bench, last, 2)


def address(cluster: SlurmCluster) -> tuple[str, int]:
    """Where the job listens."""
    wait_until(lambda: bool(pids(cluster, "mlra_scale.cluster.node")), PATIENCE, lambda: "no agent")
    line = Path(f"/proc/{pids(cluster, 'mlra_scale.cluster.node')[0]}/cmdline").read_bytes().decode()
    found = re.search(r"\0--job[=\0]\[?([^\0]*?)\]?:(\d+)\0", line)
    assert found is not None, line
    return found[1], int(found[2])


def strangers(bench: Bench, place: Path, cluster: SlurmCluster) -> None:
    """Everything that somebody who finds the port may send."""
    submitted = submit(cluster, place, SCRIPT, sbatch=("--nodes=1",), data=bench.data)
    where = address(cluster)
    said = [
        b'{"node": "n9", "token": "\\ud800"}\n',
        b'{"node": "\\ud800", "token": "x"}\n',
        b"GET / HTTP/1.1\r\nHost: job\r\n\r\n",
        bytes(range(256)) * 64 + b"\n",
        b"[" * 200_000 + b"\n",
        b'{"node": ["n1"], "token": {"a": 1}}\n{"ended": {"code": 0}}\n',
        b'"n1"\n7\nnull\n',
        b"x" * (32 << 20),
        b'{"node": "n1"',
        b"",
    ]
    with contextlib.ExitStack() as stack:
        for content in said:
            with contextlib.suppress(OSError):
                connection = stack.enter_context(socket.create_connection(where, timeout=5.0))
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR) if len(content) % 2 else None
        for _ in range(1100):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(where, timeout=5.0))
        submitted.wait_for_step(MIDDLE)
        # An attempt that begins among them: its node must be heard.
        kill(cluster, "mlra_scale.cluster.rank")
        submitted.wait_for_end()
    assert submitted.ends() == ["failed", "done"], submitted.ends()
    assert_job_is_undisturbed(bench, submitted, 1)


def cancelled_after_requeue(bench: Bench, place: Path, cluster: SlurmCluster) -> None:
    """`scontrol requeue`, and `scancel` while the job waits."""
    submitted = submit(cluster, place, SCRIPT, sbatch=("--nodes=1",), data=bench.data)
    submitted.wait_for_step(EARLY)
    cluster.run("scontrol", "requeuehold", submitted.job_id)
    wait_until(lambda: cluster.job(submitted.job_id)["JobState"] == "PENDING", PATIENCE, submitted.text)
    cluster.run("scontrol", "release", submitted.job_id)
    submitted.wait_for_attempt(2, EARLY)
    cluster.run("scancel", submitted.job_id)
    wait_until(submitted.has_ended, PATIENCE, submitted.text)
    wait_until(lambda: not pids(cluster, "mlra_scale.cluster.job"), PATIENCE, submitted.text)
    assert submitted.job_file()["state"] == "cancelled", submitted.job_file()["state"]


def full_at_restart(bench: Bench, place: Path, cluster: SlurmCluster) -> None:
    """The disk of the run directory is full when the job restarts its ranks."""
    with disk(place, 64 << 20) as folder:
        run = folder / "run"
        submitted = submit(cluster, place, SCRIPT, sbatch=("--nodes=1",), data=bench.data, run=run)
        submitted.wait_for_step(EARLY)
        file = fill(folder)
        kill(cluster, "mlra_scale.cluster.rank")
        wait_until(submitted.has_ended, PATIENCE, submitted.text)
        text = submitted.text()
        assert "failures in a row" in text and "No space left on device" in text, text[-1000:]
        assert submitted.job_file()["state"] != "done"
        file.unlink()
        again = submit(cluster, place / "again", SCRIPT, sbatch=("--nodes=1",), data=bench.data, run=run)
        assert_job_is_undisturbed(bench, again, 1)


def from_salloc(bench: Bench, place: Path, cluster: SlurmCluster) -> None:
    """Submitted from a shell that salloc has made, with its variables."""
    outer: dict[str, Any] = {
        "SLURM_MEM_PER_CPU": "100",
        "SLURM_MEM_PER_NODE": "100",
        "SLURM_NTASKS_PER_GPU": "1",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "interactive",
    }
    submitted = submit(cluster, place, SCRIPT, sbatch=("--nodes=1",), data=bench.data, **outer)
    assert_job_is_undisturbed(bench, submitted, 1)


def memory_per_cpu(bench: Bench, place: Path, cluster: SlurmCluster) -> None:
    """`sbatch --mem-per-cpu` over the file's own `--mem`."""
    options = ("--nodes=1", "--mem-per-cpu=500")
    submitted = submit(cluster, place, SCRIPT, sbatch=options, data=bench.data)
    assert_job_is_undisturbed(bench, submitted, 1)


def forgotten(bench: Bench, place: Path) -> None:
    """No data.path, found on the login node."""
    run = place / "run"
    line = ["bash", f"slurm/{SCRIPT}", "--check", "--run-dir", str(run), *TINY]
    assert_refused(run_to_end(line, place / "check.log", code=2, VENV=sys.prefix), "data.path")
    assert not run.exists()


CASES = (
    job(
        "kills at a job's restarts",
        "two nodes: SIGKILL of a rank, of a node's agent at the restart, of the job's process twice",
        kills_at_restarts,
        SAME,
        num_kills=4,
    ),
    job(
        "strangers at a job's port",
        "1,100 idle ones, lone surrogates, deep nesting, 32 MB without an end, binary; then a restart",
        strangers,
        DONE,
    ),
    job("scancel after requeue", "requeue, then scancel", cancelled_after_requeue, "job.json says cancelled"),
    job("disk full at a job's restart", "the disk is full when ranks are restarted", full_at_restart, SAID),
    job("submitted from salloc", "memory, binding and tasks of an outer allocation", from_salloc, DONE),
    job("--mem-per-cpu", "sbatch --mem-per-cpu=500", memory_per_cpu, DONE),
    Case("data.path forgotten", "bash slurm/FILE --check", "exit code 2, named, no run directory", forgotten),
)
