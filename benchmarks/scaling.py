"""The worth of a second process: data, tensor and pipeline parallelism over gloo.

    python -m benchmarks.scaling [--quick] [--rounds N] [--json FILE]

A layout needs process groups of its own, and the libraries keep one layout per process. So every layout has its own
processes (one thread each), which all stay alive and take turns within a round, in an order that rotates; ratios are
formed from times of the same round. MLRA, fp32, D = 512, L = 12. All layouts start from the same weights; where the
losses of the first step on the same samples differ, nothing is reported.

Scaling from one process to two. Strong: the same step, ideal is half the time; weak: two processes take twice the
samples, ideal is the same time. 1.0 is ideal, 0.5 means that the second process is worth nothing. Two cores of one
machine share caches and memory bandwidth: the control row has two single processes train at the same time, with nothing
between them. The second column is against that: ideal there is the time of one process times its slowdown beside a busy
neighbour.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch.distributed as dist

from benchmarks import contenders
from benchmarks.contenders import LEARNING_RATE, MINUTES, WIDTH_512, Shape, config_of, mesh
from benchmarks.harness import Report, Table, median_of, parse, parser_of, ratios, rotated
from benchmarks.ranks import Ranks
from mlra_scale.config import Config, batch_plan
from mlra_scale.data import Batch
from mlra_scale.parallel import Topology, build_engine, initialize_distributed

TOLERANCE = 1e-5
TIMEOUT_SECONDS = 900.0
TINY = replace(contenders.TINY, batch_size=4)
CONTROL = "two at once"
ENGINES = ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")

Measured = dict[str, float]
Results = dict[str, list[list[Measured]]]
"""By turn and round, what each rank measured."""


@dataclass(frozen=True)
class Work:
    """A training step in a layout.

    Attributes:
        size: Samples of a micro-batch.
        count: Micro-batches per data rank.
        stage: Of ZeRO.
        tensor: Tensor-parallel degree.
        pipeline: Pipeline stages; 0: the ZeRO engine.
    """

    size: int
    count: int = 1
    stage: int = 0
    tensor: int = 1
    pipeline: int = 0

    def config(self, shape: Shape, world_size: int) -> Config:
        """Returns its configuration. An engine that is no pipeline takes micro-batches of any size."""
        size = self.size if self.pipeline else shape.batch_size
        stages, engine = (self.pipeline, "pipeline") if self.pipeline else (1, "zero")
        data = world_size // (self.tensor * stages)
        parallel = {"tensor": self.tensor, "pipeline": stages, "engine": engine}
        train = {"global_batch_size": self.count * size * data, "micro_batch_size": size, "device": "cpu"}
        sections: dict[str, Any] = {"parallel": parallel, "train": train}
        if self.stage:
            # A bucket for the whole model: DeepSpeed's own of 5e8 numbers would be allocated anew in every step.
            weights = config_of(shape, "mlra", "fp32").model.num_parameters()
            sections["deepspeed"] = {"zero_optimization": {"stage": self.stage, "reduce_bucket_size": weights}}
        return config_of(shape, "mlra", "fp32", **sections)


def worlds_of(shape: Shape, pipelined: Sequence[int]) -> dict[str, tuple[int, dict[str, Work]]]:
    """Returns the processes: a number of ranks by name, and what they do in their turns.

    `pipelined` are micro-batches per step of the pipeline; the first and the last are also accumulated by one process.
    """
    size = shape.batch_size
    zero = {f"ZeRO {stage}": Work(size, stage=stage) for stage in range(4)}
    one = {**zero, **{f"m = {count}": Work(1, count) for count in accumulated_of(pipelined)}}
    data = {f"{name} strong": Work(size // 2, stage=work.stage) for name, work in zero.items()}
    data |= {f"{name} weak": work for name, work in zero.items()}
    return {
        "one": (1, one),
        "neighbour": (1, {"ZeRO 0": Work(size)}),
        "data": (2, data),
        "tensor": (2, {"strong": Work(size, tensor=2), "weak": Work(2 * size, tensor=2)}),
        "pipeline": (2, {f"m = {count}": Work(1, count, pipeline=2) for count in pipelined}),
    }


def accumulated_of(pipelined: Sequence[int]) -> tuple[int, ...]:
    """Returns the numbers of micro-batches that one process accumulates, to compare the pipeline with."""
    return (pipelined[0], pipelined[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = parser_of("benchmarks.scaling", "Scaling from one process to two.", rounds=5, has_device=False)
    arguments = parse(parser, argv)
    shape, pipelined = (TINY, (2, 4)) if arguments.quick else (WIDTH_512, (4, 8, 16))
    report = Report.begin(arguments)
    results = measure(shape, worlds_of(shape, pipelined), arguments.rounds)
    check_losses(shape, results)
    timed = {name: values[1:] for name, values in results.items()}
    report.numbers = {"shape": vars(shape), "results": timed}
    report.add(table_of(shape, pipelined, timed))
    report.write(arguments.json)
    return 0


def measure(shape: Shape, worlds: Mapping[str, tuple[int, dict[str, Work]]], rounds: int) -> Results:
    """Runs every turn once per round; the first round is warm-up."""
    with ExitStack() as stack:
        ranks = {
            name: stack.enter_context(Ranks(name, size, serve, shape, works, timeout_s=TIMEOUT_SECONDS))
            for name, (size, works) in worlds.items()
        }
        pool = stack.enter_context(ThreadPoolExecutor(2))
        turns: list[tuple[tuple[str, str], ...]]
        turns = [((world, work),) for world, (_, works) in worlds.items() if world != "neighbour" for work in works]
        turns.append((("one", "ZeRO 0"), ("neighbour", "ZeRO 0")))  # at the same time
        results: Results = {}
        for number in range(rounds + 1):
            for turn in rotated(turns, number):
                name = CONTROL if len(turn) > 1 else ": ".join(turn[0])
                answers = [pool.submit(ranks[world].ask, (work, number)) for world, work in turn]
                results.setdefault(name, []).append([rank for answer in answers for rank in answer.result()])
    return results


def serve(commands: Iterator[tuple[str, int]], shape: Shape, works: Mapping[str, Work]) -> Iterator[Any]:
    """A rank: takes the step of a work for every (name, number of the round)."""
    device = initialize_distributed("cpu", MINUTES)
    with mesh(next(iter(works.values())).config(shape, dist.get_world_size()), device) as topology:
        engines: dict[Any, Any] = {}
        steps = {name: step_of(work, shape, topology, engines) for name, work in works.items()}
        yield "ready"
        for name, number in commands:
            yield steps[name](number)


def step_of(work: Work, shape: Shape, topology: Topology, engines: dict[Any, Any]) -> Callable[[int], Measured]:
    """Returns a training step as a function of the round's number; it returns `seconds` and `loss`.

    `engines` are those of earlier works: works that differ in the size of micro-batches alone share one.
    """
    config, rank, ranks = work.config(shape, topology.world_size), topology.data_rank, topology.data
    per_step = work.count * work.size * ranks

    def batches(number: int) -> list[Batch]:
        firsts = [number * per_step + (index * ranks + rank) * work.size for index in range(work.count)]
        return [shape.samples(range(first, first + work.size)) for first in firsts]

    key = (work.stage, work.tensor, work.pipeline, work.count)
    if key not in engines:
        engines[key] = build_engine(config, batch_plan(config, topology.world_size), topology)
    engine = engines[key]

    def step(number: int) -> Measured:
        given = batches(number)
        dist.barrier()
        started = perf_counter()
        result = engine.train_batch(given, LEARNING_RATE, lambda proposal: proposal.is_finite)
        return {"seconds": perf_counter() - started, "loss": result.loss}

    return step


def check_losses(shape: Shape, results: Results) -> None:
    """Ends the benchmark if layouts that read the same samples did not start from the same loss."""
    same = [f"one: {name}" for name in ENGINES] + [f"data: {name} strong" for name in ENGINES]
    same += ["tensor: strong", f"one: m = {shape.batch_size}", f"pipeline: m = {shape.batch_size}"]
    expected = results["one: ZeRO 0"][0][0]["loss"]
    for name in same:
        loss = results[name][0][0]["loss"]
        if abs(loss / expected - 1.0) > TOLERANCE:
            raise SystemExit(
                f"{name} does not compute what one: ZeRO 0 computes: loss {loss!r} against {expected!r} from the same "
                "weights and tokens"
            )


def table_of(shape: Shape, pipelined: Sequence[int], results: Results) -> Table:
    """Returns the share of the ideal rate that two processes reach."""
    seconds = {name: [max(rank["seconds"] for rank in ranks) for ranks in values] for name, values in results.items()}
    slowdown = [both / one for both, one in zip(seconds[CONTROL], seconds["one: ZeRO 0"], strict=True)]
    pairs = [(f"data: ZeRO {s} {kind}", f"one: ZeRO {s}", kind) for kind in ("strong", "weak") for s in range(4)]
    pairs += [(f"tensor: {kind}", "one: ZeRO 0", kind) for kind in ("strong", "weak")]
    accumulated = accumulated_of(pipelined)
    pairs += [(f"pipeline: m = {m}", f"one: m = {m}", "strong") for m in accumulated]
    pairs += [(f"pipeline: m = {2 * m}", f"one: m = {m}", "weak") for m in accumulated if 2 * m in pipelined]
    rows: list[list[Any]] = []
    for name, base, kind in pairs:
        ideal = [(0.5 if kind == "strong" else 1.0) * value for value in seconds[base]]
        beside = [value * slow for value, slow in zip(ideal, slowdown, strict=True)]
        label = name if name.endswith(kind) else f"{name} {kind}"
        milliseconds = median_of(seconds[name], 1e3)
        rows.append([label, base, milliseconds, ratios(ideal, seconds[name]), ratios(beside, seconds[name])])
    control = ratios(slowdown, [1.0] * len(slowdown))
    rows.append(["control: two single processes at once", "one: ZeRO 0", median_of(seconds[CONTROL], 1e3), None, None])
    title = (
        f"{shape.name}, MLRA, fp32, micro-batches of {shape.batch_size} x {shape.sequence_length} tokens "
        "(of one sample where m is given); share of the ideal rate"
    )
    note = f"the control takes {control['median']:.3f} times as long as one process alone"
    return Table(title, ["two processes", "against", "ms", "of ideal", "beside a busy neighbour"], rows, note)


if __name__ == "__main__":
    sys.exit(main())
