"""The planner's predictions against measurements, for layouts of two processes, in one run.

    python -m benchmarks.planner [--quick] [--rounds N] [--json FILE]

First the machine is calibrated (benchmarks/planner_calibration.py): rates of single operations, gloo between two
processes, the engines' overheads around a tiny model. From these numbers, and from no run of a layout, step time and
memory of every layout are predicted. Then each is run, in rounds in which the layouts take turns in an order that
rotates, and at last its memory is recorded (benchmarks/tensor_memory.py: every tensor; beside it what the resident
size grew by in the timed steps). What is reported: predicted over measured time, the ranks by both, Spearman's
coefficient and how many pairs of layouts are in the wrong order, among those that differ by more than the spread of
the measurements; predicted over measured tensor memory.

Both ranks share two cores, so that anything else that runs on the machine shows in all numbers.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from benchmarks.contenders import Shape, config_of
from benchmarks.planner_calibration import calibrate
from benchmarks.planner_ranks import RANKS, Memory, pair, serve_layout
from benchmarks.processes import Ranks
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import environment_of
from mlra_scale.config import Config, batch_plan, validate
from mlra_scale.planning.search import Candidate, EngineSettings, changed, evaluate

SHAPE = Shape("D=256 L=12", num_layers=12, hidden_size=256, num_heads=4, batch_size=4)
"""As large as lets the engines of all layouts, two processes each, stay in the memory of a machine of 16 GB."""
TINY = Shape("tiny", num_layers=4, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=256)
SEQUENCES = 16
BUCKET = 5_000_000
STEPS_PER_ROUND = 1
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Layout:
    """A layout of two processes, as it differs from the shape's configuration."""

    name: str
    parallel: dict[str, Any]
    stage: int = 0
    micro_batch_size: int = 4


LAYOUTS = (
    *(Layout(f"data 2, ZeRO {stage}", {}, stage) for stage in range(4)),
    Layout("data 2, ZeRO 1, recompute", {"activation_checkpointing": "block"}, 1),
    *(Layout(f"tensor 2, {plan}", {"tensor": 2, "low_rank_plan": plan}) for plan in ("replicated", "merged")),
    Layout("pipeline 2, 4 micro-batches", {"pipeline": 2}),
    Layout("pipeline 2, 8 micro-batches", {"pipeline": 2}, micro_batch_size=2),
    Layout("pipeline 2, recompute", {"pipeline": 2, "activation_checkpointing": "block"}),
)
FEW = tuple(LAYOUTS[index] for index in (1, 5, 7))


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="benchmarks.planner", description="Predictions of the planner, checked.")
    add_common(parser, rounds=5)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its table."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    logging.disable(logging.WARNING)
    shape, layouts = (TINY, FEW) if arguments.quick else (SHAPE, LAYOUTS)
    rounds = 2 if arguments.quick else arguments.rounds
    report: dict[str, Any] = {"environment": environment_of("cpu"), "shape": vars(shape), "rounds": rounds}
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    cluster = calibrate(config_of(shape, "mlra", "fp32"), TIMEOUT_S)
    report["cluster"] = asdict(cluster)
    predictions = [evaluate(configuration(shape, layout), cluster, EngineSettings(None, {})) for layout in layouts]
    measured = measure([layout.name for layout in layouts], [each.config for each in predictions], rounds)
    report["layouts"] = rows_of(layouts, predictions, measured)
    report |= agreement(report["layouts"])
    print("\n".join(["", *table_lines(report)]), flush=True)
    write_report(arguments, report)
    return 0


