"""Attacks the command lines from outside, and prints a table of what came of it.

    python -m tests.faults [--only PART_OF_NAME ...] [--jobs N] [--keep FOLDER] [--list]

SIGKILLs at every point of a save, at random moments and at chosen ones, and disturbances of every kind: signals,
terminals, disks, damaged and replaced files, strangers at a job's port. Real processes of the real command lines on
tiny models. The exit code is 1 if a promise was not kept. `--keep` leaves all files in a folder.
"""

import argparse
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.case import Case
from tests.faults.cases import CASES


@dataclass(frozen=True)
class Outcome:
    """What came of a case: why its promise was not kept (empty: it was), and the seconds that it took."""

    case: Case
    reason: str
    seconds: float


def attempt(case: Case, bench: Bench) -> Outcome:
    """Does what a case does."""
    started, reason = time.perf_counter(), ""
    try:
        case.act(bench, bench.place(case.name))
    except AssertionError as error:
        reason = str(error) or traceback.format_exc(limit=-2)
    except Exception:
        reason = traceback.format_exc()
    return Outcome(case, reason, time.perf_counter() - started)


def run(cases: Sequence[Case], folder: Path, num_jobs: int) -> list[Outcome]:
    """Runs cases, several at once, and prints each as it ends; those about Slurm one after the other."""
    bench, slurm = Bench(folder), threading.Lock()

    def one(case: Case) -> Outcome:
        with slurm if case.needs == "slurm" else nullcontext():
            outcome = attempt(case, bench)
        word = "FAILED" if outcome.reason else "kept"
        print(f"{word:6} {outcome.seconds:5.0f} s  {case.name}", flush=True)
        if outcome.reason:
            print(textwrap.indent(shortened(outcome.reason), "    "), flush=True)
        return outcome

    assert bench.data.exists()
    try:
        with ThreadPoolExecutor(num_jobs) as pool:
            return list(pool.map(one, cases))
    finally:
        bench.close()


def shortened(reason: str, num_lines: int = 12) -> str:
    """The first and the last lines of a long reason."""
    lines = [line[:300] for line in reason.strip().splitlines()]
    return "\n".join(lines if len(lines) <= 2 * num_lines else [*lines[:num_lines], "...", *lines[-num_lines:]])


def table(outcomes: Sequence[Outcome]) -> str:
    """The results as a Markdown table."""
    rows = ["| case | what is done | promise | kills | seconds | result |", "|---|---|---|---|---|---|"]
    for item in outcomes:
        result = f"not kept: {item.reason.strip().splitlines()[0][:100]}" if item.reason else "kept"
        case = item.case
        cells = [case.name, case.done, case.promise, str(case.num_kills or ""), f"{item.seconds:.0f}", result]
        rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="tests.faults", description="Attacks from outside.")
    parser.add_argument("--only", nargs="+", metavar="PART", help="cases with one of these in their names")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at once (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder in which everything stays")
    parser.add_argument("--list", action="store_true", help="list the cases, and stop")
    options = parser.parse_args(argv)
    cases = [case for case in CASES if not options.only or any(part in case.name for part in options.only)]
    if options.list:
        print("\n".join(f"{case.name}: {case.done}" for case in cases))
        return 0
    started = time.perf_counter()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory() if options.keep is None else nullcontext(str(options.keep)) as name:
        outcomes = run(cases, Path(name), options.jobs)
    print(table(outcomes))
    num_failed, num_kills = sum(item.reason != "" for item in outcomes), sum(case.num_kills for case in cases)
    num_others, seconds = sum(case.num_kills == 0 for case in cases), time.perf_counter() - started
    print(f"{num_kills} SIGKILLs, {num_others} disturbances, {num_failed} cases failed, {seconds:.0f} s")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
