"""Submitting the project's own sbatch files to the test cluster, at a tiny width, and looking at what became of them.

``SLURM_TEST_LAYERS`` is the depth: 4 in the suite; 72 gives the figures of docs/slurm.md, and takes an hour.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.slurm import keeper
from tests.slurm.cluster import SlurmCluster, wait_until
from tests.support.training_runs import ROOT, environment, metrics

LAYERS = int(os.environ.get("SLURM_TEST_LAYERS", "4"))
STEPS = 60 if LAYERS <= 8 else 24
EARLY, MIDDLE, LATE = STEPS // 6, STEPS // 2, 3 * STEPS // 4
"""Steps at which things happen to a run."""
ENDLESS = ("train.steps=1000000", "optim.schedule=constant", "optim.warmup_steps=0")
"""A run that a test stops itself, however slow the machine is; what it computes does not depend on train.steps."""
PATIENCE = 300.0 if LAYERS <= 8 else 1200.0
"""Seconds until a run must have come to where a test waits for it."""

TINY = (
    f"model.num_layers={LAYERS}",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.vocab_size=512",
    "model.max_positions=32",
    "train.sequence_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.precision=fp32",
    "train.log_every=1",
    f"train.steps={STEPS}",
    "tev.every=1",
    "evaluation.every=0",
    "evaluation.batches=1",
    "optim.lr=3e-3",
    # So that a run is the same whatever the planner thinks of this machine.
    "parallel.layout=manual",
    f"checkpoint.every={max(2, STEPS // 12)}",
)
# No GPU, and a share of a node, so that several jobs fit; everything else is as it stands in the file.
SMALL = ("--gpus-per-node=0", "--cpus-per-task=2", "--time=60")
COMPARED = ("loss", "gradient_norm", "learning_rate", "tev_mean", "tev_std", "consumed_samples", "validation_loss")


@dataclass
class Submitted:
    """A job of the project on the test cluster."""

    cluster: SlurmCluster
    job_id: str
    run: Path
    output: Path

    def step(self) -> int:
        """The last step that the run has recorded."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # The last line may be half written.
        return max((json.loads(line)["step"] for line in lines[-3:] if line.endswith("}")), default=-1)

    def wait_for_step(self, step: int) -> None:
        """Waits until the run has come to a step."""
        wait_until(lambda: self.step() >= step or self.has_ended(), PATIENCE, self.text)
        assert self.step() >= step, self.text()

    def has_ended(self) -> bool:
        """Whether the job will do nothing more."""
        return self.cluster.job(self.job_id)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait_for_end(self, state: str = "COMPLETED") -> dict[str, str]:
        """Waits for the job's end, and returns Slurm's record of it."""
        try:
            return self.cluster.wait_for(self.job_id, state, PATIENCE)
        except (AssertionError, TimeoutError) as error:
            raise AssertionError(f"{error}\n{self.text()}") from error

    def stop(self, may_requeue: bool = True) -> int:
        """Ends a run that has no end of its own, after a step and with a checkpoint; returns the last recorded step.

        Args:
            may_requeue: Whether Slurm may queue the job again, and has to be kept from it first.
        """
        if may_requeue:
            self.cluster.run("scontrol", "update", f"JobId={self.job_id}", "Requeue=0")
        self.cluster.run("scancel", "--signal=TERM", self.job_id)
        self.wait_for_end("FAILED")
        assert "cannot be queued again" in self.job_file()["reason"] and self.ends()[-1] == "preempted", self.text()
        return self.step()

    def text(self) -> str:
        """The job's output."""
        return self.output.read_text(errors="replace") if self.output.exists() else "no output"

    def job_file(self) -> dict[str, Any]:
        """job.json."""
        content: dict[str, Any] = json.loads((self.run / "job.json").read_text())
        return content

    def wait_for_attempt(self, number: int, step: int) -> None:
        """Waits until an attempt has begun, and has come to a step."""

        def is_there() -> bool:
            path = self.run / "job.json"
            return self.has_ended() or (path.exists() and len(self.job_file()["attempts"]) >= number)

        wait_until(is_there, PATIENCE, self.text)
        wait_until(lambda: self.has_ended() or self._has_trained(number), PATIENCE, self.text)
        self.wait_for_step(step)

    def _has_trained(self, number: int) -> bool:
        # One that was stopped before it began counts too.
        attempts = self.job_file()["attempts"][number - 1 :]
        return any(attempt["first_step_seconds"] is not None for attempt in attempts)

    def rank_pids(self, node: str) -> list[int]:
        """Processes of the ranks on a node that train."""
        logs = f"/logs/attempt-{len(self.job_file()['attempts']):03d}\0".encode()
        name, pids = b"mlra_scale.cluster.rank", self.cluster.processes(node)
        return [pid for pid in pids if name in _of_process(pid, "cmdline") and logs in _of_process(pid, "environ")]

    def wait_for_spares(self, number: int) -> None:
        """Waits until so many sets of spare ranks have been ready, the present one included."""
        wait_until(lambda: self.text().count("spare ranks have loaded") == number, PATIENCE, self.text)

    def signal_rank(self, node: str, number: signal.Signals) -> None:
        """Sends a signal to the first rank on a node, which must be there."""
        (first, *_) = self.rank_pids(node)
        keeper.send([first], number)

    def nodes(self) -> list[str]:
        """Names of the job's nodes; the batch script runs on the first."""
        names: list[str] = self.job_file()["attempts"][-1]["nodes"]
        return names

    def ends(self) -> list[str]:
        """How the attempts ended."""
        return [attempt["end"] for attempt in self.job_file()["attempts"]]


