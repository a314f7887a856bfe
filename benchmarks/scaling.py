"""What a second process is worth, and what the engines cost: data, tensor and pipeline parallelism over gloo.

    python -m benchmarks.scaling [--quick] [--rounds N] [--json FILE]

Every layout has its own processes (one thread each), all of them alive; they take turns within a round, in an order
that rotates, and ratios are formed from times of the same round (benchmarks/turns.py). MLRA, fp32, D = 512, L = 12.
All layouts start from the same weights; where the losses of the first step on the same samples differ, nothing is
reported.

Scaling from one process to two. Strong: the same step, ideal is half the time; weak: two processes take twice the
samples, ideal is the same time. 1.0 is ideal, 0.5 means that the second process is worth nothing. Two cores of one
machine share caches and memory bandwidth, so that two processes would be slower than one even if they never spoke to
each other: the control row has two single processes train at the same time, with nothing between them. The second
column is set against that: ideal there is the time of one process times its slowdown beside a busy neighbour.

Bubble: of a pipeline of p = 2 stages with m micro-batches, theory idles (p - 1) / (m + p - 1) of the time between the
start of a step and the end of its last backward pass (the reduction and the update after it are no part of it). Each
stage adds up how long it is inside forward and backward passes; sending, receiving and waiting is what is left. Of the
busier stage the idle share is bubble and communication; the mean over both stages also has the difference between the
stages in it (one has the head, the other the embedding).

Engines: one process, the same module and samples. A plain loop (torch's fused AdamW, multi-tensor clipping, nothing of
DeepSpeed) against the ZeRO engine at stages 0 to 3 and the pipeline engine with one stage; 1.0 is the plain loop.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import Shape
from benchmarks.layouts import (
    build_data_parallel,
    build_neighbour,
    build_pipeline,
    build_single,
    build_tensor_parallel,
)
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import environment_of, ratios, spread
from benchmarks.turns import Measured, Turn, World, take_turns

TOLERANCE = 1e-5
PLAIN = "plain loop"
ENGINES = ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "pipeline of one stage")
CONTROL = "two at once"
TIMEOUT_SECONDS = 900.0

Results = dict[str, list[list[Measured]]]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        scaled: The shape that is spread over two processes.
        others: Shapes of which only the engines are compared.
        accumulated: Micro-batches per step of one process that a pipeline is compared with; twice as many are in
            `pipelined` where weak scaling is wanted.
        pipelined: Micro-batches per step of the pipeline.
    """

    scaled: Shape
    others: tuple[Shape, ...]
    accumulated: tuple[int, ...]
    pipelined: tuple[int, ...]


FULL = Plan(
    scaled=Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=4),
    others=(Shape("D=128 L=24", num_layers=24, hidden_size=128, num_heads=4, batch_size=8),),
    accumulated=(4, 16),
    pipelined=(2, 4, 8, 16),
)
QUICK = Plan(
    scaled=Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=4, sequence_length=16, vocab_size=256),
    others=(),
    accumulated=(2, 4),
    pipelined=(2, 4),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.splitlines()[0] if __doc__ else "")
    add_common(parser, rounds=5)
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    torch.set_num_threads(1)
    plan, rounds = (QUICK, 2) if arguments.quick else (FULL, arguments.rounds)
    report: dict[str, Any] = {"environment": environment_of("cpu"), "rounds": rounds}
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    results = take_turns(worlds_of(plan), turns_of(plan), rounds, TIMEOUT_SECONDS)
    check_losses(plan, results)
    report |= report_of(plan, {name: values[1:] for name, values in results.items()})
    print("\n".join(["", *table_lines(report)]), flush=True)
    write_report(arguments, report)
    return 0


def worlds_of(plan: Plan) -> list[World]:
    """The processes: one, its neighbour, three times two, and one for every other shape."""
    shape = plan.scaled
    return [
        World("one", 1, build_single, (shape, plan.accumulated)),
        World("neighbour", 1, build_neighbour, (shape,)),
        World("data", 2, build_data_parallel, (shape,)),
        World("tensor", 2, build_tensor_parallel, (shape,)),
        World("pipeline", 2, build_pipeline, (shape, plan.pipelined)),
        *(World(other.name, 1, build_single, (other, ())) for other in plan.others),
    ]


def turns_of(plan: Plan) -> list[Turn]:
    """The turns of a round; every engine's first one is on samples that start at 0."""
    names = {"one": [PLAIN, *ENGINES, *(f"m = {count}" for count in plan.accumulated)]}
    names |= {other.name: [PLAIN, *ENGINES] for other in plan.others}
    names["data"] = [f"ZeRO {stage} {kind}" for stage in range(4) for kind in ("strong", "weak")]
    names["tensor"] = ["strong", "weak"]
    names["pipeline"] = [f"m = {count}" for count in plan.pipelined]
    turns = [Turn(f"{world}: {name}", ((world, name),)) for world, parts in names.items() for name in parts]
    return [*turns, Turn(CONTROL, (("one", "ZeRO 0"), ("neighbour", "ZeRO 0")))]


def check_losses(plan: Plan, results: Results) -> None:
    """Ends the benchmark if layouts that read the same samples did not start from the same loss."""
    size = plan.scaled.batch_size
    same = [f"one: {name}" for name in (*ENGINES, f"m = {size}")]
    same += [f"data: ZeRO {stage} strong" for stage in range(4)] + ["tensor: strong", f"pipeline: m = {size}"]
    groups = [(f"one: {PLAIN}", same)]
    groups += [(f"{other.name}: {PLAIN}", [f"{other.name}: {name}" for name in ENGINES]) for other in plan.others]
    for reference, names in groups:
        expected = results[reference][0][0]["loss"]
        for name in names:
            loss = results[name][0][0]["loss"]
            if abs(loss / expected - 1.0) > TOLERANCE:
                raise SystemExit(
                    f"{name} does not compute what {reference} computes: loss {loss!r} against {expected!r} from the "
                    "same weights and tokens"
                )


