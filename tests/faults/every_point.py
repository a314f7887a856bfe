"""Kills each rank at each point of a save, and looks whether the run goes on as if nothing had happened.

    python -m tests.faults.every_point [--layout pipeline2 ...] [--saves 1 2] [--precision bf16]

For every point of mlra_scale/checkpoint/failpoints.py, every rank that passes it and the first and the second save of a
run: torchrun starts the real command line, the rank dies by SIGKILL at the point, `--resume auto` starts again and ends
the run. Losses, gradient norms and the last checkpoint must be those of the undisturbed run, bit by bit.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlra_scale.checkpoint.failpoints import FAILPOINTS
from tests.faults.checks import LAYOUTS, Training, assert_as_undisturbed, assert_way_back
from tests.faults.dying import Fault, dies_at
from tests.faults.launching import Launch, Torchrun
from tests.support.training_runs import events, make_data

STEPS, EVERY = 6, 2
TIMEOUT = 300.0
Launcher = Callable[..., Launch]


def training_of(data: Path, layout: str, precision: str = "fp32") -> Training:
    """A run of three saves, each of which removes the one before."""
    return Training(data, layout, STEPS, EVERY, keep_last=1, precision=precision)


def faults_of(num_ranks: int, saves: Sequence[int] = (1, 2)) -> Iterator[Fault]:
    """Every point with every rank that passes it, at every one of the given saves."""
    for point, who in FAILPOINTS.items():
        for rank in range(num_ranks) if who.startswith("every rank") else (0,):
            # The first removal belongs to the second save.
            for save in (1,) if point == "retention" else saves:
                yield Fault(point, rank, save)


def undisturbed(training: Training, run: Path, launcher: Launcher) -> Path:
    """Trains without a fault."""
    launch = launcher(training.arguments(run), training.num_ranks, run.with_suffix(".log"))
    assert launch.wait(TIMEOUT), launch.output()[-3000:]
    return run


def check(training: Training, fault: Fault, run: Path, reference: Path, launcher: Launcher) -> str:
    """Kills a rank at a point, and continues.

    Returns:
        Where the run went on, in a few words.
    """
    log = run.with_suffix(".log")
    launch = launcher(training.arguments(run), training.num_ranks, log, fault)
    assert not launch.wait(TIMEOUT), f"{fault}: the point was not reached\n{launch.output()[-3000:]}"
    assert dies_at(fault) in launch.output(), f"{fault}: it ended before\n{launch.output()[-3000:]}"
    step = assert_way_back(run)
    is_second = fault.occurrence > 1 or fault.point == "retention"
    assert step > 0 or not is_second, f"{fault}: nothing to go on from"
    launch = launcher(training.arguments(run, resume=True), training.num_ranks, log)
    assert launch.wait(TIMEOUT), f"{fault}: could not go on\n{launch.output()[-3000:]}"
    assert_as_undisturbed(run, reference, training.steps)
    resumed = [event["step"] for event in events(run) if event["event"] == "resume"]
    if fault.point == "before-latest" and step > EVERY:
        # A start goes on from what `latest` names, and saves the complete one once more.
        step -= EVERY
    assert resumed == ([] if step == 0 else [step]), (resumed, step)
    return f"went on from step {resumed[0] if resumed else 0}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="tests.faults.every_point", description="SIGKILL at every point of a save.")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["pipeline2", "zero3-dp2"])
    parser.add_argument("--saves", nargs="+", type=int, default=[1, 2], help="at which saves (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(argv)
    failures, count, started = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder / "data")
        for layout in options.layout:
            training = training_of(data, layout, options.precision)
            reference = undisturbed(training, folder / f"{layout}-undisturbed", Torchrun)
            for fault in faults_of(training.num_ranks, options.saves):
                run = folder / "run"
                count += 1
                try:
                    outcome = check(training, fault, run, reference, Torchrun)
                except AssertionError as error:
                    outcome, failures = f"FAILED: {error}", failures + 1
                print(f"{layout}: rank {fault.rank} at {fault.point}, save {fault.occurrence}: {outcome}", flush=True)
                shutil.rmtree(run, ignore_errors=True)
    print(f"{count} kills, {failures} failures, {time.perf_counter() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
