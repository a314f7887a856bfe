"""Lets a node of the job check its start (check.py), by the interpreter and in the container of the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlra_scale.cluster.check import LAYOUT
from mlra_scale.cluster.settings import Settings
from mlra_scale.cluster.slurm import Allocation, slurm_environment, step_command
from mlra_scale.config import Config
from mlra_scale.training.exit_codes import ExitCode

_CHECK_SECONDS = 300.0
_POLL_SECONDS = 0.5
_END_SECONDS = 5.0
"""How long srun may take to end its task, before it is killed."""


@dataclass(frozen=True)
class Checked:
    """What a check has found.

    Attributes:
        kind: bad_input: the message says what to change; failed: it could not be made; None: nothing is wrong.
        said: The message.
        plan: The plan of the run.
        layout: Overrides that name the layout which the planner has chosen; none where everything was named.
        device: What the driver calls the devices that the layout was chosen for; None: it was not said.
        memory: Bytes of one of them; None: it was not said.
    """

    kind: Literal["bad_input", "failed"] | None
    said: str = ""
    plan: str = ""
    layout: tuple[str, ...] = ()
    device: str | None = None
    memory: float | None = None


def check_on_this_node(
    arguments: Sequence[str],
    allocation: Allocation,
    settings: Settings,
    config: Config,
    num_nodes: int,
    is_stop_asked: Callable[[], bool],
) -> Checked:
    """Checks the start of the job, as a step of its own.

    Args:
        arguments: Of the training, with absolute paths.
        allocation: The job.
        settings: How its ranks are started.
        config: Its configuration.
        num_nodes: Nodes that the ranks will have.
        is_stop_asked: Whether a signal has asked the job to stop: the check is then given up.
    """
    cluster = config.cluster
    command = step_command([allocation.here], cluster.step_memory, cluster.cpu_bind, settings.srun)
    command += [*settings.python, "-m", "mlra_scale.cluster.check", f"--nodes={num_nodes}"]
    command += [f"--processes={settings.processes}", f"--device={settings.device}", "--", *arguments]
    try:
        result = _run(command, is_stop_asked)
    except (OSError, subprocess.SubprocessError) as error:
        return Checked("failed", f"the check of the start failed: {error}")
    if result.returncode == ExitCode.DONE:
        if config.parallel.layout == "manual":
            return Checked(None, plan=result.stdout)
        return accepted(result.stdout)
    # srun ends with its task's exit code, and says so itself.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("srun: ")]
    said = "\n".join(lines).strip()
    if result.returncode == ExitCode.BAD_INPUT and said:
        return Checked("bad_input", said)
    said = said or result.stderr.strip()
    return Checked("failed", f"the check of the start ended with exit code {result.returncode}: {said}")


def accepted(output: str) -> Checked:
    """Reads the plan and the layout from what a check has printed; whatever follows the line of the layout is ignored.

    Args:
        output: Of a check that found nothing wrong, with parallel.layout=auto.
    """
    plan, _, rest = output.rpartition(LAYOUT)
    line = rest.partition("\n")[0]
    try:
        said = json.loads(line)
        overrides, device, memory = said["overrides"], said["device"], said["memory"]
    except (ValueError, TypeError, KeyError):
        overrides, device, memory = None, None, None
    is_list = isinstance(overrides, list) and all(isinstance(each, str) for each in overrides)
    is_memory = memory is None or (isinstance(memory, (int, float)) and memory > 0)
    if is_list and is_memory and (device is None or isinstance(device, str)):
        return Checked(None, plan=plan, layout=tuple(overrides), device=device, memory=memory)
    return Checked("failed", f"the check of the start does not say which layout it has chosen: {line[-200:]}")


def _run(command: Sequence[str], is_stop_asked: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Runs a command until it ends, or a signal asks for a stop.

    Raises:
        subprocess.TimeoutExpired: It took too long, or a stop was asked for; it has been ended.
    """
    deadline = time.monotonic() + _CHECK_SECONDS
    with subprocess.Popen(
        command,
        env=slurm_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        while True:
            try:
                output, errors = process.communicate(timeout=min(_POLL_SECONDS, _CHECK_SECONDS))
                return subprocess.CompletedProcess(command, process.returncode, output, errors)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline and not is_stop_asked():
                    continue
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=_END_SECONDS)
                process.kill()
                raise subprocess.TimeoutExpired(command, _CHECK_SECONDS) from None
