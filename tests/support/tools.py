"""Runs the command lines of tools/ in this process: the real thing, without the seconds that starting takes."""

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    """What a tool did."""

    code: int
    stdout: str
    stderr: str


@cache
def load_tool(name: str) -> ModuleType:
    """tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *arguments: object) -> Ran:
    """Runs tools/NAME.py with these arguments; argparse's own exits become exit codes as well."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = load_tool(name).main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
    return Ran(code, out.getvalue(), err.getvalue())
