"""Kills ranks at random moments of training, and looks whether the run goes on as if nothing had happened.

    python -m tests.faults.random_kills [--kills 50] [--layout pipeline2 ...] [--precision bf16] [--seed 0]

Torchrun starts the real command line; at a random moment, anywhere between the start of the processes and the end of
the run, one rank or all of them die by SIGKILL; `--resume auto` starts again, and is killed again, until the run has
reached its end, and a new run begins. After every kill a complete checkpoint must be there, at least as new as the last
one that was told; at the end losses, gradient norms and the last checkpoint must be those of the undisturbed run, bit
by bit, and every step must be recorded once.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.checks import LAYOUTS, Training, assert_as_undisturbed, assert_way_back
from tests.faults.launching import Launch, Torchrun
from tests.support.training_runs import events, make_data

STEPS, EVERY = 60, 3
TIMEOUT = 300.0
POLL_SECONDS = 0.02
EARLY = 0.1
"""Share of the kills that may come before the first step of a start, while the checkpoint is being loaded."""
STARTING_SECONDS = 12.0
"""About as long as a start takes."""


@dataclass
class Chain:
    """A run that is killed and continued until it is done.

    Attributes:
        training: What is trained.
        run: Its directory.
        resumed: The step from which every start went on.
    """

    training: Training
    run: Path
    resumed: list[int] = field(default_factory=list)

    def start(self, launcher: Callable[..., Launch]) -> Launch:
        """Starts, or goes on."""
        arguments = self.training.arguments(self.run, resume=self.run.exists())
        return launcher(arguments, self.training.num_ranks, self.run.with_suffix(".log"))

    def num_starts(self) -> int:
        """Starts that got as far as training."""
        path = self.run / "events.jsonl"
        return sum(event["event"] == "start" for event in events(self.run)) if path.exists() else 0

    def look(self) -> str:
        """Fails unless there is a way back; tells how far the run has come."""
        return f"a way back to step {assert_way_back(self.run)}"


def kill_once(
    chain: Chain, seconds: float, launcher: Callable[..., Launch], draw: random.Random, starting: float
) -> str | None:
    """Starts, and kills one rank or all at a random moment.

    Args:
        chain: The run.
        seconds: How long its training takes when nobody disturbs it.
        launcher: How processes are started.
        draw: Gives the moment and the victims.
        starting: Seconds that a start takes.

    Returns:
        What was killed; None if the run was done before.
    """
    launch, before = chain.start(launcher), chain.num_starts()
    started, is_early = time.perf_counter(), draw.random() < EARLY
    victims = draw.choice(
        [*([rank] for rank in range(chain.training.num_ranks)), list(range(chain.training.num_ranks))]
    )
    try:
        while not is_early and chain.num_starts() == before and launch.is_running():
            time.sleep(POLL_SECONDS)
        moment = draw.uniform(0.0, starting) if is_early else draw.uniform(0.0, seconds)
        end = time.perf_counter() + moment
        while time.perf_counter() < end and launch.is_running():
            time.sleep(POLL_SECONDS)
        launch.kill(victims)
        if launch.wait(TIMEOUT):
            return None
    finally:
        launch.end()
    when = "while starting" if chain.num_starts() == before else f"{moment:.1f} s into training"
    who = "all ranks" if len(victims) > 1 else f"rank {victims[0]}"
    return f"{who} killed {when} ({time.perf_counter() - started:.0f} s after the start)"


def kill(
    training: Training,
    num_kills: int,
    folder: Path,
    launcher: Callable[..., Launch],
    draw: random.Random,
    starting: float = STARTING_SECONDS,
) -> tuple[int, list[str]]:
    """Kills a training as often as asked, in as many runs as that takes, and compares each with the undisturbed one.

    Args:
        training: What is trained.
        num_kills: How many kills.
        folder: For the runs.
        launcher: How processes are started.
        draw: Gives moments and victims.
        starting: Seconds that a start takes.

    Returns:
        Number of runs that were compared, and what failed.
    """
    reference = Chain(training, folder / f"{training.layout}-undisturbed")
    assert reference.start(launcher).wait(TIMEOUT), reference.run.with_suffix(".log").read_text()[-3000:]
    seconds = float(events(reference.run)[-1]["wall_seconds"])
    print(f"{training.layout}: {training.steps} steps take {seconds:.1f} s undisturbed", flush=True)
    chain = Chain(training, folder / f"{training.layout}-0")
    failures: list[str] = []
    count, num_runs = 0, 0
    while count < num_kills or chain.run.exists():
        try:
            if count < num_kills:
                told = kill_once(chain, seconds, launcher, draw, starting)
            else:
                launch = chain.start(launcher)
                assert launch.wait(TIMEOUT), f"could not go on\n{launch.output()[-3000:]}"
                told = None
            if told is not None:
                count += 1
                print(f"{training.layout}, kill {count}: {told}, {chain.look()}", flush=True)
                continue
            assert_as_undisturbed(chain.run, reference.run, training.steps)
            starts = [event["step"] for event in events(chain.run) if event["event"] == "start"]
            print(f"{training.layout}: run {num_runs + 1} equals the undisturbed one; starts at {starts}", flush=True)
        except AssertionError as error:
            failures.append(f"{training.layout}, after kill {count}: {error}")
            print(f"FAILED: {failures[-1]}", flush=True)
        num_runs += 1
        chain = Chain(training, folder / f"{training.layout}-{num_runs}")
    return num_runs, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="tests.faults.random_kills", description="SIGKILL at random moments.")
    parser.add_argument("--kills", type=int, default=50, help="how many, over all layouts (default: %(default)s)")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["pipeline2", "zero3-dp2"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(argv)
    draw, started = random.Random(options.seed), time.perf_counter()
    num_runs, failures = 0, list[str]()
    with tempfile.TemporaryDirectory() as name:
        data = make_data(Path(name) / "data")
        for place, layout in enumerate(options.layout):
            share = len(range(place, options.kills, len(options.layout)))
            training = Training(data, layout, STEPS, EVERY, precision=options.precision)
            runs, failed = kill(training, share, Path(name), Torchrun, draw)
            num_runs, failures = num_runs + runs, failures + failed
    seconds = time.perf_counter() - started
    print(f"{options.kills} kills in {num_runs} runs, {len(failures)} failures, {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
