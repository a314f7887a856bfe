"""What benchmarks share: the command line, the environment, ratios, tables, and the report as a JSON file.

A report says what was run, when, at which commit and on what, and has tables. A cell of a table is a text, a number, or
the spread of a ratio. `python -m benchmarks.render FILE ...` prints the tables of reports.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from mlra_scale.console import table as text_table
from mlra_scale.files import write_atomically
from mlra_scale.study.provenance import hardware, versions
from mlra_scale.training.record import commit

Thing = TypeVar("Thing")
Value = str | int | float | None | dict[str, float]


@dataclass
class Table:
    """A table of a report: title with units, one header per column, rows of as many cells, a note below it."""

    title: str
    headers: list[str]
    rows: list[list[Value]]
    note: str = ""


@dataclass
class Report:
    """The result of one run of a benchmark: its tables, and every time and value that they were made from.

    The day is in UTC; the commit is None outside of git.
    """

    command: str
    date: str
    commit: str | None
    environment: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, arguments: argparse.Namespace) -> "Report":
        """Returns an empty report of a run that begins now (`parse`), and prints the environment."""
        environment = environment_of(getattr(arguments, "device", "cpu"))
        print("\n".join(f"{key}: {value}" for key, value in environment.items()), flush=True)
        return cls(arguments.command, f"{datetime.now(UTC):%Y-%m-%d}", commit(), environment)

    def add(self, table: Table) -> None:
        """Adds a table and prints it."""
        self.tables.append(table)
        print(f"\n{text_of(table)}", flush=True)

    def write(self, file: Path | None) -> None:
        """Writes the report; a reader sees the previous file or the new one, never a part."""
        if file is None:
            return
        text = json.dumps(asdict(self), indent=1) + "\n"
        target = file.resolve()
        if target.exists() and not target.is_file():
            target.write_text(text)  # a pipe or a device is not replaced by a file
        else:
            write_atomically(target, text)


def environment_of(device: str) -> dict[str, Any]:
    """Returns what numbers are measured on."""
    machine, found = hardware(), {**versions(), "transformers": version("transformers")}
    name = torch.cuda.get_device_name() if device == "cuda" else machine["cpu"]
    return {
        "device": f"{device} ({name})",
        "threads": f"{torch.get_num_threads()} of {machine['cores']} cores",
        "load average at start": f"{os.getloadavg()[0]:.1f}",
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
    }


def parser_of(module: str, description: str, rounds: int, has_device: bool = True) -> argparse.ArgumentParser:
    """Returns the parser of a benchmark, with --quick, --rounds, --json, and --device, --precision, --threads."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny sizes and two rounds: shows that it runs")
    add("--rounds", type=int, default=rounds, metavar="N", help="2 or more (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the report here")
    if has_device:
        add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
        add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line; ends the program with exit code 2 and a reason before anything is measured.

    Sets the number of threads. `rounds` is 2 with --quick, and `command` is the command line.
    """
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: a spread needs at least 2")
    if getattr(arguments, "threads", 1) < 1:
        parser.error(f"--threads {arguments.threads}: at least 1")
    file: Path | None = arguments.json
    if file is not None and file.is_dir():
        parser.error(f"--json {file}: this is a folder; name a file, for example {file / 'report.json'}")
    if file is not None and not file.parent.is_dir():
        parser.error(f"--json {file}: there is no folder {file.parent}; create it, or name a file elsewhere")
    arguments.rounds = 2 if arguments.quick else arguments.rounds
    arguments.command = " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    torch.set_num_threads(getattr(arguments, "threads", 1))
    if "device" in arguments:
        arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
        logging.disable(logging.WARNING)
    return arguments


def rotated(things: Sequence[Thing], turn: int) -> list[Thing]:
    """Returns the order of a round: each begins one further along, so that nothing is always the first."""
    shift = turn % len(things)
    return [*things[shift:], *things[:shift]]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Returns median, quartiles and extremes of the ratios round by round."""
    values = sorted(above / below for above, below in zip(numerators, denominators, strict=True))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": low, "upper": high, "min": values[0], "max": values[-1]}


def median_of(seconds: Sequence[float], factor: float = 1.0) -> float:
    """Returns the median times a factor."""
    return factor * statistics.median(seconds)


def cell_text(cell: Any) -> str:
    """Returns a cell as text; a spread as median [quartiles] (extremes)."""
    if cell is None:
        return ""
    if isinstance(cell, Mapping):
        return "{median:.3f} [{lower:.3f} {upper:.3f}] ({min:.3f} {max:.3f})".format(**cell)
    if isinstance(cell, float):
        return f"{cell:,.1f}" if abs(cell) >= 1000 else f"{cell:.5g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def text_of(table: Table) -> str:
    """Returns a table as plain text."""
    rows = [list(map(cell_text, row)) for row in table.rows]
    parts = [table.title, "", text_table(table.headers, rows, width=None), *([table.note] if table.note else [])]
    return "\n".join(parts)


def now(device: torch.device) -> float:
    """Returns the time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds that an action takes, until the device has finished its work."""
    begin = now(device)
    action()
    return now(device) - begin
