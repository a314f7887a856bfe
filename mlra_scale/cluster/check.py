"""Everything that a job's start would refuse, found before the job is queued and again before its ranks start.

`bash slurm/FILE --check ARGUMENTS` calls this on a login node, for the nodes that the file asks for; the job calls it
on its first node, for those that it has. What is looked at is what each rank looks at (training/start.py):
configuration, data, run directory, checkpoint and DeepSpeed's JSON; on a login node also whether a run is at work in
the run directory, and not the GPUs, which are elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlra_scale.cluster.job_file import JobFile
from mlra_scale.cluster.overview import is_held
from mlra_scale.cluster.settings import Settings
from mlra_scale.config import Config, ConfigError, Problem, batch_plan
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.dry_run import plan_report
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.run_directory import RunDirectory

LAYOUT = "layout of the ranks: "
"""Beginning of the line by which a job learns what the planner has chosen, and for which devices: a JSON object with
`overrides` (a list), `device` (what the driver calls one, or null) and `memory` (its bytes, or null)."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments; those after `--` are of the training."""
    parser = argparse.ArgumentParser(prog="mlra_scale.cluster.check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True, help="of the job")
    parser.add_argument("--gpus-per-node", type=int, help="of the job; on a login node, where they cannot be counted")
    parser.add_argument("--processes", type=int, help="on each node; in a job")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the ranks; in a job")
    parser.add_argument("training", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    arguments.training = arguments.training[1:] if arguments.training[:1] == ["--"] else arguments.training
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of the run, or everything that is wrong with it; returns the exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.processes is not None:
            plan, layout = checked(arguments.training, arguments.nodes, arguments.processes, arguments.device)
            print(plan if layout is None else f"{plan}\n{LAYOUT}{json.dumps(layout)}")
        else:
            settings = Settings.of({**_without_slurm(), "SLURM_GPUS_ON_NODE": str(arguments.gpus_per_node or 0)})
            plan, _ = checked(arguments.training, arguments.nodes, settings.processes, settings.device, is_login=True)
            print(f"{plan}\n\nchecked: the job would be accepted, as far as a login node can see")
    except ConfigError as error:
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        print(f"mlra_scale.cluster.check: bad input\n{lines}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    return ExitCode.DONE


def checked(
    training: Sequence[str], nodes: int, processes: int, device: str, is_login: bool = False
) -> tuple[str, dict[str, Any] | None]:
    """Checks the start of a job.

    Args:
        training: Arguments of the training, as they were given.
        nodes: Number of nodes.
        processes: Ranks on each of them.
        device: Of the ranks, where the configuration leaves it open: `cpu` or `cuda`.
        is_login: Whether this is not a node of the job.

    Returns:
        The plan of the run, and what the job learns of the layout that the planner has chosen (see LAYOUT); None with
        parallel.layout=manual.

    Raises:
        ConfigError: With everything that is wrong.
    """
    from mlra_scale.training.start import Asked, devices_of, prepare

    parsed = build_parser().parse_intermixed_args(training)
    config, _, _ = resolve(parsed)
    world_size = nodes * processes
    problems = world_problems(config, nodes, processes)
    config, named, is_as_before = resolve(parsed, of_ranks(config, device, world_size))
    run = None if parsed.run_dir is None else RunDirectory(Path(parsed.run_dir))
    if run is not None:
        problems += _directory_problems(run, is_login)
    asked = Asked(config, named, run, parsed.resume, world_size, is_as_before, processes)
    try:
        start = prepare(asked, is_here=not is_login)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    devices = devices_of(asked, start.config, not is_login)
    plan = plan_report(start.config, batch_plan(start.config, world_size), start.layout, devices)
    if start.config.parallel.layout == "manual":
        return plan, None
    overrides = [] if start.layout is None else start.layout.overrides
    return plan, {"overrides": overrides, "device": devices.name, "memory": devices.memory}


def of_ranks(config: Config, device: str, world_size: int) -> list[str]:
    """Returns the overrides that the ranks of a job get beside those that were given."""
    chosen = device if config.train.device == "auto" else config.train.device
    return [f"train.device={chosen}", f"parallel.world_size={world_size}"]


def world_problems(config: Config, nodes: int, processes: int) -> list[Problem]:
    """Finds out whether the job has as many ranks as the configuration expects."""
    expected = config.parallel.world_size
    if expected in (None, nodes * processes) or config.cluster.elastic:
        return []
    remedy = f"the job has {nodes} node(s) for {processes} rank(s) each; correct one"
    return [Problem("parallel.world_size", expected, remedy)]


def _directory_problems(run: RunDirectory, is_login: bool) -> list[Problem]:
    problems = []
    try:
        JobFile.read(run.job)
    except OSError as error:
        problems.append(Problem("--run-dir", str(run.job), f"cannot be read ({error.strerror})"))
    except ValueError as error:
        problems.append(Problem("--run-dir", str(run.path), str(error)))
    if is_login and any(is_held(run, name) for name in (".lock", ".job.lock")):
        remedy = "another run is at work here; wait for it, or name another directory"
        problems.append(Problem("--run-dir", str(run.path), remedy))
    return problems


def _without_slurm() -> dict[str, str]:
    """The shell may be inside another job, whose GPUs are not those of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


if __name__ == "__main__":
    sys.exit(main())
