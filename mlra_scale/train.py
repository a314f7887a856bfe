"""The entry point: `python -m mlra_scale.train`, or `torchrun --nproc_per_node N -m mlra_scale.train` for N processes.

Everything that can be wrong is found on every rank before a process group exists or a file is written, and told once.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the seconds that all other imports take.
    from mlra_scale.console import make_unfailing
    from mlra_scale.training.interruption import Interruption

    make_unfailing()
    INTERRUPTION = Interruption().until_exit()

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mlra_scale.config import (
    Config,
    ConfigError,
    Named,
    Problem,
    batch_plan,
    load_named_config,
    preset_names,
    validate,
)
from mlra_scale.data import DataError
from mlra_scale.training.device_environment import set_device_environment
from mlra_scale.training.dry_run import plan_report
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import Interruption
from mlra_scale.training.layout import Devices, devices_unseen, is_open, settled
from mlra_scale.training.run_directory import RunDirectory, held

if TYPE_CHECKING:
    # Both import torch, which --dry-run does without.
    from mlra_scale.training.overseer import Overseer
    from mlra_scale.training.start import Asked

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


def main(
    argv: Sequence[str] | None = None, overseer: Overseer | None = None, interruption: Interruption | None = None
) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
        overseer: Looks after this rank; None: nobody does.
        interruption: Listens to signals already; None: they are listened to until this returns.

    Returns:
        The exit code, see ExitCode.
    """
    if interruption is None:
        with Interruption() as listening:
            return main(argv, overseer, listening)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        arguments = build_parser().parse_intermixed_args(argv)
        run_directory = None if arguments.run_dir is None else RunDirectory(Path(arguments.run_dir))
        config, named, is_as_before = resolve(arguments)
        if arguments.dry_run:
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
            number = config.parallel.world_size or world_size
            return _dry_run(config, named, rank, devices_unseen(config, number, per_node))
        from mlra_scale.training.start import Asked

        asked = Asked(config, named, run_directory, arguments.resume, world_size, is_as_before)
        return _train(asked, rank, overseer, interruption)
    except ConfigError as error:
        # Whatever signal ends this rank meanwhile: the input is bad.
        interruption.limit(0.0, code=ExitCode.BAD_INPUT)
        return _report_bad_input(error, rank)
    except DataError as error:
        # Found while the data were read; on a machine of its own only this rank may see it.
        print(f"mlra_scale.train: bad input (rank {rank})\n  {error}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; continue from the last checkpoint with --resume auto", file=sys.stderr, flush=True)
        return ExitCode.INTERRUPTED


def resolve(arguments: argparse.Namespace, more: Sequence[str] = ()) -> tuple[Config, Named, bool]:
    """Builds the configuration that a command line asks for.

    Args:
        arguments: What the parser has read.
        more: Further overrides.

    Returns:
        The configuration, which of its fields were named, and whether it is that of the run directory: where a run is
        resumed and neither a preset nor a file is named.

    Raises:
        ConfigError: With everything that is wrong in all sources.
    """
    own = None
    if arguments.preset is None and arguments.config is None and arguments.resume != "none" and arguments.run_dir:
        own = RunDirectory(Path(arguments.run_dir)).config
    own = own if own is not None and own.is_file() else None
    config, named = load_named_config(
        arguments.preset, arguments.config, arguments.ds_config, [*arguments.overrides, *more], own
    )
    return config, named, own is not None


def _train(asked: Asked, rank: int, overseer: Overseer | None, interruption: Interruption) -> int:
    """Checks everything, keeps other runs out of the directory, and trains."""
    set_device_environment(asked.config, os.environ, is_open(asked.config, asked.named))
    from mlra_scale.training.candidates import choose
    from mlra_scale.training.launch import run
    from mlra_scale.training.overseer import Overseer
    from mlra_scale.training.report import report_nothing_to_do
    from mlra_scale.training.start import prepare

    start, overseer = prepare(asked), overseer or Overseer()
    with held(start.run, overseer.lock_seconds) if rank == 0 else contextlib.nullcontext():
        if rank == 0 and choose(start.run, asked.resume) != start.choice:
            # Between the check and the lock.
            raise ConfigError([Problem("--run-dir", str(start.run.path), "another run has just used it; look again")])
        if start.is_done:
            if rank == 0:
                report_nothing_to_do(start)
            return ExitCode.DONE
        return run(asked, start, overseer, interruption)


def _dry_run(config: Config, named: Named, rank: int, devices: Devices) -> int:
    """Prints the plan for devices that need not be there; data are checked if they are named."""
    problems: list[Problem] = []
    layout = None
    try:
        config, layout = settled(config, named, devices)
        validate(config, devices.number)
    except ConfigError as error:
        problems += error.problems
    if config.data.path is not None or config.data.blend is not None:
        from mlra_scale.data import check_data

        problems += check_data(config)
    if problems:
        raise ConfigError(problems)
    if rank == 0:
        print(plan_report(config, batch_plan(config, devices.number), layout, devices))
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
    sys.exit(main(interruption=INTERRUPTION))
