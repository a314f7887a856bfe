"""`mlra-scale report`: writes a report of a run or of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlra_scale.cli.command import Command
from mlra_scale.console import InputError

EXAMPLES = """examples:
  PROG runs/first
  PROG runs/small --output reports/small

What is in a report, and how each number is computed: docs/report.md.
exit codes: 0; 2 there is no run and no sweep, the report cannot be written, or the extra `report` is not installed
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", type=Path, metavar="FOLDER", help="run directory, or a sweep's output folder")
    add("--output", type=Path, metavar="FOLDER", help="where to write (default: the folder report in FOLDER)")


def _run(options: argparse.Namespace) -> int:
    try:
        from mlra_scale.study.report.run_report import report_run
        from mlra_scale.study.report.sweep_record import is_sweep
        from mlra_scale.study.report.sweep_report import report_sweep
    except ImportError as error:
        reason = f"reports need more libraries ({error}); install them with: pip install 'mlra-scale[report]'"
        raise InputError(reason) from None
    from mlra_scale.training.run_directory import RunDirectory

    path: Path = options.path
    if not is_sweep(path) and not RunDirectory(path).holds_a_run():
        raise InputError(f"{path}: neither a run directory nor a sweep's output folder")
    output = options.output or path / "report"
    try:
        paths = (report_sweep if is_sweep(path) else report_run)(path, output)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror})") from None
    print("\n".join(map(str, paths)))
    return 0


COMMAND = Command(
    name="report",
    summary="write a report of a run or of a sweep: one HTML page with its figures",
    description="One HTML file with everything inside, and its figures as PNG files, of a run directory or of a "
    "sweep's output folder; both may still be at work.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    has_side_effects=True,
)
