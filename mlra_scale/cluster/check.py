"""Everything that a job's start would refuse, found before the job is queued and again before its ranks start.

`bash slurm/FILE --check ARGUMENTS` runs this on a login node, for the nodes that the file asks for. The job runs it on
its first node (`check_on_this_node`), by the interpreter and in the container of the ranks, for the nodes that it has.
It checks what each rank checks at its start (training/start): configuration, data, run directory, checkpoint and
DeepSpeed's JSON; on a login node not the GPUs, which are elsewhere, but whether a run is at work in the run directory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlra_scale.cluster.job_file import read_job_file
from mlra_scale.cluster.runs import is_held
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.cluster.slurm import Allocation, end_process, slurm_environment, step_command
from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start.plan import plan_report

_RESULT = "result of the check: "
"""Beginning of the line of output that holds a CheckResult as JSON."""
_CHECK_SECONDS = 300.0
_POLL_SECONDS = 0.5
_END_SECONDS = 5.0
"""How long srun may take to end its task, before it is killed."""


class CheckResult(BaseModel):
    """What a check has found.

    Attributes:
        kind: bad_input: the message says what to change; failed: it could not be made; None: nothing is wrong.
        message: What is wrong.
        plan: The plan of the run.
        overrides: That name the layout which the planner has chosen; none where everything was named.
        device: What the driver calls the devices that the layout was chosen for; None: unknown.
        memory: Bytes of one of them; None: unknown.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    kind: Literal["bad_input", "failed"] | None = None
    message: str = ""
    plan: str = ""
    overrides: list[str] = []
    device: str | None = None
    memory: Annotated[float, Field(gt=0)] | None = None


def with_absolute_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the training's arguments with absolute paths at their end: a container may start elsewhere."""
    parsed = build_parser().parse_intermixed_args(arguments)
    paths = [("--run-dir", parsed.run_dir), ("--config", parsed.config)]
    if parsed.ds_config and Path(parsed.ds_config).exists():
        # One that is not there may be the package's own, which a container has elsewhere.
        paths.append(("--ds-config", parsed.ds_config))
    words = [word for flag, path in paths if path for word in (flag, str(Path(path).absolute()))]
    files = [value for name, _, value in (each.partition("=") for each in parsed.overrides) if name == "cluster.file"]
    is_path = bool(files) and files[-1] not in ("", "null", "~")
    return [*arguments, *words, *([f"cluster.file={Path(files[-1]).absolute()}"] if is_path else [])]


def overrides_of_ranks(device: str, world_size: int) -> list[str]:
    """Returns the overrides that the ranks of a job get beside those that were given."""
    return [f"train.device={device}", f"parallel.world_size={world_size}"]


def check_on_this_node(
    arguments: Sequence[str],
    allocation: Allocation,
    settings: LauncherSettings,
    config: Config,
    num_nodes: int,
    is_stop_asked: Callable[[], bool],
) -> CheckResult:
    """Checks the start of the job on so many nodes, as a step of its own on this node.

    The arguments of the training have absolute paths. A stop that is asked for ends the check.
    """
    cluster = config.cluster
    command = step_command([allocation.here], cluster.step_memory, cluster.cpu_bind, settings.srun)
    command += [*settings.python, "-m", "mlra_scale.cluster.check", f"--nodes={num_nodes}"]
    command += [f"--processes={settings.processes}", f"--device={settings.device}", "--", *arguments]
    try:
        code, output, errors = _run(command, is_stop_asked)
    except (OSError, subprocess.SubprocessError) as error:
        return CheckResult(kind="failed", message=f"the check of the start failed: {error}")
    return read_output(output) or CheckResult(
        kind="failed", message=f"the check of the start ended with exit code {code}: {errors.strip()}"
    )


def read_output(output: str) -> CheckResult | None:
    """Reads what a check has printed, among what a container prints and srun writes before a line; None: no result."""
    lines = [line.partition(_RESULT)[2] for line in output.split("\n") if _RESULT in line]
    try:
        return CheckResult.model_validate_json(lines[-1]) if lines else None
    except ValueError:
        return CheckResult(kind="failed", message=f"the result of the check is not understood: {lines[-1][-200:]}")


