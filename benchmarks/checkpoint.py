"""What a checkpoint costs: stall of training and write rate, against synchronous saves and against plain dd.

    python -m benchmarks.checkpoint [--quick] [--json FILE] [--device cpu|cuda] [--precision fp32|bf16] [--folder DIR]

In every round, in an order that rotates: dd writes as many bytes as a checkpoint has to the same disk (`conv=fsync`, so
that they are on it when dd ends); a synchronous save, whose stall is its whole time; an asynchronous save, while
training continues until the checkpoint is complete. Ratios are formed from times of the same round. All files are
removed again. At the end the last checkpoints are verified: a save that is fast and wrong is an error.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from benchmarks.contenders import MLRA, TINY, WIDTH_512, Shape, build_ours, config_for, one_process_mesh, step_of_engine
from benchmarks.harness import Report, Table, median_of, parse, parser_of, ratios, rotated, seconds_of
from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.saver import FinishedSave, Saver
from mlra_scale.parallel import Topology

STEPS_ALONE = 3
DD_BLOCK = 8 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = parser_of("benchmarks.checkpoint", "Cost of checkpoints on this machine.", rounds=7)
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to be measured")
    arguments = parse(parser, argv)
    if not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder}: there is no such folder")
    report = Report.begin(arguments)
    report.environment["disk"] = file_system_of(arguments.folder)
    print(f"disk: {report.environment['disk']}", flush=True)
    shape = TINY if arguments.quick else WIDTH_512
    with one_process_mesh(arguments.device) as topology, tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        costs = Costs(shape, topology, arguments.precision, Path(name))
        report.numbers = costs.run(arguments.rounds)
    for table in tables_of(f"{shape.name}, {arguments.precision}", report.numbers):
        report.add(table)
    report.write(arguments.json)
    return 0


def file_system_of(folder: Path) -> str:
    """Returns the kind of file system that a folder is on."""
    here = folder.resolve()
    mounts = [each for each in psutil.disk_partitions(all=True) if here.is_relative_to(each.mountpoint)]
    return max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else "unknown"


class Costs:
    """A model in training, and ways to write as many bytes to a folder as its checkpoint has."""

    def __init__(self, shape: Shape, topology: Topology, precision: str, folder: Path) -> None:
        self.shape, self.folder, self.device = shape, folder, topology.device
        config = config_for(shape, MLRA[2], precision)
        self.engine, self.config_text = build_ours(config, topology), config.to_yaml()
        self.savers = {
            name: Saver(folder / name, topology, keep_last=1, keep_every=0, asynchronous=name == "asynchronous")
            for name in ("synchronous", "asynchronous")
        }
        self.step = step_of_engine(self.engine)
        self.num_steps = self.num_bytes = 0

    def train(self) -> float:
        """Takes one step; returns its seconds."""
        self.num_steps += 1
        return seconds_of(lambda: self.step(self.shape.batch(self.num_steps)), self.device)

    def save(self, saver: Saver) -> float:
        """Begins a save; returns for how many seconds training waits."""
        start = perf_counter()
        state = {"engine": self.engine.training_state()}
        saver.save(self.engine, self.num_steps, state, {}, self.config_text, None)
        return perf_counter() - start

    def run(self, rounds: int) -> dict[str, Any]:
        """Warms up and takes times; returns bytes of a checkpoint, seconds by what was done and round, and ratios."""
        self.train()
        for saver in self.savers.values():  # the first snapshot allocates its memory
            self.save(saver)
            (last,) = saver.finish()
            self.train()
        self.num_bytes = last.bytes
        seconds: dict[str, list[float]] = {}
        for turn in range(rounds):
            for measure in rotated([self._dd, self._synchronous, self._asynchronous], turn):
                for name, value in measure().items():
                    seconds.setdefault(name, []).append(value)
        self._verify()
        pairs = {
            "stall, asynchronous / synchronous": ("async stall", "sync stall"),
            "delay of training, asynchronous / synchronous": ("async delay", "sync stall"),
            "stall, asynchronous / ten steps": ("async stall", "ten steps"),
            "write rate, synchronous / dd": ("dd", "sync write"),
            "write rate, asynchronous / dd": ("dd", "async write"),
        }
        found = {name: ratios(seconds[above], seconds[below]) for name, (above, below) in pairs.items()}
        return {"bytes": self.num_bytes, "seconds": seconds, "ratios": found}

    def _dd(self) -> dict[str, float]:
        target = self.folder / "plain"
        command = ["dd", "if=/dev/zero", f"of={target}", f"bs={DD_BLOCK}", f"count={self.num_bytes}"]
        command += ["iflag=count_bytes", "conv=fsync", "status=none"]
        seconds = seconds_of(lambda: subprocess.run(command, check=True), self.device)
        target.unlink()
        return {"dd": seconds}

    def _synchronous(self) -> dict[str, float]:
        saver = self.savers["synchronous"]
        stall = self.save(saver)
        (save,) = saver.finish()
        self.train()
        return {"sync stall": stall, "sync write": save.write_seconds}

    def _asynchronous(self) -> dict[str, float]:
        """Saves while training continues; as many steps without a save are the measure of the delay."""
        alone = median_of([self.train() for _ in range(STEPS_ALONE)])
        saver = self.savers["asynchronous"]
        start = perf_counter()
        self.save(saver)
        count = 0
        finished: list[FinishedSave] = []
        while not finished:
            self.train()
            count += 1
            finished = saver.poll()
        stall = finished[0].stall_seconds  # at the beginning, at the first update, and after steps
        delay = perf_counter() - start - count * alone
        write = finished[0].write_seconds
        return {"async stall": stall, "async delay": delay, "async write": write, "ten steps": 10 * alone}

    def _verify(self) -> None:
        for name in self.savers:
            for checkpoint in (self.folder / name).glob("step-*"):
                if faults := Store.open(checkpoint).verify():
                    raise SystemExit(f"the checkpoints are damaged: {faults[0]}")


def tables_of(what: str, found: dict[str, Any]) -> list[Table]:
    """Returns seconds with rates, and ratios."""
    megabytes = found["bytes"] / 1e6
    times: list[list[Any]] = [
        [name, median_of(values), min(values), max(values), rate_of(name, megabytes / median_of(values))]
        for name, values in found["seconds"].items()
    ]
    spreads: list[list[Any]] = [[name, ratio] for name, ratio in found["ratios"].items()]
    return [
        Table(f"{what}: {megabytes:.1f} MB per checkpoint", ["", "seconds", "least", "most", "MB/s"], times),
        Table("ratios within a round", ["", "median [quartiles] (extremes)"], spreads),
    ]


def rate_of(name: str, rate: float) -> int | None:
    """Returns the rate of what writes; None for other times."""
    return round(rate) if name.endswith(("dd", "write")) else None


if __name__ == "__main__":
    sys.exit(main())
