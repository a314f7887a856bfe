"""Runs commands of the command line in this process: the real thing, without the seconds that starting takes."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from mlra_scale.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"export_hf": "export", "import_hf": "import", "prepare_data": "prepare"}
"""Files of tools/ to the names of their commands, where those differ."""


@dataclass(frozen=True)
class Ran:
    """What a tool did."""

    code: int
    stdout: str
    stderr: str


def run_tool(name: str, *arguments: object) -> Ran:
    """Runs the command of tools/NAME.py with these arguments; argparse's own exits become exit codes as well."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = COMMANDS[NAMES.get(name, name)].main([str(argument) for argument in arguments], f"{name}.py")
        except SystemExit as left:
            assert isinstance(left.code, int)
            code = left.code
    return Ran(code, out.getvalue(), err.getvalue())
