"""Step time of this package's one-process trainer against plain PyTorch and transformers, in one interleaved run.

    python -m benchmarks.step_time [--quick] [--json FILE] [--device cpu|cuda] [--precision fp32|bf16] [--threads N]

Every contender trains the same shape from the same weights on the same tokens with the same AdamW, learning rate and
clipping, one micro-batch per step. They take turns within a round, in an order that rotates, and a ratio is formed from
two times of the same round, so that a slow minute of the machine hits both. Plain PyTorch runs twice: its ratio to
itself is the noise. If the losses of the dense contenders differ at the first step, nothing is reported.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import (
    Shape,
    Step,
    build_ours,
    build_plain,
    build_transformers,
    one_process_mesh,
    step_of_engine,
    step_of_module,
    weights_of,
)
from mlra_scale import __version__
from mlra_scale.config import TevConfig
from mlra_scale.parallel import Topology
from mlra_scale.stability.tev import TevHook

SHAPES = (
    Shape("D=64 L=24", num_layers=24, hidden_size=64, num_heads=4, batch_size=8),
    Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=4),
)
TINY = (Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=256),)

PLAIN, AGAIN, TRANSFORMERS = "plain PyTorch", "plain PyTorch again", "transformers"
DENSE, MLRA = "mlra_scale dense", "mlra_scale MLRA"
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
STEPS_PER_ROUND = 2

Clock = Callable[[], float]


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description="Ratios of step times on this machine.")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and two rounds: shows that it runs")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per shape, 2 or more (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of this process, for a CPU that others use as well (default: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile for plain PyTorch and transformers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here as well")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: a spread needs at least 2")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    report: dict[str, Any] = {
        "environment": environment_of(arguments.device),
        "precision": precision,
        "clock": arguments.clock,
        "rounds": 2 if arguments.quick else arguments.rounds,
        "steps_per_round": STEPS_PER_ROUND,
        "baselines_compiled": arguments.compile,
    }
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    seconds = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def clock() -> float:
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return seconds()

    report["shapes"] = []
    with one_process_mesh(arguments.device) as topology:
        for shape in TINY if arguments.quick else SHAPES:
            race = Race(shape, topology, precision, arguments.compile, clock)
            report["shapes"].append(race.run(report["rounds"]))
            print("\n".join(["", *table_lines(report, report["shapes"][-1])]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def environment_of(device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    libraries = ("torch", "deepspeed", "megatron-core", "transformers")
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    versions = [f"mlra-scale {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{library} {version(library)}" for library in libraries]
    return {
        "device": f"{device} ({name})",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "load average at start": f"{os.getloadavg()[0]:.1f}",
        "versions": ", ".join(versions),
    }


def cpu_name() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Race:
    """All contenders of one shape, built from the same weights.

    Args:
        shape: What is trained.
        topology: The mesh of this one process.
        precision: "fp32" or "bf16".
        is_compiled: Whether plain PyTorch and transformers run through torch.compile.
        clock: Gives seconds, once the device has finished what it was given.
    """

    def __init__(self, shape: Shape, topology: Topology, precision: str, is_compiled: bool, clock: Clock) -> None:
        self.shape, self.precision, self.clock = shape, precision, clock
        dense, mlra = (build_ours(shape, attention, precision, topology) for attention in ("dense", "mlra"))
        weights = weights_of(dense)
        modules = {
            PLAIN: build_plain(shape, weights),
            TRANSFORMERS: build_transformers(shape, weights),
            AGAIN: build_plain(shape, weights),
        }
        self.num_parameters = sum(parameter.numel() for parameter in modules[PLAIN].parameters())
        self.steps: dict[str, Step] = {
            name: step_of_module(module, topology.device, precision, is_compiled) for name, module in modules.items()
        }
        self.steps |= {DENSE: step_of_engine(dense), MLRA: step_of_engine(mlra)}
        hook = TevHook(mlra.table, topology, TevConfig(), shape.vocab_size)
        self.measure_tev = lambda: hook.measure(mlra.owned_fragments())

    def run(self, rounds: int) -> dict[str, Any]:
        """Warms up, checks that the contenders compute the same, and takes times.

        Args:
            rounds: How many times every contender gets its turn.

        Returns:
            Seconds per step by contender and round, losses, and the ratios formed from them.
        """
        first = {name: step(self.shape.batch(0)) for name, step in self.steps.items()}
        self._check_losses(first)
        for step in self.steps.values():
            step(self.shape.batch(1))
        self.measure_tev()
        names = list(self.steps)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        tev_seconds: list[float] = []
        last: dict[str, float] = {}
        for turn in range(rounds):
            batches = [self.shape.batch(2 + turn * STEPS_PER_ROUND + index) for index in range(STEPS_PER_ROUND)]
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                start = self.clock()
                for batch in batches:
                    last[name] = self.steps[name](batch)
                seconds[name].append((self.clock() - start) / STEPS_PER_ROUND)
            start = self.clock()
            self.measure_tev()
            tev_seconds.append(self.clock() - start)
        return {
            "shape": self.shape.name,
            "parameters": self.num_parameters,
            "batch_size": self.shape.batch_size,
            "sequence_length": self.shape.sequence_length,
            "vocab_size": self.shape.vocab_size,
            "seconds_per_step": seconds,
            "seconds_per_tev": tev_seconds,
            "first_loss": first,
            "last_loss": last,
            "ratios": {
                **{f"{name} / {PLAIN}": ratios(seconds[PLAIN], seconds[name]) for name in names if name != PLAIN},
                **{f"{name} / {TRANSFORMERS}": ratios(seconds[TRANSFORMERS], seconds[name]) for name in (DENSE, MLRA)},
                f"{MLRA} / {DENSE}": ratios(seconds[DENSE], seconds[MLRA]),
            },
            "tev_share_of_a_step": ratios(tev_seconds, seconds[MLRA]),
        }

    def _check_losses(self, losses: dict[str, float]) -> None:
        for name in (AGAIN, TRANSFORMERS, DENSE):
            difference = abs(losses[name] / losses[PLAIN] - 1.0)
            if difference > TOLERANCE[self.precision]:
                raise SystemExit(
                    f"{self.shape.name}: {name} does not compute what {PLAIN} computes: loss {losses[name]!r} against "
                    f"{losses[PLAIN]!r} from the same weights and tokens"
                )


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of the ratios round by round."""
    values = sorted(above / below for above, below in zip(numerators, denominators, strict=True))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": low, "upper": high, "min": values[0], "max": values[-1]}


