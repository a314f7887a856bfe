"""Step time and memory of this package's one-process trainer against other trainers, in one interleaved run.

    python -m benchmarks.step_time [--shapes 64 256 512 768] [--contenders NAME ...] [--profile] [--quick]
        [--json FILE] [--rounds N] [--device cpu|cuda] [--precision fp32|bf16] [--threads N] [--compile]

The others are plain PyTorch (baseline_gpt2.py), transformers' GPT2LMHeadModel in the same tuned loop, the same under
DeepSpeed's ZeRO-1, and litgpt (peers.py; left out where it is not installed). Every contender trains the same shape on
the same tokens with the same AdamW, learning rate and clipping, one micro-batch per step. They take turns within a
round, in an order that rotates, and a ratio is formed from two times of the same round, so that a slow minute of the
machine hits both. Plain PyTorch runs twice: its ratio to itself is the noise. The dense contenders start from the same
weights; if their losses differ at the first step, nothing is reported. litgpt's shape differs, and what differs is
printed with its parameters.

Memory is the peak of tensor bytes within a contender's second step, taken before the timed rounds (memory.py): all that
it holds, of itself alone. `--profile` shows, after the rounds, torch's operators of a step of ours and of plain
PyTorch side by side: why a ratio is what it is.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import (
    COMPILED_BLOCKS,
    Shape,
    Step,
    build_ours,
    build_plain,
    build_transformers,
    config_of,
    one_process_mesh,
    step_of_engine,
    step_of_module,
)
from benchmarks.memory import start
from benchmarks.operators import Operator, operators_of, side_by_side
from benchmarks.peers import LitGPT, step_of_zero, why_no_litgpt
from benchmarks.report import add_common, check_common, write_report
from benchmarks.turns import rotated
from mlra_scale import __version__
from mlra_scale.config import TevConfig
from mlra_scale.model.initialization import initial_state
from mlra_scale.parallel import Engine, Topology
from mlra_scale.stability.tev import TevHook

SHAPES = {
    "64": Shape("D=64 L=24", num_layers=24, hidden_size=64, num_heads=4, batch_size=8),
    "256": Shape("D=256 L=12", num_layers=12, hidden_size=256, num_heads=4, batch_size=8),
    "512": Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=4),
    "768": Shape("D=768 L=12", num_layers=12, hidden_size=768, num_heads=12, batch_size=4),
}
TINY = Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=256)

PLAIN, AGAIN, TRANSFORMERS = "plain PyTorch", "plain PyTorch again", "transformers"
ZERO, LITGPT = "transformers ZeRO-1", "litgpt"
DENSE = "mlra_scale dense"
MLRA = {parts: f"mlra_scale R=D/{parts}" for parts in (2, 4, 8)}
NAMES = (PLAIN, TRANSFORMERS, ZERO, LITGPT, AGAIN, DENSE, *MLRA.values())
OURS = (DENSE, *MLRA.values())
SAME_LOSS = (TRANSFORMERS, ZERO, AGAIN, DENSE)
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
STEPS_PER_ROUND = 2

Clock = Callable[[], float]


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description="Ratios of step times on this machine.")
    add_common(parser, rounds=9)
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES),
        metavar="D",
        help="widths (default: all of %(choices)s)",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        metavar="NAME",
        help=f"beside {PLAIN}, twice (default: all of %(choices)s)",
    )
    parser.add_argument("--profile", action="store_true", help="operators of a step, ours and plain PyTorch's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of this process, for a CPU that others use as well (default: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile for all but ZeRO-1")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    report: dict[str, Any] = {
        "environment": environment_of(arguments.device),
        "precision": precision,
        "clock": arguments.clock,
        "rounds": 2 if arguments.quick else arguments.rounds,
        "steps_per_round": STEPS_PER_ROUND,
        "compiled": arguments.compile,
    }
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    seconds = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def clock() -> float:
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return seconds()

    report["left_out"] = {} if (reason := why_no_litgpt()) is None else {LITGPT: reason}
    names = names_of(arguments.contenders, report["left_out"])
    for name, reason in report["left_out"].items():
        print(f"{name} is left out: {reason}", flush=True)
    report["shapes"] = []
    with one_process_mesh(arguments.device) as topology:
        for shape in [TINY] if arguments.quick else [SHAPES[width] for width in arguments.shapes]:
            race = Race(shape, topology, precision, arguments.compile, clock, names)
            report["shapes"].append(result := race.run(report["rounds"]))
            print("\n".join(["", *table_lines(report, result)]), flush=True)
            if arguments.profile and DENSE in names:
                result["operators"] = race.profile()
                print("\n".join(["", *operator_lines(result)]), flush=True)
            del race
    write_report(arguments, report)
    return 0


def names_of(contenders: Collection[str], left_out: Collection[str]) -> list[str]:
    """Who runs, in order: whoever was chosen, and plain PyTorch twice, without which there is no ratio and no noise."""
    return [name for name in NAMES if name in {PLAIN, AGAIN, *contenders} and name not in left_out]


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
    """Contenders of one shape; the dense ones are built from the same weights.

    Args:
        shape: What is trained.
        topology: The mesh of this one process.
        precision: "fp32" or "bf16".
        is_compiled: Whether all contenders but ZeRO-1 run through torch.compile; of ours the blocks do.
        clock: Gives seconds, once the device has finished what it was given.
        names: Of the contenders, plain PyTorch among them.
    """

    def __init__(
        self,
        shape: Shape,
        topology: Topology,
        precision: str,
        is_compiled: bool,
        clock: Clock,
        names: Sequence[str] = NAMES,
    ) -> None:
        self.shape, self.topology, self.precision, self.clock = shape, topology, precision, clock
        self.is_compiled = is_compiled
        config = config_of(shape, "dense", precision)
        self.weights = initial_state(config.model, config.train.seed)
        self.num_parameters: dict[str, int] = {}
        self.measure_tev: Callable[[], object] | None = None
        first, second = shape.batch(0), shape.batch(1)
        started = {name: start(partial(self._build, name), topology.device, first, second) for name in names}
        self.steps = {name: item.step for name, item in started.items()}
        self.first_loss = {name: item.loss for name, item in started.items()}
        self.peak_bytes = {name: item.peak_bytes for name, item in started.items()}
        self._check_losses()

    def _build(self, name: str) -> Step:
        if name in OURS:
            return self._build_ours(name)
        if name == LITGPT:
            module: nn.Module = LitGPT(self.shape)
        else:
            build = build_transformers if name in (TRANSFORMERS, ZERO) else build_plain
            module = build(self.shape, self.weights)
        self.num_parameters[name] = sum(parameter.numel() for parameter in module.parameters())
        if name == ZERO:
            return step_of_zero(module, self.topology.device, self.precision)
        return step_of_module(module, self.topology.device, self.precision, self.is_compiled)

    def _build_ours(self, name: str) -> Step:
        sections, attention = dict(COMPILED_BLOCKS if self.is_compiled else {}), "dense"
        for parts, mlra in MLRA.items():
            if name == mlra:
                attention, sections["model"] = "mlra", {"attention_rank": self.shape.hidden_size // parts}
        engine = build_ours(self.shape, attention, self.precision, self.topology, **sections)
        self.num_parameters[name] = config_of(self.shape, attention, self.precision, **sections).model.num_parameters()
        if name == MLRA[2]:
            self._watch_tev(engine)
        return step_of_engine(engine)

    def _watch_tev(self, engine: Engine) -> None:
        hook = TevHook(engine.table, self.topology, TevConfig(), self.shape.vocab_size)
        self.measure_tev = lambda: hook.measure(engine.owned_fragments())

    def run(self, rounds: int) -> dict[str, Any]:
        """Takes times.

        Args:
            rounds: How many times every contender gets its turn.

        Returns:
            Seconds per step by contender and round, losses, memory, and the ratios formed from them.
        """
        names = list(self.steps)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        tev_seconds: list[float] = []
        last: dict[str, float] = {}
        for turn in range(rounds):
            batches = [self.shape.batch(2 + turn * STEPS_PER_ROUND + index) for index in range(STEPS_PER_ROUND)]
            for name in rotated(names, turn):
                begin = self.clock()
                for batch in batches:
                    last[name] = self.steps[name](batch)
                seconds[name].append((self.clock() - begin) / STEPS_PER_ROUND)
            if self.measure_tev is not None:
                if turn == 0:
                    self.measure_tev()
                begin = self.clock()
                self.measure_tev()
                tev_seconds.append(self.clock() - begin)
        result = {
            "shape": self.shape.name,
            "parameters": self.num_parameters,
            "batch_size": self.shape.batch_size,
            "sequence_length": self.shape.sequence_length,
            "vocab_size": self.shape.vocab_size,
            "seconds_per_step": seconds,
            "seconds_per_tev": tev_seconds,
            "peak_bytes": self.peak_bytes,
            "first_loss": self.first_loss,
            "last_loss": last,
            "ratios": all_ratios(seconds),
        }
        if tev_seconds:
            result["tev_share_of_a_step"] = ratios(tev_seconds, seconds[MLRA[2]])
        return result

    def profile(self) -> dict[str, dict[str, list[float]]]:
        """Seconds and calls of torch's operators in one step of our dense model and of plain PyTorch."""
        batch = self.shape.batch(1)
        return {
            name: {
                key: [operator.seconds, operator.calls]
                for key, operator in operators_of(self.steps[name], batch, self.topology.device).items()
            }
            for name in (DENSE, PLAIN)
        }

    def _check_losses(self) -> None:
        losses = self.first_loss
        for name in SAME_LOSS:
            difference = abs(losses.get(name, losses[PLAIN]) / losses[PLAIN] - 1.0)
            if not difference <= TOLERANCE[self.precision]:
                raise SystemExit(
                    f"{self.shape.name}: {name} does not compute what {PLAIN} computes: loss {losses[name]!r} against "
                    f"{losses[PLAIN]!r} from the same weights and tokens"
                )


