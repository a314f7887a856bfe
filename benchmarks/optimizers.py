"""The cost of a step of Muon and Spectron against AdamW: in one process, and in two data ranks at ZeRO 1.

    python -m benchmarks.optimizers [--quick] [--rounds N] [--json FILE] [--precision fp32|bf16] [--threads N]

D = 512, L = 12, MLRA at R = D/2 and dense attention. The engines of all optimizers live in the same processes, start
from the same weights and take turns within a round, in an order that rotates; a ratio is formed from two times of the
same round. AdamW runs twice: its ratio to itself is the noise. If losses differ at the first step, nothing is reported.
The collectives of one step are counted as they are called.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import AGAIN, LEARNING_RATE, MINUTES, TINY, WIDTH_512, Shape, build_ours, config_of, mesh
from benchmarks.harness import Report, Table, median_of, parse, parser_of, ratios, rotated
from benchmarks.ranks import Ranks
from mlra_scale.config import Config
from mlra_scale.data import Batch
from mlra_scale.parallel import Topology, initialize_distributed

ADAMW = "adamw, mlra"
NAMES = (ADAMW, ADAMW + AGAIN, "muon, mlra", "spectron, mlra", "adamw, dense", "muon, dense")
WORLDS = {"one process": 1, "two data ranks, ZeRO 1": 2}
TIMEOUT_SECONDS = 900.0
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Of the first loss, relative to AdamW's with the same attention."""
_GIVEN = {"allreduce_": 0, "broadcast_": 0, "reduce_": 0}
"""Position of the tensors that a rank gives to a collective; 1 for all others."""

Measured = dict[str, Any]
Results = dict[str, list[list[Measured]]]
"""By name and round, what each rank measured."""


class Collectives(TorchDispatchMode):
    """Counts the collectives that this rank calls, and the bytes that it gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            given = args[_GIVEN.get(name, 1)] if len(args) > 1 else None
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + sum(each.nbytes for each in _tensors(given))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def config_named(name: str, shape: Shape, precision: str, world_size: int) -> Config:
    """Returns the configuration of a contender; each data rank has the shape's batch."""
    optimizer, attention = name.removesuffix(AGAIN).split(", ")
    sections: dict[str, Any] = {
        "optim": {"name": optimizer},
        "train": {"global_batch_size": shape.batch_size * world_size, "device": "cpu"},
    }
    if world_size > 1:
        numbers = config_of(shape, attention, precision).model.num_parameters()
        sections["deepspeed"] = {"zero_optimization": {"stage": 1, "reduce_bucket_size": numbers}}
    return config_of(shape, attention, precision, **sections)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = parser_of("benchmarks.optimizers", "Cost of a step of Muon and Spectron.", rounds=7, has_device=False)
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="fp32", help="default: %(default)s")
    arguments = parse(parser, argv)
    shape = TINY if arguments.quick else WIDTH_512
    report = Report.begin(arguments)
    for world, size in WORLDS.items():
        with Ranks(world, size, serve, shape, arguments.precision, timeout_s=TIMEOUT_SECONDS) as ranks:
            results = measure(ranks, arguments.rounds)
        check_losses(results, TOLERANCE[arguments.precision])
        report.numbers[world] = {name: values[2:] for name, values in results.items()}
        report.add(times_of(f"{shape.name}, {arguments.precision}, {world}", report.numbers[world]))
        report.add(collectives_of(f"{shape.name}, {arguments.precision}, {world}", results))
    report.write(arguments.json)
    return 0


def measure(ranks: Ranks, rounds: int) -> Results:
    """Runs every contender once per round; the first two rounds are warm-up, and the second counts collectives."""
    results: Results = {name: [] for name in NAMES}
    for number in range(rounds + 2):
        for name in rotated(NAMES, number):
            results[name].append(ranks.ask((name, number)))
    return results


def serve(commands: Iterator[tuple[str, int]], shape: Shape, precision: str) -> Iterator[Any]:
    """A rank: takes the step of a contender for every (name, number of the round)."""
    device = initialize_distributed("cpu", MINUTES)
    world_size = dist.get_world_size()
    with mesh(config_named(ADAMW, shape, precision, world_size), device) as topology:
        steps = {name: step_of(config_named(name, shape, precision, world_size), shape, topology) for name in NAMES}
        yield "ready"
        for name, number in commands:
            yield steps[name](number)


def step_of(config: Config, shape: Shape, topology: Topology) -> Callable[[int], Measured]:
    """Returns a training step as a function of the round's number."""
    engine = build_ours(config, topology)

    def batch(number: int) -> Batch:
        first = (number * topology.data + topology.data_rank) * shape.batch_size
        return shape.samples(range(first, first + shape.batch_size))

    def step(number: int) -> Measured:
        given, counted = batch(number), Collectives()
        dist.barrier()
        started = perf_counter()
        if number == 1:
            with counted:
                result = engine.train_batch([given], LEARNING_RATE, lambda proposal: proposal.is_finite)
        else:
            result = engine.train_batch([given], LEARNING_RATE, lambda proposal: proposal.is_finite)
        seconds = perf_counter() - started
        return {"seconds": seconds, "loss": result.loss, "calls": counted.calls, "bytes": counted.bytes}

    return step


def check_losses(results: Results, tolerance: float) -> None:
    """Ends the benchmark if contenders with the same attention did not start from the same loss."""
    for name, rounds in results.items():
        attention = name.removesuffix(AGAIN).split(", ")[1]
        expected, loss = results[f"adamw, {attention}"][0][0]["loss"], rounds[0][0]["loss"]
        if not abs(loss / expected - 1.0) <= tolerance:
            raise SystemExit(f"{name} does not start where adamw does: loss {loss!r} against {expected!r}")


def times_of(title: str, results: Mapping[str, Any]) -> Table:
    """Returns times of a step, and their ratios to AdamW's with the same attention."""
    seconds = {name: [max(rank["seconds"] for rank in ranks) for ranks in rounds] for name, rounds in results.items()}
    rows: list[list[Any]] = []
    for name, own in seconds.items():
        base = f"adamw, {name.removesuffix(AGAIN).split(', ')[1]}"
        rows.append([name, median_of(own, 1e3), None if name == base else ratios(own, seconds[base])])
    return Table(f"{title}: time of a step", ["", "ms", "time / adamw"], rows)


def collectives_of(title: str, results: Results) -> Table:
    """Returns the collectives of one step of rank 0."""
    rows: list[list[Any]] = []
    for name, rounds in results.items():
        counted = rounds[1][0]
        for call in sorted(counted["calls"]):
            rows.append([name, call, counted["calls"][call], counted["bytes"][call] / 1e6])
    return Table(f"{title}: collectives of a step, rank 0", ["", "collective", "calls", "MB given"], rows)


if __name__ == "__main__":
    sys.exit(main())
