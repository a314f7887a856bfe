"""What the command lines of benchmarks have in common: the number of rounds, and a file with every number."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlra_scale.files import write_atomically


def add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds --quick, --rounds and --json.

    Args:
        parser: Of the benchmark.
        rounds: The default.
    """
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: shows that it runs")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="2 or more (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here as well")


def check_common(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with exit code 2 and a reason if a value cannot be used, before anything is measured.

    Args:
        parser: Of the benchmark.
        arguments: As parsed; --rounds, --threads, --timeout and --json are checked where there are such.
    """
    values = vars(arguments)
    if (rounds := values.get("rounds")) is not None and rounds < 2:
        parser.error(f"--rounds {rounds}: a spread needs at least 2")
    if (threads := values.get("threads")) is not None and threads < 1:
        parser.error(f"--threads {threads}: at least 1")
    if (timeout := values.get("timeout")) is not None and not 0.0 < timeout < math.inf:
        parser.error(f"--timeout {timeout:g}: a number of seconds above 0")
    if (file := values.get("json")) is not None:
        if file.is_dir():
            parser.error(f"--json {file}: this is a folder; name a file, for example {file / 'report.json'}")
        if not file.parent.is_dir():
            parser.error(f"--json {file}: there is no folder {file.parent}; create it, or name a file elsewhere")


def write_report(arguments: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """Writes the numbers to the file of --json if it was given; a reader sees the old file or the new one."""
    if arguments.json is None:
        return
    text = json.dumps(report, indent=2) + "\n"
    file = arguments.json.resolve()
    if file.exists() and not file.is_file():
        file.write_text(text)  # a pipe or a device is written to, and not replaced by a file
    else:
        write_atomically(file, text)