def _run(command: Sequence[str], is_stop_asked: Callable[[], bool]) -> tuple[int, str, str]:
    """Runs a command until it ends, or a signal asks for a stop; returns its exit code, output and errors.

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
                return process.returncode, output, errors
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline and not is_stop_asked():
                    continue
                end_process(process, _END_SECONDS)
                raise subprocess.TimeoutExpired(command, _CHECK_SECONDS) from None


def check(training: Sequence[str], nodes: int, processes: int, device: str, is_login: bool = False) -> CheckResult:
    """Checks the start of a job, in this process.

    Args:
        training: Arguments of the training, as they were given.
        nodes: Number of nodes.
        processes: Ranks on each of them.
        device: Of the ranks, where the configuration leaves it open: `cpu` or `cuda`.
        is_login: Whether this is not a node of the job.

    Raises:
        ConfigError: With everything that is wrong.
    """
    from mlra_scale.training.start.request import LaunchRequest, devices_of, resolve_run

    parsed = build_parser().parse_intermixed_args(training)
    config, _, _ = resolve(parsed)
    world_size = nodes * processes
    problems = []
    if config.parallel.world_size not in (None, world_size) and not config.cluster.elastic:
        remedy = f"the job has {nodes} node(s) for {processes} rank(s) each; correct one"
        problems.append(Problem("parallel.world_size", config.parallel.world_size, remedy))
    device = device if config.train.device == "auto" else config.train.device
    config, named, is_stored_config = resolve(parsed, overrides_of_ranks(device, world_size))
    run = None if parsed.run_dir is None else RunDirectory(Path(parsed.run_dir))
    if run is not None:
        problems += _directory_problems(run, is_login)
    request = LaunchRequest(config, named, run, parsed.resume, world_size, is_stored_config, processes)
    try:
        resolved = resolve_run(request, is_here=not is_login)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    devices, layout = devices_of(request, resolved.config, not is_login), resolved.layout
    return CheckResult(
        plan=plan_report(resolved.config, resolved.plan, layout, devices),
        overrides=[] if layout is None else [*layout.overrides],
        device=devices.name,
        memory=devices.memory,
    )


def _directory_problems(run: RunDirectory, is_login: bool) -> list[Problem]:
    problems: list[Problem] = []
    try:
        read_job_file(run)
    except ConfigError as error:
        problems += error.problems
    if is_login and any(is_held(run, name) for name in (".lock", ".job.lock")):
        remedy = "another run is at work here; wait for it, or name another directory"
        problems.append(Problem("--run-dir", str(run.path), remedy))
    return problems


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mlra_scale.cluster.check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True, help="of the job")
    parser.add_argument("--gpus-per-node", type=int, help="of the job; on a login node, where they cannot be counted")
    parser.add_argument("--processes", type=int, help="on each node; in a job")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the ranks; in a job")
    parser.add_argument("training", nargs=argparse.REMAINDER, help="after --: arguments of the training")
    arguments = parser.parse_args(argv)
    arguments.training = arguments.training[1:] if arguments.training[:1] == ["--"] else arguments.training
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of the run, or everything that is wrong with it; returns the exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    is_login = arguments.processes is None
    try:
        if is_login:
            # The shell may be inside another job, whose GPUs are not those of this one.
            shell = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
            settings = LauncherSettings.of({**shell, "SLURM_GPUS_ON_NODE": str(arguments.gpus_per_node or 0)})
            arguments.processes, arguments.device = settings.processes, settings.device
        result = check(arguments.training, arguments.nodes, arguments.processes, arguments.device, is_login)
    except ConfigError as error:
        message = f"mlra_scale.cluster.check: bad input\n{textwrap.indent(str(error), '  ')}"
        result = CheckResult(kind="bad_input", message=message)
    if not is_login:
        print(_RESULT + json.dumps(result.model_dump()), flush=True)  # ASCII, whatever the encoding of the output
    elif result.kind is None:
        print(f"{result.plan}\n\nchecked: the job would be accepted, as far as a login node can see")
    else:
        print(result.message, file=sys.stderr, flush=True)
    return ExitCode.DONE if result.kind is None else ExitCode.BAD_INPUT


if __name__ == "__main__":
    gc.disable()  # see train.py; this process soon ends
    sys.exit(main())