def table_lines(report: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A shape's result as text."""
    tokens = result["batch_size"] * result["sequence_length"]
    lines = [
        f"{result['shape']}: {result['parameters'] / 1e6:.1f} M parameters, {result['batch_size']} x "
        f"{result['sequence_length']} tokens per step, vocabulary {result['vocab_size']}, {report['precision']}",
        f"tokens/s as ratios: median [quartiles] (extremes) of {report['rounds']} rounds of "
        f"{report['steps_per_round']} steps each, {report['clock']} time",
        f"{'':22}{'ms/step':>9}{'tokens/s':>10}  {'/ ' + PLAIN:36}{'/ ' + TRANSFORMERS:36}last loss",
    ]
    for name, seconds in result["seconds_per_step"].items():
        median = statistics.median(seconds)
        cells = [spread(result["ratios"].get(f"{name} / {reference}")) for reference in (PLAIN, TRANSFORMERS)]
        numbers = f"{median * 1e3:>9.1f}{tokens / median:>10.0f}"
        lines.append(f"{name:22}{numbers}  {cells[0]:36}{cells[1]:36}{result['last_loss'][name]:.4f}")
    share = {key: 100.0 * value for key, value in result["tev_share_of_a_step"].items()}
    once = statistics.median(result["seconds_per_tev"])
    lines.append(f"MLRA / dense, both ours: {spread(result['ratios'][f'{MLRA} / {DENSE}'])}")
    lines.append(f"TEV once: {once * 1e3:.2f} ms, in % of an MLRA step: {spread(share)}")
    return lines


def spread(ratio: dict[str, float] | None) -> str:
    """A ratio as text; empty where there is none."""
    if ratio is None:
        return ""
    return "{median:.3f} [{lower:.3f} {upper:.3f}] ({min:.3f} {max:.3f})".format(**ratio)


if __name__ == "__main__":
    sys.exit(main())