def report_of(plan: Plan, results: Results) -> dict[str, Any]:
    """Forms the ratios.

    Args:
        plan: What was measured.
        results: By turn and round, what each rank measured.

    Returns:
        Seconds by turn and round (of the slowest rank), and the ratios.
    """
    seconds = {name: [max(rank["seconds"] for rank in ranks) for ranks in values] for name, values in results.items()}
    slowdown = [both / one for both, one in zip(seconds[CONTROL], seconds["one: ZeRO 0"], strict=True)]
    rows = [(f"data: ZeRO {s} {kind}", f"one: ZeRO {s}", kind) for kind in ("strong", "weak") for s in range(4)]
    rows += [(f"tensor: {kind}", "one: ZeRO 0", kind) for kind in ("strong", "weak")]
    rows += [(f"pipeline: m = {m}", f"one: m = {m}", "strong") for m in plan.accumulated if m in plan.pipelined]
    rows += [(f"pipeline: m = {2 * m}", f"one: m = {m}", "weak") for m in plan.accumulated if 2 * m in plan.pipelined]
    scaling = []
    for name, base, kind in rows:
        share = 0.5 if kind == "strong" else 1.0
        ideal = [share * value for value in seconds[base]]
        beside = [value * slow for value, slow in zip(ideal, slowdown, strict=True)]
        scaling.append(
            {
                "name": name,
                "against": base,
                "kind": kind,
                "of_ideal": ratios(ideal, seconds[name]),
                "of_control": ratios(beside, seconds[name]),
            }
        )
    engines = {
        shape.name: {
            name: ratios(seconds[f"{world}: {name}"], seconds[f"{world}: {PLAIN}"]) for name in (PLAIN, *ENGINES)
        }
        for world, shape in (("one", plan.scaled), *((other.name, other) for other in plan.others))
    }
    return {
        "shape": vars(plan.scaled),
        "other_shapes": [vars(other) for other in plan.others],
        "seconds": seconds,
        "control_slowdown": ratios(slowdown, [1.0] * len(slowdown)),
        "scaling": scaling,
        "bubble": [bubble(count, results[f"pipeline: m = {count}"]) for count in plan.pipelined],
        "engines_against_plain_loop": engines,
    }


def bubble(count: int, rounds: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """The idle share of the stages of a pipeline, against theory.

    Args:
        count: Micro-batches per step.
        rounds: By round, what each stage measured.
    """
    spans = [max(stage["span"] for stage in stages) for stages in rounds]
    busy = [[stage["busy"] for stage in stages] for stages in rounds]
    theory = (len(busy[0]) - 1) / (count + len(busy[0]) - 1)
    return {
        "micro_batches": count,
        "theory": theory,
        "idle_of_the_busier_stage": ratios([span - max(b) for span, b in zip(spans, busy, strict=True)], spans),
        "idle_mean": ratios([span - statistics.mean(b) for span, b in zip(spans, busy, strict=True)], spans),
        "busy_less_busy_over_busier": ratios([min(b) for b in busy], [max(b) for b in busy]),
    }


def table_lines(report: dict[str, Any]) -> list[str]:
    """The result as text."""
    shape, seconds = report["shape"], report["seconds"]
    lines = [
        f"{shape['name']}, micro-batches of {shape['batch_size']} x {shape['sequence_length']} tokens (where m is "
        f"given: 1 x {shape['sequence_length']}), MLRA, fp32",
        f"median [quartiles] (extremes) of {report['rounds']} rounds",
        "",
        f"control: two single processes at once, time of a step as a multiple of one alone: "
        f"{spread(report['control_slowdown'])}",
        "",
        f"{'two processes':26}{'against':16}{'ms':>8}  {'of ideal':36}{'of ideal beside a busy neighbour':36}",
    ]
    for row in report["scaling"]:
        name = row["name"] if row["name"].endswith(row["kind"]) else f"{row['name']} {row['kind']}"
        milliseconds = 1e3 * statistics.median(seconds[row["name"]])
        cells = f"{spread(row['of_ideal']):36}{spread(row['of_control']):36}"
        lines.append(f"{name:26}{row['against']:16}{milliseconds:>8.1f}  {cells}")
    columns = f"{'idle, busier stage':36}{'idle, mean of stages':36}{'less busy / busier':36}"
    lines += ["", f"{'bubble':10}{'theory':>8}  {columns}"]
    for row in report["bubble"]:
        names = ("idle_of_the_busier_stage", "idle_mean", "busy_less_busy_over_busier")
        cells = "".join(f"{spread(row[name]):36}" for name in names)
        lines.append(f"{'m = ' + str(row['micro_batches']):10}{row['theory']:>8.3f}  {cells}")
    for name, engines in report["engines_against_plain_loop"].items():
        world = "one" if name == shape["name"] else name
        lines += ["", f"{name + ', one process':26}{'ms':>8}  time as a multiple of the plain loop's"]
        for engine, ratio in engines.items():
            lines.append(f"{engine:26}{1e3 * statistics.median(seconds[f'{world}: {engine}']):>8.1f}  {spread(ratio)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
