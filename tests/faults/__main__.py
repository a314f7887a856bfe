"""Attacks the command lines from outside, and prints a table of what came of it.

    python -m tests.faults [--only PART_OF_NAME ...] [--jobs N] [--keep FOLDER] [--list]

SIGKILLs at every point of a save, at random moments and at chosen ones, and disturbances of every kind: signals,
terminals, disks, damaged and replaced files, strangers at a job's port. Real processes of the real command lines on
tiny models; and, in one process, bits and ends of every kind of file that is read, and every writer on a failing disk.
The last table has the number of faults by kind, and of those whose promise was not kept. The exit code is 1 if there is
one. `--keep` leaves all files in a folder. `tests.faults.schedule` has an hour of faults of one Slurm job.
"""

import argparse
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.case import Case, NotKept
from tests.faults.cases import CASES
from tests.faults.fuse import fuse_missing
from tests.faults.places import mount_missing
from tests.slurm.cluster import slurm_missing


@dataclass(frozen=True)
class Outcome:
    """What came of a case: why its promise was not kept (empty: it was), its seconds, and how many of its faults."""

    case: Case
    reason: str
    seconds: float
    num_failed: int = 0


def attempt(case: Case, bench: Bench) -> Outcome:
    """Does what a case does."""
    started, reason, num_failed = time.perf_counter(), "", 0
    try:
        case.act(bench, bench.place(case.name))
    except NotKept as error:
        reason, num_failed = str(error), error.number
    except AssertionError as error:
        reason, num_failed = str(error) or traceback.format_exc(limit=-2), 1
    except Exception:
        # Nothing is known of the faults of a case that broke.
        reason, num_failed = traceback.format_exc(), sum(case.faults.values())
    return Outcome(case, reason, time.perf_counter() - started, num_failed)


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
    rows = ["| case | what is done | promise | faults | seconds | result |", "|---|---|---|---|---|---|"]
    for item in outcomes:
        result = f"not kept: {item.reason.strip().splitlines()[0][:100]}" if item.reason else "kept"
        case = item.case
        faults = ", ".join(f"{number} x {kind}" for kind, number in case.faults.items())
        cells = [case.name, case.done, case.promise, faults, f"{item.seconds:.0f}", result]
        rows.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(rows)


def sums(outcomes: Sequence[Outcome]) -> str:
    """The number of faults by kind, and of those whose promise was not kept, as a Markdown table.

    Where a case of several kinds failed, its failures count under each of them, and once in the sum.
    """
    kinds, failed = Counter[str](), Counter[str]()
    for item in outcomes:
        kinds.update(item.case.faults)
        failed.update(dict.fromkeys(item.case.faults, item.num_failed))
    rows = ["| kind of fault | number | promise not kept |", "|---|---|---|"]
    rows += [f"| {kind} | {number} | {failed[kind]} |" for kind, number in kinds.most_common()]
    return "\n".join([*rows, f"| all | {kinds.total()} | {sum(item.num_failed for item in outcomes)} |"])


def missing(cases: Sequence[Case]) -> dict[str, str]:
    """What is not there of that which cases need, with the reason."""
    checks = {"slurm": slurm_missing, "mount": mount_missing, "fuse": fuse_missing}
    found = {need: checks[need]() for need in {case.needs for case in cases} - {""}}
    return {need: reason for need, reason in found.items() if reason is not None}


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
        print(f"{sum(sum(case.faults.values()) for case in cases)} faults in {len(cases)} cases")
        return 0
    for need, reason in (without := missing(cases)).items():
        print(f"left out: {sum(case.needs == need for case in cases)} cases that need {reason}")
    cases = [case for case in cases if case.needs not in without]
    started = time.perf_counter()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory() if options.keep is None else nullcontext(str(options.keep)) as name:
        outcomes = run(cases, Path(name), options.jobs)
    print(table(outcomes))
    print(f"\n{sums(outcomes)}\n{len(cases)} cases, {time.perf_counter() - started:.0f} s")
    num_failed = sum(item.reason != "" for item in outcomes)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
