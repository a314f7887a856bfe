"""`mlra-scale jobs`: lists training runs, what each is doing and what went wrong last."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import json_output, place, positive
from mlra_scale.console import InputError

EXAMPLES = """examples:
  PROG
  PROG runs --watch 30
  PROG runs/first /scratch/runs --json
  PROG --attempts first
  PROG runs/first --attempts

exit codes: 0; 2 no runs found
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", type=place, nargs="*", metavar="FOLDER", help="run directory, or folder of some (default: runs)")
    add("--attempts", nargs="?", const="", metavar="RUN", help="the attempts of one run: its name or its directory")
    add("--watch", type=partial(positive, largest=1e6), metavar="SECONDS", help="look again after so many seconds")


def _run(options: argparse.Namespace) -> int:
    try:
        while True:
            _show(options)
            if options.watch is None:
                return 0
            time.sleep(options.watch)
    except KeyboardInterrupt:
        return 0


def _show(options: argparse.Namespace) -> None:
    """Prints the runs once."""
    from mlra_scale.cluster import runs as run_list
    from mlra_scale.cluster import runs_text

    now = time.time()
    folders, wanted = options.folders or [Path("runs")], options.attempts
    if wanted and run_list.is_run(Path(wanted)):
        folders, wanted = [Path(wanted)], ""
    runs, notes = run_list.list_runs(folders, now)
    if not runs:
        raise InputError(f"no runs found: {'; '.join(notes)}")
    chosen = [run for run in runs if wanted in (None, "", run.name)]
    if wanted is not None and len(chosen) != 1:
        mistake = "needs the name of one run" if wanted == "" else f"{wanted}: {len(chosen)} runs have that name"
        raise InputError(f"--attempts {mistake}; there are {', '.join(run.path for run in runs)}")
    # Into a pipe or a file, lines go uncut.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
    if options.json:
        text = json.dumps(runs_text.as_json(runs) if wanted is None else runs_text.attempts_as_json(chosen[0], now))
    else:
        text = runs_text.table(runs, width) if wanted is None else runs_text.attempts_as_text(chosen[0], now)
    is_screen = options.watch is not None and sys.stdout.isatty()
    print(f"\033[H\033[2J{text}" if is_screen else text, flush=True)
    for note in notes:
        print(f"jobs: {note}", file=sys.stderr)


COMMAND = Command(
    name="jobs",
    summary="list training runs, what each is doing and what went wrong last",
    description="A table of training runs, the newest start first. Where Slurm is, it is asked once about their jobs: "
    "one that it does not know any more has vanished, whatever its files say.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    parents=[json_output("one JSON object a look, with nothing cut")],
)
