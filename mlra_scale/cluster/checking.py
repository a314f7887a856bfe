"""Lets a node of the job check its start (check.py), by the interpreter and in the container of the ranks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlra_scale.cluster.settings import Settings
from mlra_scale.cluster.slurm import Allocation, slurm_environment, step_command
from mlra_scale.config import Config
from mlra_scale.training.exit_codes import ExitCode

_CHECK_SECONDS = 300.0


@dataclass(frozen=True)
class Checked:
    """What a check has found.

    Attributes:
        kind: bad_input: the message says what to change; failed: it could not be made; None: nothing is wrong.
        said: The message.
        plan: The plan of the run.
    """

    kind: Literal["bad_input", "failed"] | None
    said: str = ""
    plan: str = ""


def check_on_this_node(
    arguments: Sequence[str], allocation: Allocation, settings: Settings, config: Config, num_nodes: int
) -> Checked:
    """Checks the start of the job, as a step of its own.

    Args:
        arguments: Of the training, with absolute paths.
        allocation: The job.
        settings: How its ranks are started.
        config: Its configuration.
        num_nodes: Nodes that the ranks will have.
    """
    cluster = config.cluster
    command = step_command([allocation.here], cluster.step_memory, cluster.cpu_bind, settings.srun)
    command += [*settings.python, "-m", "mlra_scale.cluster.check", f"--nodes={num_nodes}"]
    command += [f"--processes={settings.processes}", f"--device={settings.device}", "--", *arguments]
    try:
        result = subprocess.run(
            command,
            env=slurm_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CHECK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Checked("failed", f"the check of the start failed: {error}")
    if result.returncode == ExitCode.DONE:
        return Checked(None, plan=result.stdout)
    # srun ends with its task's exit code, and says so itself.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("srun: ")]
    said = "\n".join(lines).strip()
    if result.returncode == ExitCode.BAD_INPUT and said:
        return Checked("bad_input", said)
    said = said or result.stderr.strip()
    return Checked("failed", f"the check of the start ended with exit code {result.returncode}: {said}")
