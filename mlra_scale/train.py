"""The entry point: `python -m mlra_scale.train`, or `torchrun --nproc_per_node N -m mlra_scale.train` for N processes.

Every rank finds all bad input on its machine before a process group exists or a file is written, and reports it once.
What needs the Hugging Face hub or its cache is found by rank 0 alone: ranks that no launcher ends with it wait in vain,
for as long as a process group may take to form. What is found when all of a text is read, such as a token which the
model does not know, ends all ranks together afterwards.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the other imports, which take seconds.
    import gc

    from mlra_scale.console import make_unfailing
    from mlra_scale.training.interruption import Interruption

    gc.disable()  # until everything is imported; see _train
    make_unfailing()
    INTERRUPTION = Interruption().until_exit()

import argparse
import contextlib
import gc
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
)
from mlra_scale.console import set_up_logging
from mlra_scale.data import DataError
from mlra_scale.model.validation import validate
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import Interruption, Watchdog
from mlra_scale.training.log.console import silence_libraries
from mlra_scale.training.run_directory import RunDirectory, run_lock
from mlra_scale.training.start.device import (
    Devices,
    Launcher,
    devices_elsewhere,
    resolve_device,
    set_device_environment,
)
from mlra_scale.training.start.plan import is_layout_open, plan_report, resolve_layout

if TYPE_CHECKING:
    from mlra_scale.training.start.request import LaunchRequest  # imports torch, which --dry-run does not need

_RANK_0_SECONDS = 10.0
"""How long the other ranks wait for rank 0 to report bad input before they report it themselves: a launcher ends every
rank as soon as one ends, and a file may be missing on one node only."""


class _Parser(argparse.ArgumentParser):
    """Reports wrong flags like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([Problem("command line", " ".join(sys.argv[1:]), message)])


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of these flags; everything else is a dotted override."""
    parser = _Parser(
        prog="mlra_scale.train", description="Pre-train a GPT-2 with low-rank attention factors.", allow_abbrev=False
    )
    parser.add_argument("--preset", help=f"starting point: {', '.join(preset_names())}")
    parser.add_argument("--config", metavar="FILE.yaml", help="fields that replace the preset's")
    parser.add_argument("--ds-config", metavar="FILE.json", help="DeepSpeed's own settings (see ds_configs/)")
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
    argv: Sequence[str] | None = None, watchdog: Watchdog | None = None, interruption: Interruption | None = None
) -> int:
    """Runs the command line (None: that of the process) and returns the exit code, see ExitCode.

    Args:
        argv: Arguments without the program's name.
        watchdog: Supervises this rank; None: nothing does.
        interruption: Handles signals already; None: they are handled until this returns.
    """
    if interruption is None:
        with Interruption() as interruption:
            return main(argv, watchdog, interruption)
    launcher = Launcher()
    try:
        launcher = Launcher.of(os.environ)
        set_up_logging(launcher.rank)
        arguments = build_parser().parse_intermixed_args(argv)
        if arguments.run_dir == "":
            raise ConfigError([Problem("--run-dir", "", "is empty; name a directory")])
        run_directory = None if arguments.run_dir is None else RunDirectory(Path(arguments.run_dir))
        config, named, is_stored_config = resolve(arguments)
        if arguments.dry_run:
            number = config.parallel.world_size or launcher.world_size
            devices = devices_elsewhere(config, number, launcher.local_world_size)
            return _dry_run(config, named, launcher.rank, devices)
        from mlra_scale.training.start.request import LaunchRequest

        request = LaunchRequest(config, named, run_directory, arguments.resume, launcher.world_size, is_stored_config)
        return _train(request, launcher.rank, watchdog or Watchdog(), interruption)
    except ConfigError as error:
        # The input is bad, whatever signal ends this rank meanwhile.
        interruption.limit(0.0, code=ExitCode.BAD_INPUT)
        return _report_bad_input(error, launcher.rank)
    except DataError as error:
        # Found while the data were read; on a machine of its own only this rank may see it.
        print(f"mlra_scale.train: bad input (rank {launcher.rank})\n  {error}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        if launcher.rank == 0:
            print("interrupted; continue from the last checkpoint with --resume auto", file=sys.stderr, flush=True)
        return ExitCode.INTERRUPTED


def resolve(arguments: argparse.Namespace, more: Sequence[str] = ()) -> tuple[Config, Named, bool]:
    """Builds the configuration that a command line asks for, with `more` overrides.

    Returns:
        The configuration, which of its fields were named, and whether it is that of the run directory, which holds
        where a run is resumed and neither a preset nor a file is named.

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


