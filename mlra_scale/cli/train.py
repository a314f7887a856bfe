"""`mlra-scale train`: `python -m mlra_scale.train`, on one process or on several of this machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import count

EXAMPLES = """examples:
  PROG --preset laptop --run-dir runs/first data.path=data/python-docs
  PROG --nproc 2 --preset laptop --run-dir runs/two data.path=data/python-docs parallel.pipeline=2
  PROG --preset gpt2-mlra-72l --dry-run parallel.tensor=2 parallel.world_size=32

Training on several machines is started by torchrun on each of them, or by slurm/*.sh.
exit codes: 0 done; 1 an error; 2 bad input; 3 the loss is not finite; 4 a checkpoint could not be written; 5 stopped by
a signal after a checkpoint; 6 a node that cannot be used; 7 the guard gave up; 8 all steps are done, and the export
failed; 130 a second Ctrl-C; 128 and its number for a signal that ended a rank
"""


class _TrainCommand(Command):
    """Leaves all options but --nproc to `mlra_scale.train`, which parses and checks them on every rank."""

    def parser(self, prog: str) -> argparse.ArgumentParser:
        """Returns the parser whose help lists the options of both."""
        from mlra_scale.train import build_parser

        parser = build_parser()
        parser.prog, parser.epilog = prog, self.examples_of(prog)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        self.add_arguments(parser)
        return parser

    def main(self, arguments: Sequence[str], prog: str = "") -> int:
        """Takes --nproc out of the arguments and runs the training with the others."""
        prog = prog or f"mlra-scale {self.name}"
        parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
        self.add_arguments(parser)
        options, others = parser.parse_known_args(arguments)
        options.arguments = others
        if not {"-h", "--help"}.isdisjoint(others):
            self.parser(prog).print_help()
            return 0
        return self.run(options)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=count, default=1, metavar="N", help="processes on this machine (default: 1)")


def _run(options: argparse.Namespace) -> int:
    """Runs the training; returns the exit code. With one process, that of the command becomes the training's."""
    command = [sys.executable, "-m", "mlra_scale.train", *options.arguments]
    if options.nproc == 1:
        os.execv(command[0], command)
    from mlra_scale.cli.launcher import run_ranks

    return run_ranks(options.nproc, command)


COMMAND = _TrainCommand(
    name="train",
    summary="train a model, on one process or with --nproc on several",
    description="",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    handles_signals=True,
)
