"""The command `mlra-scale`: finds the named command and leaves the rest of the command line to it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlra_scale import __version__
from mlra_scale.cli import (
    checkpoints,
    evaluate,
    export,
    generate,
    import_,
    jobs,
    plan,
    prepare,
    report,
    slurm_files,
    sweep,
    tev,
    train,
)
from mlra_scale.cli.command import Command

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND
    for module in (
        *(prepare, plan, train, jobs, report, checkpoints, evaluate, generate, export, import_, tev, sweep),
        slurm_files,
    )
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's name."""
    lines = [f"  {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    result = argparse.ArgumentParser(
        prog="mlra-scale",
        description="Pre-training of very deep GPT-2 models with low-rank attention factors (MLRA).",
        epilog="\n".join(["commands:", *lines, "", "mlra-scale COMMAND --help describes one of them."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mlra-scale [--version] COMMAND ...",
        allow_abbrev=False,
    )
    result.add_argument("--version", action="version", version=f"mlra-scale {__version__}")
    result.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    result.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line as the main function of a process; returns the exit code."""
    options = parser().parse_args(arguments)
    return COMMANDS[options.command].start(options.arguments)


if __name__ == "__main__":
    sys.exit(main())