def _train(request: LaunchRequest, rank: int, watchdog: Watchdog, interruption: Interruption) -> int:
    """Checks everything, locks the run directory, and trains."""
    set_here = set_device_environment(request.config, os.environ, is_layout_open(request.config, request.named))
    from mlra_scale.training.log.report import report_nothing_to_do
    from mlra_scale.training.start.request import resolve_run
    from mlra_scale.training.start.resume_choice import choose_checkpoint

    run = resolve_run(request)
    if run.config.parallel.tensor == 1 and "CUDA_DEVICE_MAX_CONNECTIONS" in set_here:
        # The planner has looked at the device, but no context exists yet: the layout that it chose needs many queues.
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    directory = run.directory
    with run_lock(directory, watchdog.lock_seconds) if rank == 0 else contextlib.nullcontext():
        if rank == 0 and choose_checkpoint(directory, request.resume).checkpoint != run.resume.checkpoint:
            # Changed between the check and the lock.
            raise ConfigError([Problem("--run-dir", str(directory.path), "another run has just used it; look again")])
        # Whether an export is due stands in the run directory, which ranks may see differently: several agree on it.
        is_known = run.config.export.format is None or request.world_size == 1
        if run.is_done and not run.is_export_due and is_known:
            if rank == 0:
                report_nothing_to_do(run)
            return ExitCode.DONE
        silence_libraries(resolve_device(run.config))
        # This imports DeepSpeed, which chooses its accelerator when it is imported.
        from mlra_scale.training.loop.trainer import launch

        if not gc.isenabled():
            # A program's main module has switched it off: the collector finds nothing in what imports leave behind, and
            # looking for it again and again is a fifth of their time. Nor does it look there from here on.
            gc.freeze()
            gc.enable()
        return launch(request, run, watchdog, interruption)


def _dry_run(config: Config, named: Named, rank: int, devices: Devices) -> int:
    """Prints the plan for devices that need not exist; data are checked if they are named."""
    problems: list[Problem] = []
    layout = None
    try:
        config, layout = resolve_layout(config, named, devices)
        validate(config, devices.number)
    except ConfigError as error:
        problems += error.problems
    if config.data.path is not None or config.data.blend is not None:
        from mlra_scale.data import check_data
        from mlra_scale.data.data_sets import find_data

        found = find_data(config)
        problems += check_data(config, found=found)
        if config.evaluation.tasks:
            from mlra_scale.evaluation.tasks import task_problems  # imports torch

            problems += task_problems(config, bool(found.manifests) or config.data.tokenizer is not None)
    if problems:
        raise ConfigError(problems)
    if rank == 0:
        print(plan_report(config, batch_plan(config, devices.number), layout, devices))
    return ExitCode.DONE


def _report_bad_input(error: ConfigError, rank: int) -> int:
    if rank != 0:
        time.sleep(_RANK_0_SECONDS)  # under a launcher rank 0's end ends this process here
    where = f" (rank {rank})" if rank != 0 else ""
    lines = "\n".join(f"  {problem}" for problem in error.problems)
    print(f"mlra_scale.train: bad input{where}\n{lines}", file=sys.stderr, flush=True)
    return ExitCode.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(interruption=INTERRUPTION))
