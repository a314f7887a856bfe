"""Step time and memory of this package's one-process trainer against other trainers, in one interleaved run.

    python -m benchmarks.step_time [--shapes 64 256 512 768] [--contenders NAME ...] [--profile] [--quick]
        [--json FILE] [--rounds N] [--device cpu|cuda] [--precision fp32|bf16] [--threads N] [--compile]

The others are plain PyTorch, transformers' GPT2LMHeadModel in the same tuned loop, and the same under DeepSpeed's
ZeRO-1. Every contender trains the same shape on the same tokens with the same AdamW, learning rate and clipping, one
micro-batch per step. They take turns within a round, in an order that rotates, and a ratio is formed from two times of
the same round, so that a slow minute of the machine affects both. Plain PyTorch runs twice: its ratio to itself is the
noise. The dense contenders start from the same weights; if their losses differ at the first step, nothing is reported.

Memory is the peak of tensor bytes within a contender's second step, taken before the timed rounds. `--profile` shows
the operators of a step of ours and of plain PyTorch.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import (
    AGAIN,
    COMPILED,
    DENSE,
    MLRA,
    OURS,
    PLAIN,
    TRANSFORMERS,
    ZERO,
    Shape,
    Step,
    build,
    build_ours,
    config_for,
    draw_weights,
    one_process_mesh,
    step_of_engine,
)
from benchmarks.harness import Report, Table, median_of, parse, parser_of, ratios, rotated, scaled, seconds_of, words_of
from benchmarks.tensor_memory import start
from mlra_scale.config import TevConfig
from mlra_scale.parallel import Topology
from mlra_scale.stability.tev import TevHook

SHAPES = {
    "64": Shape("D=64 L=24", num_layers=24, hidden_size=64, num_heads=4, batch_size=8),
    "256": Shape("D=256 L=12", num_layers=12, hidden_size=256, num_heads=4, batch_size=8),
    "512": Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=4),
    "768": Shape("D=768 L=12", num_layers=12, hidden_size=768, num_heads=12, batch_size=4),
}
TINY = Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=256)
NAMES = (PLAIN, TRANSFORMERS, ZERO, PLAIN + AGAIN, *OURS)
SAME_LOSS = (TRANSFORMERS, ZERO, PLAIN + AGAIN, DENSE)
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Of the first loss, relative to plain PyTorch's."""
STEPS_PER_ROUND = 2

Clock = Callable[[], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = parser_of("benchmarks.step_time", "Ratios of step times on this machine.", rounds=9)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="D", help="widths (all of %(choices)s)")
    add("--contenders", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"beside {PLAIN}, twice")
    add("--profile", action="store_true", help="operators of a step, ours and plain PyTorch's")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of this process")
    add("--compile", action="store_true", help="torch.compile for all but ZeRO-1; of ours the blocks")
    words = words_of(argv)
    arguments = parse(parser, words)
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    seconds = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def clock() -> float:
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return seconds()

    report = Report.begin("benchmarks.step_time", words, arguments.device)
    names = [name for name in NAMES if name in {PLAIN, PLAIN + AGAIN, *arguments.contenders}]
    shapes = [TINY] if arguments.quick else [SHAPES[width] for width in arguments.shapes]
    with one_process_mesh(arguments.device) as topology:
        for shape in shapes:
            race = Race(shape, topology, precision, arguments.compile, clock, names)
            found = report.numbers[shape.name] = race.run(arguments.rounds)
            for table in tables_of(shape, found, f"{precision}, {arguments.clock} time, {arguments.rounds} rounds"):
                report.add(table)
            if arguments.profile and DENSE in names:
                print("\n".join(race.profiles()), flush=True)
            del race
    report.write(arguments.json)
    return 0


