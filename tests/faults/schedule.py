"""An hour of failures: one Slurm job on two nodes of three, whose run continues over faults that a seed draws.

    python -m tests.faults.schedule [--seed S] [--faults 50] [--kinds KIND ...] [--keep FOLDER] [--list]

A real Slurm cluster on this machine (tests/slurm/cluster.py), the project's own sbatch file, a tiny model. Each fault
waits for two new checkpoints, comes, and is over when the run trains again and has passed the step at which it was hit.
At the end the run is stopped, the same configuration is trained without Slurm and faults, and the two records must be
equal: no step lost, none doubled, nothing torn visible. Kinds that need what is not here are left out, and named with
the reason. The exit code is 1 if a promise was not kept. Every wait has a limit that only a hang reaches.
"""

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.faults.fuse import faulty_disk, fuse_missing
from tests.faults.hour import KINDS, OVERRIDES, PATIENCE, Hour, Kind, faketime
from tests.faults.launching import Forked
from tests.faults.places import disk, mount_missing
from tests.faults.training import assert_visible_is_whole, assert_way_back
from tests.slurm.cluster import SlurmCluster, slurm_missing
from tests.slurm.jobs import TINY, compared
from tests.support.training_runs import ROOT, make_data, metrics

DISK_BYTES = 128 << 20
DAY = 86400.0


