#!/usr/bin/env python
"""Lists training runs, what each is doing and what went wrong last: python tools/jobs.py --help."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXAMPLES = """examples:
  python tools/jobs.py
  python tools/jobs.py runs --watch 30
  python tools/jobs.py runs/first /scratch/runs --json
  python tools/jobs.py --attempts first
  python tools/jobs.py runs/first --attempts

exit codes: 0; 2 no runs found
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    result = argparse.ArgumentParser(
        prog="jobs.py",
        description="A table of training runs, the newest start first. Where Slurm is, it is asked once about their "
        "jobs: one that it does not know any more has vanished, whatever its files say.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("folders", type=Path, nargs="*", metavar="FOLDER", help="run directory, or folder of some (default: runs)")
    add("--attempts", nargs="?", const="", metavar="RUN", help="the attempts of one run: its name or its directory")
    add("--watch", type=_seconds, metavar="SECONDS", help="look again and again, with so long between")
    add("--json", action="store_true", help="print one JSON object a look, with nothing cut")
    return result


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 where no run was found."""
    options = parser().parse_args(arguments)
    try:
        while True:
            code = show(options)
            sys.stdout.flush()
            if options.watch is None or code != 0:
                return code
            time.sleep(options.watch)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # Whoever read has seen enough; the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def show(options: argparse.Namespace) -> int:
    """Looks once and prints; returns the exit code."""
    from mlra_scale.cluster import runs as run_list
    from mlra_scale.cluster import runs_text

    now = time.time()
    folders, wanted = options.folders or [Path("runs")], options.attempts
    if wanted and run_list.is_run(Path(wanted)):
        folders, wanted = [Path(wanted)], ""
    runs, notes = run_list.list_runs(folders, now)
    if not runs:
        print(f"jobs: error: no runs found: {'; '.join(notes)}", file=sys.stderr)
        return 2
    chosen = [run for run in runs if wanted in (None, "", run.name)]
    if wanted is not None and len(chosen) != 1:
        mistake = "needs the name of one run" if wanted == "" else f"{wanted}: {len(chosen)} runs have that name"
        print(f"jobs: error: --attempts {mistake}; there are {', '.join(run.path for run in runs)}", file=sys.stderr)
        return 2
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
