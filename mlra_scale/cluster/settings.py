"""What slurm/launch.sh hands down in the environment: how many ranks a node has, and how they are started."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from mlra_scale.config import ConfigError, Problem


@dataclass(frozen=True)
class LauncherSettings:
    """How ranks are started.

    Attributes:
        processes: Ranks on each node.
        device: `cuda` where Slurm has given GPUs to the job, else `cpu`.
        srun: Further arguments of srun.
        python: The interpreter on the nodes, with the command of a container before it perhaps.
    """

    processes: int
    device: str
    srun: tuple[str, ...]
    python: tuple[str, ...]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> LauncherSettings:
        """Reads them from the environment; ConfigError: a variable is not a number, or the GPUs cannot be counted."""
        gpus = _number_of_gpus(environment)
        given = environment.get("PROCESSES_PER_NODE") or str(gpus or 1)
        if not given.isdecimal() or int(given) < 1:
            remedy = "must be the number of ranks on each node, such as 8"
            raise ConfigError([Problem("PROCESSES_PER_NODE", given, remedy)])
        return cls(
            processes=int(given),
            device="cuda" if gpus else "cpu",
            srun=tuple(shlex.split(environment.get("MLRA_SRUN_ARGUMENTS", ""))),
            python=tuple(shlex.split(environment.get("MLRA_PYTHON", ""))) or (sys.executable,),
        )


def _number_of_gpus(environment: Mapping[str, str]) -> int:
    """Returns how many GPUs Slurm has given to the job on this node; if it does not count them, how many there are."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if (counted := environment.get(name, "")).isdecimal():
            return int(counted)
    if "SLURM_JOB_GPUS" in environment or shutil.which("nvidia-smi") is None:
        return len([gpu for gpu in environment.get("SLURM_JOB_GPUS", "").split(",") if gpu])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        remedy = "nvidia-smi does not answer: this node is ill; exclude it, or ask Slurm for a number of GPUs"
        raise ConfigError([Problem("--gpus-per-node", None, remedy)]) from error
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