class Race:
    """Contenders of one shape; the dense ones are built from the same weights.

    Args:
        shape: What is trained.
        topology: The mesh of this one process.
        precision: "fp32" or "bf16".
        is_compiled: Whether contenders run through torch.compile.
        clock: Gives seconds, once the device has finished its work.
        names: Of the contenders, plain PyTorch among them.
    """

    def __init__(
        self, shape: Shape, topology: Topology, precision: str, is_compiled: bool, clock: Clock, names: Sequence[str]
    ) -> None:
        self.shape, self.topology, self.precision, self.clock = shape, topology, precision, clock
        self.ending = COMPILED if is_compiled else ""
        self.weights = draw_weights(shape, ("dense",))
        self.measure_tev: Callable[[], object] | None = None
        first, second = shape.batch(0), shape.batch(1)
        started = {name: start(partial(self._build, name), topology.device, first, second) for name in names}
        self.steps = {name: item.step for name, item in started.items()}
        self.first_loss = {name: item.loss for name, item in started.items()}
        self.peak_bytes = {name: item.peak_bytes for name, item in started.items()}
        self._check_losses()

    def _build(self, name: str) -> Step:
        if name != MLRA[2]:
            return build(name + self.ending, self.shape, self.topology, self.precision, self.weights)
        engine = build_ours(config_for(self.shape, name + self.ending, self.precision), self.topology)
        hook = TevHook(engine.table, self.topology, TevConfig(), self.shape.vocab_size)
        self.measure_tev = lambda: hook.measure(engine.owned_fragments())
        return step_of_engine(engine)

    def run(self, rounds: int) -> dict[str, Any]:
        """Takes times.

        Args:
            rounds: How many times every contender gets its turn.

        Returns:
            Seconds per step by contender and round, losses, memory, parameters, and the ratios formed from them.
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
                tev_seconds.append(seconds_of(self.measure_tev, self.clock))
        models = {name: config_for(self.shape, name, self.precision).model for name in names}
        found: dict[str, Any] = {
            "parameters": {name: model.num_parameters() for name, model in models.items()},
            "seconds_per_step": seconds,
            "seconds_per_tev": tev_seconds,
            "peak_bytes": self.peak_bytes,
            "first_loss": self.first_loss,
            "last_loss": last,
            "ratios": all_ratios(seconds),
        }
        if tev_seconds:
            found["tev_share_of_a_step"] = ratios(tev_seconds, seconds[MLRA[2]])
        return found

    def profiles(self) -> list[str]:
        """Returns the operators of one step of our dense model and of plain PyTorch, as text."""
        on_gpu = self.topology.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        texts = []
        for name in (DENSE, PLAIN):
            with profile(activities=activities) as trace:
                self.steps[name](self.shape.batch(1))
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            texts += [f"\noperators of a step, {name}:", trace.key_averages().table(sort_by=order, row_limit=20)]
        return texts

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
    """Returns ratios of tokens/s: all to plain PyTorch and transformers, ours to ZeRO-1, MLRA to dense."""
    found = {}
    for name in seconds:
        references = [
            PLAIN,
            TRANSFORMERS,
            *([ZERO] if name in OURS else []),
            *([DENSE] if name in MLRA.values() else []),
        ]
        for reference in references:
            if reference in seconds and reference != name:
                found[f"{name} / {reference}"] = ratios(seconds[reference], seconds[name])
    return found


def tables_of(shape: Shape, found: Mapping[str, Any], how: str) -> list[Table]:
    """Returns the tables of a shape: contenders, and the ratios among ours."""
    peaks, spreads, seconds = found["peak_bytes"], found["ratios"], found["seconds_per_step"]
    contenders = Table(
        f"{shape.name}: {found['parameters'][PLAIN] / 1e6:.1f} M parameters, {shape.batch_size} x "
        f"{shape.sequence_length} tokens per step, vocabulary {shape.vocab_size}, {how}; tokens/s as ratios",
        ["", "ms/step", "tokens/s", f"/ {PLAIN}", f"/ {TRANSFORMERS}", "MB", "MB / plain", "last loss"],
        [
            [
                name,
                median_of(times, 1e3),
                round(shape.tokens_per_step / median_of(times)),
                spreads.get(f"{name} / {PLAIN}"),
                spreads.get(f"{name} / {TRANSFORMERS}"),
                peaks[name] / 1e6,
                peaks[name] / peaks[PLAIN],
                round(found["last_loss"][name], 4),
            ]
            for name, times in seconds.items()
        ],
    )
    pairs = [
        pair for pair in [(DENSE, ZERO), *((name, DENSE) for name in MLRA.values())] if " / ".join(pair) in spreads
    ]
    rows: list[Any] = [
        [f"{name} / {reference}", spreads[f"{name} / {reference}"], peaks[name] / peaks[reference]]
        for name, reference in pairs
    ]
    note = ""
    if "tev_share_of_a_step" in found:
        rows.append(["TEV once, in % of a step at R=D/2", scaled(found["tev_share_of_a_step"], 100.0), None])
        note = f"TEV once: {median_of(found['seconds_per_tev'], 1e3):.2f} ms"
    among = Table(f"{shape.name}: ours", ["", "tokens/s", "memory"], rows, note)
    return [contenders, among] if rows else [contenders]


if __name__ == "__main__":
    sys.exit(main())
