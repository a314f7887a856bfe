"""How time and memory of a step grow with depth, vocabulary and sequence length: linearly, or worse?

    python -m benchmarks.growth [--quick] [--rounds N] [--json FILE]

One process, the package's own engine (ZeRO stage 0), MLRA, fp32, one micro-batch per step. All sizes of an axis are
built first and then take turns within a round, in an order that rotates.

- depth: 24, 48, 96 and 192 blocks at D = 64, 4 x 128 tokens. Linear growth is a straight line with an offset
  (embedding, head and fixed costs do not grow with depth): a least-squares line through the medians is printed with the
  largest distance of a point from it, in percent of the point. A step that grew faster than its depth (a cost per pair
  of blocks, or Python's garbage collector walking over ever more objects) would bend away from it.
- vocabulary: 4096 to 65536 tokens at D = 128, L = 4, 4 x 128 tokens: embedding, logits and loss.
- sequence length: 128 to 2048 at 2048 tokens per step, D = 128, L = 4: what grows is attention alone.

"to the smallest" is the time (or memory) as a multiple of that of the smallest size, in the same round; "to linear
growth" divides it by the ratio of the sizes: 1.0 means strictly proportional, less means that fixed costs are spread
over more. Longer samples at the same number of tokens are fewer samples: growth that is linear in the length of a
sample is there no growth at all, and the two columns are the same. Memory is the peak of what tensors take during the
second step, counted from before the engine was built: exact and the same in every run, so it has no spread.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from benchmarks.contenders import Shape, Step, build_ours, one_process_mesh, step_of_engine
from benchmarks.memory import start
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import environment_of, ratios, spread
from benchmarks.turns import rotated
from mlra_scale.parallel import Topology


@dataclass(frozen=True)
class Axis:
    """Shapes that differ in one size.

    Attributes:
        name: Of the size.
        sizes: In rising order.
        shapes: One for each.
        has_fixed_tokens: Whether longer samples are fewer samples: linear growth is then the same time.
    """

    name: str
    sizes: tuple[int, ...]
    shapes: tuple[Shape, ...]
    has_fixed_tokens: bool = False


def axes_of(is_quick: bool) -> list[Axis]:
    """What is measured."""
    depths: tuple[int, ...]
    vocabularies: tuple[int, ...]
    lengths: tuple[int, ...]
    if is_quick:
        depths, vocabularies, lengths, width, tokens = (1, 2, 3), (128, 256), (8, 16), 32, 32
    else:
        depths, vocabularies, lengths = (
            (24, 48, 96, 192),
            (4096, 8192, 16384, 32768, 65536),
            (128, 256, 512, 1024, 2048),
        )
        width, tokens = 128, 2048
    vocabulary = 256 if is_quick else 4096
    length = 16 if is_quick else 128
    deep = [
        Shape(f"L={size}", size, 32 if is_quick else 64, 4, 4, sequence_length=length, vocab_size=vocabulary)
        for size in depths
    ]
    broad = [Shape(f"V={size}", 4, width, 4, 4, sequence_length=length, vocab_size=size) for size in vocabularies]
    long = [Shape(f"S={s}", 4, width, 4, tokens // s, sequence_length=s, vocab_size=vocabulary) for s in lengths]
    return [
        Axis("depth", depths, tuple(deep)),
        Axis("vocabulary", vocabularies, tuple(broad)),
        Axis("sequence length", lengths, tuple(long), has_fixed_tokens=True),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__.splitlines()[0] if __doc__ else "")
    add_common(parser, rounds=7)
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rounds = 2 if arguments.quick else arguments.rounds
    report: dict[str, Any] = {"environment": environment_of("cpu"), "rounds": rounds, "axes": []}
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    with one_process_mesh("cpu") as topology:
        for axis in axes_of(arguments.quick):
            report["axes"].append(measure(axis, topology, rounds))
            print("\n".join(["", *table_lines(report["axes"][-1], rounds)]), flush=True)
    write_report(arguments, report)
    return 0


def measure(axis: Axis, topology: Topology, rounds: int) -> dict[str, Any]:
    """Takes the times and the peaks of one axis.

    Args:
        axis: What grows.
        topology: The mesh of this process.
        rounds: How many times every size gets its turn.

    Returns:
        Seconds by size and round, peak bytes by size, the ratios formed from them, and the lines through them.
    """
    steps: list[Step] = []
    peaks: list[int] = []
    for shape in axis.shapes:
        started = start(
            partial(build_step, shape, topology),
            topology.device,
            shape.batch(0),
            shape.batch(1),
        )
        steps.append(started.step)
        peaks.append(started.peak_bytes)
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 1):
        for index in rotated(range(len(steps)), turn):
            batch = axis.shapes[index].batch(2 + turn)
            began = perf_counter()
            steps[index](batch)
            if turn > 0:  # the first is warm-up
                seconds[index].append(perf_counter() - began)
    linear = [1.0 if axis.has_fixed_tokens else size / axis.sizes[0] for size in axis.sizes]
    return {
        "axis": axis.name,
        "sizes": list(axis.sizes),
        "shapes": [vars(shape) for shape in axis.shapes],
        "seconds": seconds,
        "peak_bytes": peaks,
        "time_to_smallest": [ratios(values, seconds[0]) for values in seconds],
        "time_to_linear": [
            ratios(values, [factor * value for value in seconds[0]])
            for values, factor in zip(seconds, linear, strict=True)
        ],
        "memory_to_smallest": [peak / peaks[0] for peak in peaks],
        "memory_to_linear": [peak / peaks[0] / factor for peak, factor in zip(peaks, linear, strict=True)],
        "time_line": line_through(axis.sizes, [statistics.median(values) for values in seconds]),
        "memory_line": line_through(axis.sizes, peaks),
    }


def build_step(shape: Shape, topology: Topology) -> Step:
    """A step of a new engine."""
    return step_of_engine(build_ours(shape, "mlra", "fp32", topology))


def line_through(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Least-squares line value = offset + slope * size.

    Returns:
        offset, slope, and the largest distance of a point from the line as a share of the point.
    """
    slope, offset = statistics.linear_regression(sizes, values)
    distances = [abs(offset + slope * size - value) / value for size, value in zip(sizes, values, strict=True)]
    return {"offset": offset, "slope": slope, "largest_distance": max(distances)}