def _of_process(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def submit(
    cluster: SlurmCluster,
    folder: Path,
    script: str,
    *overrides: str,
    sbatch: tuple[str, ...] = ("--nodes=2",),
    processes: int = 1,
    data: Path | None = None,
    run: Path | None = None,
    inside: tuple[str, ...] = (),
    **variables: str,
) -> Submitted:
    """Submits one of slurm/*.sh as a user would, from the project's root, at a tiny size.

    The run (unless `run` is another) and the job's output are in the folder; `overrides` are arguments of the training,
    `sbatch` further options of sbatch, and `variables` of the environment, which is that of a command such as salloc
    where one is given (`inside`).
    """
    # A space on its way through sbatch, the launcher, srun and torchrun.
    run, output = run or folder / "the run", folder / "slurm.out"
    folder.mkdir(parents=True, exist_ok=True)
    # The environment that the tests run in has no home of wandb, no GPU, and the interpreter of these tests.
    shell = {name: value for name, value in environment().items() if name != "WANDB_MODE"}  # slurm/ sets it
    given = {**shell, "PROCESSES_PER_NODE": str(processes), "VENV": sys.prefix, **variables}
    command = [*inside, "sbatch", "--parsable", *SMALL, f"--output={output}", *sbatch, f"slurm/{script}", *TINY]
    command += [*([] if data is None else [f"data.path={data}"]), *overrides, "--run-dir", str(run)]
    submitted = cluster.run(*command, env=given, cwd=ROOT)
    return Submitted(cluster, submitted.stdout.strip().partition(";")[0], run, output)


def compared(run: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The record of a run up to a step, without what depends on the clock."""
    return [
        {"step": item["step"], **{key: item[key] for key in COMPARED if key in item}}
        for item in metrics(run)
        if last_step is None or item["step"] <= last_step
    ]


def moment(text: str, pattern: str) -> float:
    """Seconds since the epoch at which the job said something; the first line that holds the pattern."""
    line = next(line for line in text.splitlines() if line.startswith("[job ") and pattern in line)
    return datetime.fromisoformat(line[5 : line.index("]")]).timestamp()


def timed(action: Callable[[], None]) -> float:
    """Does something and returns when."""
    now = time.time()
    action()
    return now
