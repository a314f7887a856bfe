"""The step of a job that runs the nodes' agents: what an attempt starts, and srun's command line for it."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Hub, endpoint, free_port, listening_host
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.cluster.slurm import slurm_environment, step_command
from mlra_scale.config import ClusterConfig
from mlra_scale.files import write_atomically


@dataclass(frozen=True)
class AttemptPlan:
    """What an attempt starts.

    Attributes:
        nodes: Names, in order of their ranks.
        here: Name of this process's node.
        addresses: At which other nodes reach these nodes and `here`, by name.
        training: Arguments of the training.
        logs: Folder for the logs of this attempt.
        settings, cluster: How ranks are started, with what memory and cores, and the limits of time of each phase.
        hang_seconds: No progress for so long is a hang.
    """

    nodes: tuple[str, ...]
    here: str
    addresses: Mapping[str, str]
    training: tuple[str, ...]
    logs: Path
    settings: LauncherSettings
    cluster: ClusterConfig
    hang_seconds: float


def start_step(plan: AttemptPlan, is_spare: bool) -> tuple[Hub, subprocess.Popen[bytes]]:
    """Starts srun with one agent on each node, which start the ranks.

    Args:
        plan: What to start.
        is_spare: Whether others train on the nodes until these ranks begin.

    Returns:
        Where the job hears of the agents, and srun.

    Raises:
        OSError: The folder of the logs cannot be written, or srun cannot be started.
    """
    settings, cluster, token, nonce = plan.settings, plan.cluster, secrets.token_hex(16), secrets.token_hex(8)
    plan.logs.mkdir(parents=True, exist_ok=not is_spare)  # logs of an earlier job are not those of a spare
    # A node that does not find this there does not share the run directory.
    write_atomically(plan.logs / "nonce", nonce)
    # A task's end is judged by the job, with what is known of all of them.
    options = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--unbuffered", *settings.srun]
    step = step_command(plan.nodes, cluster.step_memory, cluster.cpu_bind, options)
    step += [*settings.python, "-u", "-m", "mlra_scale.cluster.node"]
    step += [f"--master={endpoint(plan.addresses[plan.nodes[0]], free_port())}"]
    step += [f"--run-id={plan.logs.name}", f"--nodes={len(plan.nodes)}", f"--processes={settings.processes}"]
    step += [f"--device={settings.device}", f"--logs={plan.logs}", f"--nonce={nonce}"]
    step += [f"--start-seconds={60 * cluster.start_minutes}", f"--lost-seconds={cluster.lost_node_seconds}"]
    step += ["--spare"] if is_spare else []
    hub = Hub(token, listening_host(plan.addresses[plan.here], map(plan.addresses.__getitem__, plan.nodes)))
    try:
        process = subprocess.Popen(
            [*step, f"--job={endpoint(plan.addresses[plan.here], hub.port)}", "--", *plan.training],
            env={**slurm_environment(os.environ), TOKEN_VARIABLE: token},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A signal to the job's process group is for the job, which passes it on in order.
            start_new_session=True,
        )
    except BaseException:
        hub.close()
        raise
    return hub, process