def table_lines(result: dict[str, Any], rounds: int) -> list[str]:
    """The result of an axis as text."""
    first = result["shapes"][0]
    tokens = first["batch_size"] * first["sequence_length"]
    same = [f"D={first['hidden_size']}", f"{tokens} tokens per step"]
    same += [f"L={first['num_layers']}"] if result["axis"] != "depth" else []
    same += [f"V={first['vocab_size']}"] if result["axis"] != "vocabulary" else []
    same += [f"S={first['sequence_length']}"] if result["axis"] != "sequence length" else []
    lines = [
        f"{result['axis']} ({', '.join(same)}), one process, fp32; median [quartiles] (extremes) of {rounds} rounds",
        f"{'':>8}{'ms':>9}{'MB':>9}  {'time to the smallest':40}{'time to linear growth':36}memory, the same two",
    ]
    for index, size in enumerate(result["sizes"]):
        numbers = f"{size:>8}{1e3 * statistics.median(result['seconds'][index]):>9.1f}"
        numbers += f"{result['peak_bytes'][index] / 1e6:>9.1f}"
        times = [spread(result[name][index]) for name in ("time_to_smallest", "time_to_linear")]
        memory = f"{result['memory_to_smallest'][index]:.3f}  {result['memory_to_linear'][index]:.3f}"
        lines.append(f"{numbers}  {times[0]:40}{times[1]:36}{memory}")
    time, space = result["time_line"], result["memory_line"]
    lines.append(
        f"straight line: {1e3 * time['offset']:.2f} ms + {1e3 * time['slope']:.5f} ms each, points within "
        f"{100 * time['largest_distance']:.1f} %; {space['offset'] / 1e6:.2f} MB + {space['slope'] / 1e6:.5f} MB each, "
        f"points within {100 * space['largest_distance']:.1f} %"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
