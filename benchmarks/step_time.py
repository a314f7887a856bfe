"""Step time and memory of this package's one-process trainer against other trainers, in one interleaved run.

    python -m benchmarks.step_time [--shapes 64 256 512 768] [--profile] [--quick]
        [--json FILE] [--rounds N] [--device cpu|cuda] [--precision fp32|bf16] [--threads N]

The others are plain PyTorch, transformers' GPT2LMHeadModel in the same tuned loop, and the same under DeepSpeed's
ZeRO-1. Every contender trains the same shape on the same tokens with the same AdamW, learning rate and clipping, one
micro-batch per step. They take turns within a round, in an order that rotates, and a ratio is formed from two times of
the same round, so that a slow minute of the machine affects both. Plain PyTorch runs twice: its ratio to itself is the
noise. The dense contenders start from the same weights; if their losses differ at the first step, nothing is reported.

Memory is the peak of tensor bytes within a contender's second step, taken before the timed rounds. `--profile` shows
the operators of a step of ours and of plain PyTorch.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import (
    AGAIN,
    DENSE,
    MLRA,
    OURS,
    PLAIN,
    TINY,
    TRANSFORMERS,
    WIDTH_512,
    ZERO,
    Shape,
    Step,
    build,
    config_for,
    draw_weights,
    one_process_mesh,
)
from benchmarks.harness import (
    Report,
    Table,
    median_of,
    now,
    parse,
    parser_of,
    ratios,
    rotated,
)
from benchmarks.tensor_memory import start
from mlra_scale.data import Batch
from mlra_scale.parallel import Topology

SHAPES = {
    "64": Shape("D=64 L=24", num_layers=24, hidden_size=64, num_heads=4, batch_size=8),
    "256": Shape("D=256 L=12", num_layers=12, hidden_size=256, num_heads=4, batch_size=8),
    "512": WIDTH_512,
    "768": Shape("D=768 L=12", num_layers=12, hidden_size=768, num_heads=12, batch_size=4),
}
NAMES = (PLAIN, TRANSFORMERS, ZERO, PLAIN + AGAIN, *OURS)
SAME_LOSS = (TRANSFORMERS, ZERO, PLAIN + AGAIN, DENSE)
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Of the first loss, relative to plain PyTorch's."""
STEPS_PER_ROUND = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = parser_of("benchmarks.step_time", "Ratios of step times on this machine.", rounds=9)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="D", help="widths (all of %(choices)s)")
    add("--profile", action="store_true", help="operators of a step, ours and plain PyTorch's")
    arguments = parse(parser, argv)
    report = Report.begin(arguments)
    shapes = [TINY] if arguments.quick else [SHAPES[width] for width in arguments.shapes]
    with one_process_mesh(arguments.device) as topology:
        for shape in shapes:
            steps, found = race(shape, topology, arguments.precision, arguments.rounds)
            report.numbers[shape.name] = found
            for table in tables_of(shape, found, f"{arguments.precision}, {arguments.rounds} rounds"):
                report.add(table)
            if arguments.profile:
                print(operators(steps, shape.batch(1), arguments.device == "cuda"), flush=True)
            del steps
    report.write(arguments.json)
    return 0


def race(shape: Shape, topology: Topology, precision: str, rounds: int) -> tuple[dict[str, Step], dict[str, Any]]:
    """Builds the contenders of a shape and takes times.

    Returns:
        Their steps; and seconds per step by contender and round, losses, memory, parameters, and ratios.
    """
    weights = draw_weights(shape, ("dense",))
    makers = {name: partial(build, name, shape, topology, precision, weights) for name in NAMES}
    started = {name: start(make, topology.device, shape.batch(0), shape.batch(1)) for name, make in makers.items()}
    first_loss = {name: item.loss for name, item in started.items()}
    check_losses(shape, first_loss, TOLERANCE[precision])
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    last_loss: dict[str, float] = {}
    for turn in range(rounds):
        batches = [shape.batch(2 + turn * STEPS_PER_ROUND + index) for index in range(STEPS_PER_ROUND)]
        for name in rotated(NAMES, turn):
            begin = now(topology.device)
            for batch in batches:
                last_loss[name] = started[name].step(batch)
            seconds[name].append((now(topology.device) - begin) / STEPS_PER_ROUND)
    return {name: item.step for name, item in started.items()}, {
        "parameters": {name: config_for(shape, name, precision).model.num_parameters() for name in NAMES},
        "seconds_per_step": seconds,
        "peak_bytes": {name: item.peak_bytes for name, item in started.items()},
        "first_loss": first_loss,
        "last_loss": last_loss,
        "ratios": all_ratios(seconds),
    }


def check_losses(shape: Shape, losses: Mapping[str, float], tolerance: float) -> None:
    """Ends the benchmark if dense contenders did not start from the same loss."""
    for name in SAME_LOSS:
        if not abs(losses[name] / losses[PLAIN] - 1.0) <= tolerance:
            raise SystemExit(
                f"{shape.name}: {name} does not compute what {PLAIN} computes: loss {losses[name]!r} against "
                f"{losses[PLAIN]!r} from the same weights and tokens"
            )


def operators(steps: Mapping[str, Step], batch: Batch, is_on_gpu: bool) -> str:
    """Returns the operators of one step of our dense model and of plain PyTorch, as text."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_on_gpu else [])]
    order = "self_device_time_total" if is_on_gpu else "self_cpu_time_total"
    texts = []
    for name in (DENSE, PLAIN):
        with profile(activities=activities) as trace:
            steps[name](batch)
        texts += [f"\noperators of a step, {name}:", trace.key_averages().table(sort_by=order, row_limit=20)]
    return "\n".join(texts)


def all_ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Returns ratios of tokens/s: all to plain PyTorch and transformers, ours to ZeRO-1, MLRA to dense."""
    found = {}
    for name in seconds:
        own = [*([ZERO] if name in OURS else []), *([DENSE] if name in MLRA.values() else [])]
        for reference in [PLAIN, TRANSFORMERS, *own]:
            if reference != name:
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
    pairs = [(DENSE, ZERO), *((name, DENSE) for name in MLRA.values())]
    rows: list[Any] = [
        [f"{name} / {reference}", spreads[f"{name} / {reference}"], peaks[name] / peaks[reference]]
        for name, reference in pairs
    ]
    return [contenders, Table(f"{shape.name}: ours", ["", "tokens/s", "memory"], rows)]


if __name__ == "__main__":
    sys.exit(main())