def all_ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Ratios of tokens/s: every contender to plain PyTorch and transformers, ours to all, MLRA to dense."""
    found = {}
    for name in seconds:
        references = [PLAIN, TRANSFORMERS, *([ZERO, LITGPT] if name in OURS else [])]
        references += [DENSE] if name in MLRA.values() else []
        for reference in references:
            if reference in seconds and reference != name:
                found[f"{name} / {reference}"] = ratios(seconds[reference], seconds[name])
    return found


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of the ratios round by round."""
    values = sorted(above / below for above, below in zip(numerators, denominators, strict=True))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": low, "upper": high, "min": values[0], "max": values[-1]}


def table_lines(report: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A shape's result as text."""
    tokens = result["batch_size"] * result["sequence_length"]
    peaks, found = result["peak_bytes"], result["ratios"]
    lines = [
        f"{result['shape']}: {result['parameters'][PLAIN] / 1e6:.1f} M parameters, {result['batch_size']} x "
        f"{result['sequence_length']} tokens per step, vocabulary {result['vocab_size']}, {report['precision']}",
        f"tokens/s as ratios: median [quartiles] (extremes) of {report['rounds']} rounds of "
        f"{report['steps_per_round']} steps each, {report['clock']} time; memory: peak of tensors within a step",
        f"{'':22}{'ms/step':>9}{'tokens/s':>10}  {'/ ' + PLAIN:36}{'/ ' + TRANSFORMERS:36}{'MB':>8}{'/ plain':>9}"
        "  last loss",
    ]
    for name, seconds in result["seconds_per_step"].items():
        median = statistics.median(seconds)
        cells = [spread(found.get(f"{name} / {reference}")) for reference in (PLAIN, TRANSFORMERS)]
        numbers = f"{median * 1e3:>9.1f}{tokens / median:>10.0f}"
        memory = f"{peaks[name] / 1e6:>8.1f}{peaks[name] / peaks[PLAIN]:>9.3f}"
        lines.append(f"{name:22}{numbers}  {cells[0]:36}{cells[1]:36}{memory}  {result['last_loss'][name]:.4f}")
    shown = [(name, reference) for name in (DENSE,) for reference in (ZERO, LITGPT)]
    shown += [(name, DENSE) for name in MLRA.values()]
    for name, reference in shown:
        if f"{name} / {reference}" in found:
            memory = f"memory {peaks[name] / peaks[reference]:.3f}"
            lines.append(f"{name + ' / ' + reference:45}{spread(found[f'{name} / {reference}']):36}{memory}")
    if LITGPT in peaks:
        counts = [result["parameters"][name] for name in (LITGPT, PLAIN)]
        lines.append(
            f"litgpt is another shape: {LitGPT.DIFFERENCE}; {counts[0]:,} parameters against {counts[1]:,}, weights of "
            "its own"
        )
    if "tev_share_of_a_step" in result:
        share = {key: 100.0 * value for key, value in result["tev_share_of_a_step"].items()}
        once = statistics.median(result["seconds_per_tev"])
        lines.append(f"TEV once: {once * 1e3:.2f} ms, in % of a step at R=D/2: {spread(share)}")
    return lines


def operator_lines(result: dict[str, Any]) -> list[str]:
    """A shape's profiles as text."""
    ours, plain = (
        {key: Operator(seconds, int(calls)) for key, (seconds, calls) in result["operators"][name].items()}
        for name in (DENSE, PLAIN)
    )
    return [f"{result['shape']}:", *side_by_side((DENSE, PLAIN), (ours, plain))]


def spread(ratio: dict[str, float] | None) -> str:
    """A ratio as text; empty where there is none."""
    if ratio is None:
        return ""
    return "{median:.3f} [{lower:.3f} {upper:.3f}] ({min:.3f} {max:.3f})".format(**ratio)


if __name__ == "__main__":
    sys.exit(main())
