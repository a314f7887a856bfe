"""`mlra-scale sweep`: runs a study, a grid of training runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import add_overrides, count, place

if TYPE_CHECKING:
    from mlra_scale.study.grid import Cell
    from mlra_scale.study.sweep import Sweep

EXAMPLES = """examples:
  PROG docs/studies/small.yaml --dry-run
  PROG docs/studies/small.yaml --jobs 2
  PROG docs/studies/small.yaml --output runs/short --jobs 2 train.steps=30 --only 'mlra-*'
  PROG docs/studies/small.yaml --cell 7        one cell, as slurm/sweep.sh runs it

The same command continues a stopped sweep: it runs the cells that have no result or failed, and waits for cells that
another process runs (another sweep, or a run whose sweep was killed).
exit codes: 0 every chosen cell has a result; 1 cells failed or have none; 2 bad input; 5 stopped by a signal; 130
stopped by Ctrl-C
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=place, metavar="STUDY.yaml", help="the study (format: docs/studies/README.md)")
    add("--output", type=place, metavar="DIR", help="output folder (default: runs/NAME of the study)")
    add("--jobs", type=count, default=1, metavar="N", help="number of cells that are run at once (default: 1)")
    add("--dry-run", action="store_true", help="list the cells and their sizes, and stop")
    add("--cell", metavar="INDEX|NAME", help="run this cell only")
    add("--only", metavar="PATTERN", help="run cells with such names only, such as 'mlra-L48-*'")
    add_overrides(parser, "single fields, for every cell")


def _run(options: argparse.Namespace) -> int:
    from mlra_scale.study.grid import cells_of, load_study
    from mlra_scale.study.results import SweepDirectory
    from mlra_scale.study.sweep import Sweep
    from mlra_scale.study.sweep_text import plan_text

    study = load_study(options.study, options.overrides)
    cells = cells_of(study)
    chosen = _choose(cells, options.cell, options.only)
    sweep = Sweep(study, cells, SweepDirectory(options.output or Path("runs") / study.name))
    if options.dry_run:
        print(plan_text(sweep, chosen, options.jobs))
        return 0
    return run_cells(sweep, chosen, options.jobs, ["mlra-scale", "sweep", *options.arguments])


def _choose(cells: Sequence[Cell], wanted: str | None, pattern: str | None) -> list[Cell]:
    """Returns the cell of an index or name, or the cells whose names match a pattern; ConfigError if there is none."""
    from mlra_scale.config import ConfigError, Problem
    from mlra_scale.config.problems import nearest

    if wanted is not None:
        chosen = [cell for cell in cells if wanted in (str(cell.index), cell.name)]
        if not chosen:
            known = f"; the indices are 0 to {len(cells) - 1}" if wanted.lstrip("-").isdecimal() else None
            remedy = "is no cell of this study" + (known or nearest(wanted, [cell.name for cell in cells]))
            raise ConfigError([Problem("--cell", wanted, remedy)])
        return chosen
    chosen = [cell for cell in cells if pattern is None or fnmatchcase(cell.name, pattern)]
    if not chosen:
        remedy = f"matches none of the {len(cells)} cells, such as {cells[0].name}"
        raise ConfigError([Problem("--only", pattern, remedy)])
    return chosen


def run_cells(sweep: Sweep, chosen: list[Cell], jobs: int, command: Sequence[str]) -> int:
    """Runs cells of a sweep and prints their results; returns the exit code.

    Args:
        sweep: The sweep.
        chosen: Its cells to run.
        jobs: Number of cells that are run at once.
        command: The command line, for study.json.
    """
    from mlra_scale.study.sweep_text import Progress, summary_text

    output = sweep.directory
    to_do = sweep.prepare(chosen, command)
    progress = Progress(to_do, output)
    counts = f"{len(to_do)} of {len(chosen)} cells to do, {jobs} at once"
    progress.print(f"{sweep.study.name}: {counts}, output {output.path}")
    if stale := output.stale(sweep.cells):
        progress.print(f"results of an earlier grid, not in results.jsonl: {len(stale)} cells, such as {stale[0]}")
    try:
        stopped_by = sweep.run(to_do, jobs, progress.on_result, progress.on_poll)
    finally:
        progress.close()
    print(summary_text(sweep), flush=True)
    if sweep.bad_input is not None:
        print(f"sweep: no more cells were started: the first one refused its input: {sweep.bad_input}", file=sys.stderr)
        return 2
    if stopped_by is not None:
        return 130 if stopped_by == signal.SIGINT else 5
    return int(any(not output.files(cell).is_done() for cell in chosen))


COMMAND = Command(
    name="sweep",
    summary="run a study, a grid of training runs",
    description="Runs every cell of a study (variants x axes x seeds) as a training run and collects one line per "
    "cell in OUTPUT/results.jsonl. Every configuration is checked before the first cell starts.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    is_intermixed=True,
    handles_signals=True,
)
