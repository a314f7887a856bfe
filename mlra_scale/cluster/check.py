"""Everything that a job's start would refuse, found before the job is queued and again before its ranks start.

`bash slurm/FILE --check ARGUMENTS` runs this on a login node, for the nodes that the file asks for. The job runs it on
its first node (`check_on_this_node`), by the interpreter and in the container of the ranks, for the nodes that it has.
It checks what each rank checks at its start (training/start): configuration, data, run directory, checkpoint and
DeepSpeed's JSON; on a login node not the GPUs, which are elsewhere, but whether a run is at work in the run directory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlra_scale.cluster.job_file import read_job_file
from mlra_scale.cluster.process_tree import end_process
from mlra_scale.cluster.runs import is_held
from mlra_scale.cluster.settings import Settings
from mlra_scale.cluster.slurm import Allocation, slurm_environment, step_command
from mlra_scale.config import Config, ConfigError, Problem
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start.plan import plan_report

_LAYOUT = "layout of the ranks: "
"""Beginning of the line after the plan that holds a ChosenLayout as JSON."""
_CHECK_SECONDS = 300.0
_POLL_SECONDS = 0.5
_END_SECONDS = 5.0
"""How long srun may take to end its task, before it is killed."""


class ChosenLayout(BaseModel):
    """The layout that the planner has chosen for a job.

    Attributes:
        overrides: That name it; none where everything was named.
        device: What the driver calls the devices that it was chosen for; None: unknown.
        memory: Bytes of one of them; None: unknown.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    overrides: list[str]
    device: str | None
    memory: Annotated[float, Field(gt=0)] | None


@dataclass(frozen=True)
class CheckResult:
    """What the check on a node of the job has found.

    Attributes:
        kind: bad_input: the message says what to change; failed: it could not be made; None: nothing is wrong.
        message: What is wrong.
        plan: The plan of the run.
        layout: What the planner has chosen; None with parallel.layout=manual.
    """

    kind: Literal["bad_input", "failed"] | None
    message: str = ""
    plan: str = ""
    layout: ChosenLayout | None = None


def with_absolute_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the training's arguments with absolute paths at their end: a container may start elsewhere."""
    parsed = build_parser().parse_intermixed_args(arguments)
    paths = (("--run-dir", parsed.run_dir), ("--config", parsed.config), ("--ds-config", parsed.ds_config))
    words = [word for flag, path in paths if path for word in (flag, str(Path(path).absolute()))]
    files = [value for name, _, value in (each.partition("=") for each in parsed.overrides) if name == "cluster.file"]
    is_path = bool(files) and files[-1] not in ("", "null", "~")
    return [*arguments, *words, *([f"cluster.file={Path(files[-1]).absolute()}"] if is_path else [])]


def overrides_of_ranks(config: Config, device: str, world_size: int) -> list[str]:
    """Returns the overrides that the ranks of a job get beside those that were given."""
    chosen = device if config.train.device == "auto" else config.train.device
    return [f"train.device={chosen}", f"parallel.world_size={world_size}"]


def check_on_this_node(
    arguments: Sequence[str],
    allocation: Allocation,
    settings: Settings,
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
        result = _run(command, is_stop_asked)
    except (OSError, subprocess.SubprocessError) as error:
        return CheckResult("failed", f"the check of the start failed: {error}")
    if result.returncode == ExitCode.DONE:
        if config.parallel.layout == "manual":
            return CheckResult(None, plan=result.stdout)
        return read_output(result.stdout)
    # srun ends with its task's exit code, and prints a line about it.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("srun: ")]
    message = "\n".join(lines).strip()
    if result.returncode == ExitCode.BAD_INPUT and message:
        return CheckResult("bad_input", message)
    message = message or result.stderr.strip()
    return CheckResult("failed", f"the check of the start ended with exit code {result.returncode}: {message}")


def read_output(output: str) -> CheckResult:
    """Reads what a check with parallel.layout=auto has printed; text after the line of the layout is ignored."""
    plan, _, rest = output.rpartition(_LAYOUT)
    line = rest.partition("\n")[0]
    try:
        return CheckResult(None, plan=plan, layout=ChosenLayout.model_validate_json(line))
    except ValueError:
        return CheckResult("failed", f"the check of the start does not say which layout it has chosen: {line[-200:]}")


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
                end_process(process, _END_SECONDS)
                raise subprocess.TimeoutExpired(command, _CHECK_SECONDS) from None


def check(
    training: Sequence[str], nodes: int, processes: int, device: str, is_login: bool = False
) -> tuple[str, ChosenLayout | None]:
    """Checks the start of a job, in this process.

    Args:
        training: Arguments of the training, as they were given.
        nodes: Number of nodes.
        processes: Ranks on each of them.
        device: Of the ranks, where the configuration leaves it open: `cpu` or `cuda`.
        is_login: Whether this is not a node of the job.

    Returns:
        The plan of the run, and the layout that the planner has chosen; None with parallel.layout=manual.

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
    config, named, is_stored_config = resolve(parsed, overrides_of_ranks(config, device, world_size))
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
    devices = devices_of(request, resolved.config, not is_login)
    plan = plan_report(resolved.config, resolved.plan, resolved.layout, devices)
    if resolved.config.parallel.layout == "manual":
        return plan, None
    overrides = [] if resolved.layout is None else list(resolved.layout.overrides)
    return plan, ChosenLayout(overrides=overrides, device=devices.name, memory=devices.memory)


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
    try:
        if arguments.processes is not None:
            plan, layout = check(arguments.training, arguments.nodes, arguments.processes, arguments.device)
            print(plan if layout is None else f"{plan}\n{_LAYOUT}{layout.model_dump_json()}")
        else:
            # The shell may be inside another job, whose GPUs are not those of this one.
            shell = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
            settings = Settings.of({**shell, "SLURM_GPUS_ON_NODE": str(arguments.gpus_per_node or 0)})
            plan, _ = check(arguments.training, arguments.nodes, settings.processes, settings.device, is_login=True)
            print(f"{plan}\n\nchecked: the job would be accepted, as far as a login node can see")
    except ConfigError as error:
        print(f"mlra_scale.cluster.check: bad input\n{textwrap.indent(str(error), '  ')}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
