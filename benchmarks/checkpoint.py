"""What a checkpoint costs: stall of training and write rate, against synchronous saves and against plain dd.

    python -m benchmarks.checkpoint [--quick] [--json FILE] [--device cpu|cuda] [--precision fp32|bf16] [--folder DIR]

In every round, one after another in an order that rotates: dd writes as many bytes as a checkpoint has to the same
disk (`conv=fsync`, so that they are on it when dd ends); a synchronous save, whose stall is its whole time; an
asynchronous save, while training goes on until the checkpoint is complete. Ratios are formed from times of the same
round. All files are removed again. At the end the last checkpoint is verified: a save that is fast and wrong is
reported as an error, not as a number.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Shape, build_ours, config_of, one_process_mesh, step_of_engine
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import environment_of, ratios, spread
from benchmarks.turns import rotated
from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.saver import FinishedSave, Saver
from mlra_scale.parallel import Topology

SHAPE = Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=4)
TINY = Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=256)
STEPS_ALONE = 3
DD_BLOCK = 8 * 2**20


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description="Cost of checkpoints on this machine.")
    add_common(parser, rounds=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of training (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to be measured")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its table."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    if not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder}: there is no such folder")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    report: dict[str, Any] = {
        "environment": environment_of(arguments.device) | {"disk": file_system_of(arguments.folder)},
        "precision": precision,
        "rounds": 2 if arguments.quick else arguments.rounds,
    }
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    with one_process_mesh(arguments.device) as topology, tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        costs = Costs(TINY if arguments.quick else SHAPE, topology, precision, Path(name))
        report |= costs.run(report["rounds"])
    print("\n".join(["", *table_lines(report)]), flush=True)
    write_report(arguments, report)
    return 0


def file_system_of(folder: Path) -> str:
    """The kind of file system that a folder is on, where Linux tells it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    here = folder.resolve()
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    inside = [(place, kind) for place, kind in found if here.is_relative_to(place)]
    return max(inside, key=lambda item: len(item[0]), default=("", "unknown"))[1]


class Costs:
    """A model that trains, and ways to put as many bytes on disk as its checkpoint has.

    Args:
        shape: What is trained.
        topology: The mesh of this one process.
        precision: "fp32" or "bf16".
        folder: For everything that is written.
    """

    def __init__(self, shape: Shape, topology: Topology, precision: str, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        self.engine = build_ours(shape, "mlra", precision, topology)
        self.config_text = config_of(shape, "mlra", precision).to_yaml()
        self.savers = {
            name: Saver(folder / name, topology, keep_last=1, keep_every=0, asynchronous=name == "asynchronous")
            for name in ("synchronous", "asynchronous")
        }
        self.step = step_of_engine(self.engine)
        self.num_steps = 0

    def train(self) -> float:
        """One step; returns its seconds."""
        start = time.perf_counter()
        self.step(self.shape.batch(self.num_steps))
        self.num_steps += 1
        return time.perf_counter() - start

    def save(self, saver: Saver) -> float:
        """Begins a save; returns for how many seconds."""
        start = time.perf_counter()
        state = {"engine": self.engine.training_state()}
        saver.save(self.engine, self.num_steps, state, {}, self.config_text, None)
        return time.perf_counter() - start

    def run(self, rounds: int) -> dict[str, Any]:
        """Warms up, and takes times.

        Args:
            rounds: How many times everything is written.

        Returns:
            Seconds by what was done and round, and the ratios formed from them.
        """
        self.train()
        for saver in self.savers.values():  # the first snapshot takes its memory
            self.save(saver)
            (last,) = saver.finish()
            self.train()
        self.num_bytes = last.bytes
        seconds: dict[str, list[float]] = {}
        things: list[Callable[[], dict[str, float]]] = [self._plain, self._synchronous, self._asynchronous]
        for turn in range(rounds):
            for thing in rotated(things, turn):
                for name, value in thing().items():
                    seconds.setdefault(name, []).append(value)
        self._verify()
        return {
            "shape": self.shape.name,
            "bytes": self.num_bytes,
            "seconds": seconds,
            "ratios": {
                "stall, asynchronous / synchronous": ratios(seconds["async stall"], seconds["sync stall"]),
                "delay of training, asynchronous / synchronous": ratios(seconds["async delay"], seconds["sync stall"]),
                "write rate, synchronous / dd": ratios(seconds["dd"], seconds["sync write"]),
                "write rate, asynchronous / dd": ratios(seconds["dd"], seconds["async write"]),
            },
        }

    def _plain(self) -> dict[str, float]:
        """As many bytes by dd."""
        target = self.folder / "plain"
        command = ["dd", "if=/dev/zero", f"of={target}", f"bs={DD_BLOCK}", f"count={self.num_bytes}"]
        command += ["iflag=count_bytes", "conv=fsync", "status=none"]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        target.unlink()
        return {"dd": seconds}

    def _synchronous(self) -> dict[str, float]:
        """A save for which training waits."""
        saver = self.savers["synchronous"]
        stall = self.save(saver)
        (save,) = saver.finish()
        self.train()
        return {"sync stall": stall, "sync write": save.write_seconds}

    def _asynchronous(self) -> dict[str, float]:
        """A save behind which training goes on; the same number of steps without one is the measure of its delay."""
        alone = statistics.median(self.train() for _ in range(STEPS_ALONE))
        saver = self.savers["asynchronous"]
        start = time.perf_counter()
        stall, count = self.save(saver), 0
        finished: list[FinishedSave] = []
        while not finished:
            self.train()
            count += 1
            before = time.perf_counter()
            finished = saver.poll()
            stall += time.perf_counter() - before
        delay = time.perf_counter() - start - count * alone
        return {
            "async stall": stall,
            "async delay": delay,
            "async write": finished[0].write_seconds,
            "step": alone,
            "steps during a save": count,
        }

    def _verify(self) -> None:
        for name in self.savers:
            for checkpoint in (self.folder / name).glob("step-*"):
                faults = Store.open(checkpoint).verify()
                if faults:
                    raise SystemExit(f"the checkpoints are not sound: {faults[0]}")


def table_lines(report: dict[str, Any]) -> list[str]:
    """The result as text."""
    seconds, megabytes = report["seconds"], report["bytes"] / 1e6
    lines = [
        f"{report['shape']}, {report['precision']}: {megabytes:.1f} MB per checkpoint",
        f"seconds: median (extremes) of {report['rounds']} rounds",
    ]
    for name, values in seconds.items():
        rate = f"{megabytes / statistics.median(values):>8.0f} MB/s" if name.endswith(("dd", "write")) else ""
        lines.append(f"{name:22}{statistics.median(values):>9.3f} ({min(values):.3f} {max(values):.3f}){rate}")
    lines.append("ratios: median [quartiles] (extremes)")
    lines += [f"{name:48}{spread(ratio)}" for name, ratio in report["ratios"].items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