def draw(seed: int, number: int, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """Draws faults: kinds in rounds, each of which has all of them in an order of its own, and a node of the job.

    Returns:
        (kind, 0 or 1 for the node) of each fault.
    """
    source = random.Random(seed)
    faults: list[tuple[str, int]] = []
    while len(faults) < number:
        faults += [(kind, source.randrange(2)) for kind in source.sample(list(kinds), len(kinds))]
    return faults[:number]


def left_out(kinds: Sequence[str]) -> dict[str, str]:
    """Kinds that cannot be done here, with the reason."""
    no_disk = mount_missing()
    missing = {
        "disk": no_disk,
        "fuse": no_disk or fuse_missing(),
        "faketime": None if faketime() else "libfaketime under which Python can sleep (pip install libfaketime)",
    }
    return {kind: f"needs {reason}" for kind in kinds if (reason := missing.get(KINDS[kind].needs)) is not None}


@dataclass
class Results:
    """What came of the faults.

    Attributes:
        seconds: By kind, from each fault to the first new step; None where a promise was not kept.
        failures: What was not as promised.
        wall: Seconds from the first step to the last.
        num_steps: Steps kept.
        step_seconds: Median time of a step.
    """

    seconds: dict[str, list[float | None]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    wall: float = 0.0
    num_steps: int = 0
    step_seconds: float = 0.0

    @property
    def effective(self) -> float:
        """Steps kept x step time / wall."""
        return self.num_steps * self.step_seconds / self.wall

    @property
    def median(self) -> float:
        """Median seconds to the first new step, over the faults that end an attempt."""
        ending = [items for name, items in self.seconds.items() if KINDS[name].costs_attempt]
        return statistics.median([item for items in ending for item in items if item is not None] or [0.0])


def strike(hour: Hour, kind: Kind, number: int) -> float:
    """Does one fault, and waits until the run has survived it; returns the seconds to the first new step."""
    hour.be_ready()
    nodes, before, step = hour.job.nodes(), hour.num_attempts(), hour.job.step()
    started = time.monotonic()
    kind.act(hour, nodes[number])
    if not kind.costs_attempt:
        hour.wait(lambda: hour.job.step() > step, f"a step after {step}")
        assert hour.num_attempts() == before, "it has cost an attempt"
    else:
        after = hour.num_attempts() if kind.is_again else before
        hour.wait(lambda: hour.num_trained(after), "an attempt that trains")
    seconds = time.monotonic() - started
    hour.wait(lambda: hour.job.step() > step, f"a step after {step}")
    hour.cluster.start_nodes(3)
    assert_way_back(hour.run)
    return seconds


def run_schedule(hour: Hour, faults: Sequence[tuple[str, int]]) -> Results:
    """Does all faults, stops the run, and returns what came of them."""
    results = Results()
    hour.wait(lambda: hour.job.step() > 0, "the first step")
    began = time.monotonic()
    for place, (name, number) in enumerate(faults, start=1):
        seconds = None
        try:
            seconds = strike(hour, KINDS[name], number)
        except (AssertionError, TimeoutError, RuntimeError) as error:
            results.failures.append(f"fault {place}, {name}: {error}")
        results.seconds.setdefault(name, []).append(seconds)
        shown = "NOT KEPT" if seconds is None else f"{seconds:.1f} s to the first new step"
        print(f"{place:3}/{len(faults)} {name:18} step {hour.job.step():6}  {shown}", flush=True)
        if seconds is None:
            print(results.failures[-1][-1500:], flush=True)
            hour.mend()
    hour.be_ready()
    results.wall = time.monotonic() - began
    results.num_steps = hour.job.stop()
    results.step_seconds = step_seconds(hour.run)
    return results


def step_seconds(run: Path) -> float:
    """Median seconds from one recorded step to the next, within starts."""
    clocks = [item["seconds"] for item in metrics(run) if "loss" in item]
    return statistics.median(later - clock for clock, later in pairwise(clocks) if later > clock)


def undisturbed(hour: Hour, last_step: int) -> Path:
    """The same configuration up to a step, by two ranks without Slurm and faults."""
    run = hour.place / "undisturbed"
    # One step more: at its last step a run evaluates.
    command = [
        "--preset",
        "gpt2-mlra-72l-wide",
        "--ds-config",
        str(ROOT / "ds_configs/zero3.json"),
        "--run-dir",
        str(run),
    ]
    command += ["guard.enabled=true", *TINY, *OVERRIDES, f"data.path={hour.data}", f"train.steps={last_step + 1}"]
    launch = Forked([*command, "wandb.mode=disabled"], 2, hour.place / "undisturbed.log")
    code = launch.wait(PATIENCE + last_step)
    assert code == 0, launch.output()[-3000:]
    return run


def compare(hour: Hour, last_step: int) -> list[str]:
    """What is wrong with the run in the end: steps lost, doubled or different, or something torn."""
    faults = []
    steps = [item["step"] for item in metrics(hour.run) if "loss" in item]
    lost, doubled = set(range(1, last_step + 1)) - set(steps), len(steps) - len(set(steps))
    if lost or doubled:
        faults.append(f"{len(lost)} steps are lost, {doubled} are doubled")
    try:
        assert_visible_is_whole(hour.run)
    except AssertionError as error:
        faults.append(f"something torn is visible: {error}")
    mine, theirs = compared(hour.run, last_step), compared(undisturbed(hour, last_step), last_step)
    different = [one["step"] for one, other in zip(mine, theirs, strict=False) if one != other]
    if different or len(mine) != len(theirs):
        faults.append(f"the record differs from the undisturbed one from step {(different or ['its end'])[0]} on")
    return faults


def table(results: Results) -> str:
    """Faults by kind, as a Markdown table."""
    rows = [
        "| kind | what is done | number | promise not kept | median s to the first new step |",
        "|---|---|---|---|---|",
    ]
    for name in KINDS:
        if items := results.seconds.get(name):
            kept = [item for item in items if item is not None]
            median = f"{statistics.median(kept):.1f}" if kept else "-"
            rows.append(f"| {name} | {KINDS[name].done} | {len(items)} | {len(items) - len(kept)} | {median} |")
    return "\n".join(rows)


@dataclass(frozen=True)
class Published:
    """Failures of a real cluster.

    Attributes:
        source: Where it says so.
        between: Seconds between failures that interrupt training.
        step: Seconds of a step.
    """

    source: str
    between: float
    step: float


LLAMA = Published(
    "Llama 3 405B on 16,384 H100: 419 unexpected interruptions in 54 days (arXiv 2407.21783, table 5); a step of 16 M "
    "tokens at 400 TFLOP/s per GPU is 6 x 405e9 x 16e6 / (16384 x 400e12) = 6 s",
    54 * DAY / 419,
    6.0,
)


def share(between: float, back: float, step: float, every: int) -> float:
    """Effective training time where failures cost the way back and, on average, half of the steps between two saves."""
    lost = back + step * every / 2
    return between / (between + lost)


def arithmetic(results: Results) -> str:
    """What a real cluster's failures would make of the way back that was measured here."""
    lines = [
        f"effective training time here: {results.num_steps} steps x {results.step_seconds:.3f} s / "
        f"{results.wall:.0f} s = {100 * results.effective:.1f} % "
        f"(a fault every {results.wall / max(1, count(results)):.0f} s)",
        f"by arithmetic, {LLAMA.source}; a failure every {LLAMA.between / 3600:.1f} h:",
    ]
    for every in (10, 100):
        value = share(LLAMA.between, results.median, LLAMA.step, every)
        lines.append(f"  a save every {every} steps, {results.median:.0f} s to come back: {100 * value:.1f} %")
    lines.append("  (no stalls of saves, no slower load of a large checkpoint, no replacement of machines in it)")
    lines.append("  ByteRobust: 97 % over three months on 9,600 GPUs (arXiv 2509.16293), all of that included")
    return "\n".join(lines)


def count(results: Results) -> int:
    """Number of faults."""
    return sum(len(items) for items in results.seconds.values())


@contextlib.contextmanager
def prepared(place: Path, kinds: Sequence[str]) -> Iterator[Hour]:
    """The cluster, the disk that these kinds need, and the job."""
    needs = {KINDS[kind].needs for kind in kinds}
    data = make_data(place / "data")
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(disk(place, DISK_BYTES)) if needs & {"disk", "fuse"} else None
        frozen = stack.enter_context(faulty_disk(place, own)) if "fuse" in needs else None
        # Slurm's sockets want short paths.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True))
        cluster = stack.enter_context(SlurmCluster(Path(folder), nodes=3, kill_wait=120))
        try:
            yield Hour(cluster, place, data, own, frozen)
        finally:
            if frozen is not None:
                frozen.thaw()
            cluster.cancel_all()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="tests.faults.schedule", description="An hour of failures of one Slurm job.")
    parser.add_argument("--seed", type=int, default=18, help="of the faults (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help="only these"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder in which everything stays")
    parser.add_argument("--list", action="store_true", help="list the kinds and the drawn faults, and stop")
    options = parser.parse_args(argv)
    without = left_out(options.kinds)
    for name, need in without.items():
        print(f"left out: {name} {need}")
    kinds = [kind for kind in options.kinds if kind not in without]
    faults = draw(options.seed, options.faults, kinds)
    if options.list:
        print("\n".join([*(f"{name}: {KINDS[name].done}" for name in kinds), ", ".join(name for name, _ in faults)]))
        return 0
    if (reason := slurm_missing()) is not None:
        parser.error(f"needs Slurm: {reason}")
    if options.keep is not None:
        options.keep.mkdir(parents=True)
    with (
        tempfile.TemporaryDirectory() if options.keep is None else contextlib.nullcontext(options.keep) as folder,
        prepared(Path(folder).resolve(), kinds) as hour,
    ):
        results = run_schedule(hour, faults)
        results.failures += compare(hour, results.num_steps)
    print(f"{table(results)}\n{arithmetic(results)}")
    print(
        f"{count(results)} faults, seed {options.seed}, {results.num_steps} steps, "
        f"{len(results.failures)} promises not kept"
    )
    for failure in results.failures:
        print(failure.splitlines()[0])
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
