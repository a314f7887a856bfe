"""What every command of the command line has in common: its parser, the console, and options that several share."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlra_scale.console import InputError, make_unfailing, run_tool, set_up_logging


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: What stands after `mlra-scale`.
        summary: One line for `mlra-scale --help`.
        description: The first paragraph of the command's own help.
        examples: The end of its help; PROG stands for the beginning of a command line.
        add_arguments: Adds its options to a parser.
        run: Does the work; returns the exit code. Its options hold the arguments as they were given, too. An InputError
            that it raises is printed.
        parents: Parsers whose options it shares with other commands.
        is_intermixed: Whether options may stand between its positional arguments.
        has_side_effects: Whether it leaves something behind; see `console.run_tool`.
        handles_signals: Whether it handles signals itself.
    """

    name: str
    summary: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    parents: Sequence[argparse.ArgumentParser] = ()
    is_intermixed: bool = False
    has_side_effects: bool = False
    handles_signals: bool = False

    def parser(self, prog: str) -> argparse.ArgumentParser:
        """Returns its parser; `prog` is `mlra-scale NAME`, or the name of a file of tools/."""
        parser = argparse.ArgumentParser(
            prog=prog,
            description=textwrap.fill(self.description, 100),
            epilog=self.examples_of(prog),
            parents=self.parents,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_arguments(parser)
        return parser

    def examples_of(self, prog: str) -> str:
        """Returns the examples as they are typed."""
        return self.examples.replace("PROG", f"python tools/{prog}" if prog.endswith(".py") else prog)

    def main(self, arguments: Sequence[str], prog: str = "") -> int:
        """Parses the arguments and runs the command; returns the exit code. Help and errors name the program `prog`.

        Raises:
            SystemExit: From argparse, after its help or for a wrong command line (exit code 2).
        """
        parser, program = self.parser(prog or f"mlra-scale {self.name}"), prog.removesuffix(".py") or self.name
        try:
            options = (parser.parse_intermixed_args if self.is_intermixed else parser.parse_args)(arguments)
            options.arguments, options.program = [*arguments], program
            return self.run(options)
        except InputError as error:
            text = str(error).replace("\n", "\n  ")
            print(f"{program}: error: {text}", file=sys.stderr)
            return 2

    def start(self, arguments: Sequence[str] | None = None, prog: str = "") -> int:
        """Runs the command as the main function of a process; see `main`."""
        words = sys.argv[1:] if arguments is None else arguments
        set_up_logging()
        if self.handles_signals:
            make_unfailing()
            return self.main(words, prog)
        return run_tool(lambda: self.main(words, prog), self.has_side_effects)