def configuration(shape: Shape, layout: Layout) -> Config:
    """Returns the configuration of a layout; every layout trains the same number of sequences in a step."""
    size = min(layout.micro_batch_size, shape.batch_size)
    zero = {"stage": layout.stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    sections = {
        "parallel": {"timeout_minutes": 5.0, **layout.parallel},
        "train": {"global_batch_size": SEQUENCES, "micro_batch_size": size, "device": "cpu"},
        "deepspeed": {"zero_optimization": zero} if layout.stage else {},
    }
    config = changed(config_of(shape, "mlra", "fp32"), sections)
    validate(config, RANKS, "cpu")
    return config


def measure(names: Sequence[str], configs: Sequence[Config], rounds: int) -> list[tuple[list[float], Memory]]:
    """Returns seconds of a step by round, and memory, of every layout; of the rank that needs most."""
    pairs: list[Ranks] = []
    try:
        for name, config in zip(names, configs, strict=True):
            pairs.append(pair(name, serve_layout, config, TIMEOUT_S))
        seconds: list[list[float]] = [[] for _ in pairs]
        for turn in range(rounds + 1):
            for offset in range(len(pairs)):
                index = (turn + offset) % len(pairs)
                answer = max(pairs[index].ask(STEPS_PER_ROUND))
                if turn:  # the first one warms up
                    seconds[index].append(answer)
        memories = []
        for ranks in pairs:
            memories.append(max(ranks.ask("memory"), key=lambda memory: memory.tensors))
            ranks.close()
    finally:
        for ranks in pairs:
            ranks.close()
    return list(zip(seconds, memories, strict=True))


def rows_of(
    layouts: Sequence[Layout], predictions: Sequence[Candidate], measured: Sequence[tuple[list[float], Memory]]
) -> list[dict[str, Any]]:
    """Returns predictions beside measurements, with ranks by time."""
    rows: list[dict[str, Any]] = [
        {
            "layout": layout.name,
            "predicted_seconds": candidate.time.seconds,
            "seconds": seconds,
            "measured_seconds": statistics.median(seconds),
            "stage_seconds": [asdict(stage) for stage in candidate.time.stages],
            "reduction_seconds": candidate.time.reduction,
            "update_seconds": candidate.time.update,
            "micro_batches": batch_plan(candidate.config, RANKS).accumulation_steps,
            "predicted_bytes": candidate.memory.device,
            "predicted_components": asdict(candidate.memory),
            "measured_bytes": memory.tensors,
            "resident_bytes": memory.resident,
        }
        for layout, candidate, (seconds, memory) in zip(layouts, predictions, measured, strict=True)
    ]
    for kind in ("predicted", "measured"):
        order = sorted(range(len(rows)), key=lambda index: float(rows[index][f"{kind}_seconds"]))
        for rank, index in enumerate(order, start=1):
            rows[index][f"{kind}_rank"] = rank
    return rows


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns Spearman's coefficient of the two orders, and the pairs of layouts that are in the wrong one.

    Two layouts whose measurements overlap (the slowest round of one and the fastest of the other) have no order.
    """
    number = len(rows)
    squares = sum((row["predicted_rank"] - row["measured_rank"]) ** 2 for row in rows)
    wrong, distinct = [], 0
    for first, second in combinations(sorted(rows, key=lambda row: float(row["measured_seconds"])), 2):
        if max(first["seconds"]) < min(second["seconds"]):
            distinct += 1
            if first["predicted_seconds"] > second["predicted_seconds"]:
                wrong.append([first["layout"], second["layout"]])
    return {
        "spearman": 1.0 - 6.0 * squares / (number * (number**2 - 1)),
        "distinct_pairs": distinct,
        "wrong_pairs": wrong,
    }


def table_lines(report: dict[str, Any]) -> list[str]:
    """Returns the report as text."""
    cluster = report["cluster"]
    lines = [
        f"calibrated: matrix products {cluster['peak_flops'] / 1e9:.1f} GFLOP/s, the rest of a block "
        f"{cluster['memory_bandwidth'] / 1e9:.2f} GB/s, update {cluster['update_bandwidth'] / 1e9:.2f} GB/s, "
        f"gloo {cluster['link_intra'] / 1e9:.2f} GB/s and "
        f"{cluster['latency_intra'] * 1e3:.2f} ms, per block {cluster['block_overhead'] * 1e3:.2f} ms (ZeRO 1, 2, 3: "
        + ", ".join(f"{value * 1e3:.2f}" for value in cluster["zero_overhead"][1:])
        + f" more), per micro-batch {cluster['micro_batch_overhead'] * 1e3:.2f} ms, in a pipeline "
        f"{cluster['pipeline_overhead'] * 1e3:.2f} more, per step {cluster['step_overhead'] * 1e3:.2f} ms",
        f"step: median (extremes) of {report['rounds']} rounds; memory: the rank that needs most",
        f"{'':30}{'predicted s':>12}{'measured s':>12}{'':19}{'ratio':>7}{'ranks':>8}"
        f"{'predicted MB':>14}{'tensors MB':>12}{'ratio':>7}{'RSS MB':>9}",
    ]
    for row in report["layouts"]:
        extremes = f"({min(row['seconds']):.3f} {max(row['seconds']):.3f})"
        lines.append(
            f"{row['layout']:30}{row['predicted_seconds']:>12.3f}{row['measured_seconds']:>12.3f} {extremes:18}"
            f"{row['predicted_seconds'] / row['measured_seconds']:>7.2f}"
            f"{row['predicted_rank']:>5}{row['measured_rank']:>3}"
            f"{row['predicted_bytes'] / 1e6:>14.1f}{row['measured_bytes'] / 1e6:>12.1f}"
            f"{row['predicted_bytes'] / row['measured_bytes']:>7.3f}{row['resident_bytes'] / 1e6:>9.0f}"
        )
    wrong = "; ".join(f"{first} is faster than {second}" for first, second in report["wrong_pairs"])
    lines.append(
        f"Spearman {report['spearman']:.2f}; of {report['distinct_pairs']} pairs that differ by more than their spread "
        f"{len(report['wrong_pairs'])} are predicted the wrong way round" + (f": {wrong}" if wrong else "")
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
