"""The entry point: `python -m mlra_scale.train`, or `torchrun --nproc_per_node N -m mlra_scale.train` for N processes.

Everything that can be wrong is found on every rank before a process group exists or a file is written, and told once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mlra_scale.config import BatchPlan, Config, ConfigError, Problem, batch_plan, load_config, preset_names, validate
from mlra_scale.training.dry_run import plan_report
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.resume import changed_data, changed_layout, read_origin
from mlra_scale.training.run_directory import RunDirectory, check_run_directory, held

_RANK_0_SECONDS = 10.0
"""How long the other ranks let rank 0 tell about bad input before they tell it themselves: a launcher ends every rank
as soon as one ends, and a file may be missing on one node only."""


class _Parser(argparse.ArgumentParser):
    """Reports wrong flags like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([Problem("command line", " ".join(sys.argv[1:]), message)])


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser: these flags and no more, everything else is a dotted override."""
    parser = _Parser(
        prog="mlra_scale.train", description="Pre-train a GPT-2 with low-rank attention factors.", allow_abbrev=False
    )
    parser.add_argument("--preset", help=f"starting point: {', '.join(preset_names())}")
    parser.add_argument("--config", metavar="FILE.yaml", help="fields that replace the preset's")
    parser.add_argument("--ds-config", metavar="FILE.json", help="DeepSpeed's own knobs (see ds_configs/)")
    parser.add_argument("--run-dir", metavar="DIR", help="where everything the run leaves behind goes")
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="auto: from the run directory's latest checkpoint, if there is one; PATH: from this checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="print every derived number and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="single fields, such as train.steps=9"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code, see ExitCode.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        arguments = build_parser().parse_intermixed_args(argv)
        config = load_config(arguments.preset, arguments.config, arguments.ds_config, arguments.overrides)
        if arguments.dry_run:
            return _dry_run(config, rank, config.parallel.world_size or world_size)
        run_directory, plan, checkpoint = check(config, arguments.run_dir, arguments.resume, world_size)
        from mlra_scale.training.launch import run
        from mlra_scale.training.report import report_nothing_to_do

        with held(run_directory) if rank == 0 else contextlib.nullcontext():
            if rank == 0 and check_run_directory(config, run_directory, arguments.resume) != ([], checkpoint):
                # Between the check and the lock.
                raise ConfigError([Problem("--run-dir", arguments.run_dir, "another run has just used it; look again")])
            if checkpoint is not None and (step := read_origin(checkpoint).step) >= config.train.steps:
                if rank == 0:
                    report_nothing_to_do(run_directory, checkpoint, step, config.train.steps)
                return ExitCode.DONE
            return run(config, plan, run_directory, checkpoint)
    except ConfigError as error:
        return _report_bad_input(error, rank)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; continue from the last checkpoint with --resume auto", file=sys.stderr, flush=True)
        return ExitCode.INTERRUPTED


def check(
    config: Config, run_dir: str | None, resume: str, world_size: int
) -> tuple[RunDirectory, BatchPlan, Path | None]:
    """Checks configuration, device, data and run directory, without writing anything.

    Args:
        config: As loaded.
        run_dir: The value of --run-dir.
        resume: The value of --resume.
        world_size: Number of ranks.

    Returns:
        The run directory, the batch plan, and the checkpoint to resume from (None: a fresh start).

    Raises:
        ConfigError: With everything that is wrong.
    """
    from mlra_scale.data import check_data, identify_data
    from mlra_scale.training.launch import check_device, check_launcher, resolve_device

    problems = check_launcher(os.environ)
    try:
        validate(config, world_size, device=resolve_device(config))
    except ConfigError as error:
        problems += error.problems
    problems += check_device(config)
    problems += check_data(config)
    checkpoint = None
    if run_dir is None:
        problems.append(Problem("--run-dir", None, "is required: name a directory for what the run leaves behind"))
    else:
        found, checkpoint = check_run_directory(config, RunDirectory(Path(run_dir)), resume)
        problems += found
    if problems:
        raise ConfigError(problems)
    assert run_dir is not None
    if checkpoint is not None:
        origin = read_origin(checkpoint)
        problems += changed_layout(config, origin, world_size)
        problems += changed_data(identify_data(config).fingerprints, origin)
    if problems:
        raise ConfigError(problems)
    return RunDirectory(Path(run_dir)), batch_plan(config, world_size), checkpoint


def _dry_run(config: Config, rank: int, world_size: int) -> int:
    """Prints the plan of a world that need not be there; data are checked if they are named."""
    problems: list[Problem] = []
    try:
        validate(config, world_size)
    except ConfigError as error:
        problems += error.problems
    if config.data.path is not None or config.data.blend is not None:
        from mlra_scale.data import check_data

        problems += check_data(config)
    if problems:
        raise ConfigError(problems)
    if rank == 0:
        print(plan_report(config, batch_plan(config, world_size)))
    return ExitCode.DONE


def _report_bad_input(error: ConfigError, rank: int) -> int:
    if rank != 0:
        # Under a launcher rank 0's end ends this process here.
        time.sleep(_RANK_0_SECONDS)
    where = f" (rank {rank})" if rank != 0 else ""
    lines = "\n".join(f"  {problem}" for problem in error.problems)
    print(f"mlra_scale.train: bad input{where}\n{lines}", file=sys.stderr, flush=True)
    return ExitCode.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
