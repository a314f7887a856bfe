#!/usr/bin/env python
"""Writes a report of a run or of a sweep: python tools/report.py --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXAMPLES = """examples:
  python tools/report.py runs/first
  python tools/report.py runs/small --output reports/small

What is in a report, and how each number is computed: docs/report.md.
exit codes: 0; 2 there is no run and no sweep, the report cannot be written, or the extra `report` is not installed
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="report.py",
        description="One HTML file with everything inside, and its figures as PNG files, of a run directory or of a "
        "sweep's output folder; both may still be at work.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("path", type=Path, metavar="FOLDER", help="run directory, or a sweep's output folder")
    add("--output", type=Path, metavar="FOLDER", help="where to write (default: the folder report in FOLDER)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 for bad input."""
    options = parser().parse_args(arguments)
    try:
        from mlra_scale.study.report.run_report import report_run
        from mlra_scale.study.report.sweep_record import is_sweep
        from mlra_scale.study.report.sweep_report import report_sweep
    except ImportError as error:
        return _refuse(f"reports need more libraries ({error}); install them with: pip install 'mlra-scale[report]'")
    from mlra_scale.training.run_directory import RunDirectory

    path: Path = options.path
    if not is_sweep(path) and not RunDirectory(path).holds_a_run():
        return _refuse(f"{path}: neither a run directory nor a sweep's output folder")
    output = options.output or path / "report"
    try:
        paths = (report_sweep if is_sweep(path) else report_run)(path, output)
    except OSError as error:
        return _refuse(f"{output} cannot be written ({error.strerror})")
    print("\n".join(map(str, paths)))
    return 0


def _refuse(reason: str) -> int:
    print(f"report: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    from mlra_scale.console import run_tool

    sys.exit(run_tool(main, has_side_effects=True))
