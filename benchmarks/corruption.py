"""The cost of the checks against silent corruption: a step with each of them against a plain one.

    python -m benchmarks.corruption [--quick] [--rounds N] [--json FILE] [--precision fp32|bf16] [--threads N]

D = 512, L = 4, MLRA, in one process and in two data ranks at ZeRO 1, with 2 micro-batches to a step. The steps are
those of one engine, in turns within a round, in an order that rotates; a ratio is formed from two times of the same
round. The plain step runs twice: its ratio to itself is the noise.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch.distributed as dist

from benchmarks.contenders import AGAIN, LEARNING_RATE, MINUTES, TINY, WIDTH_512, Shape, build_ours, config_of, mesh
from benchmarks.harness import Report, Table, median_of, parse, parser_of, ratios, rotated
from benchmarks.ranks import Ranks
from mlra_scale.config import Config
from mlra_scale.data import Batch
from mlra_scale.parallel import Topology, initialize_distributed
from mlra_scale.stability.corruption import CorruptionCheck
from mlra_scale.stability.guard import Guard
from mlra_scale.stability.watcher import Step

PLAIN = "plain"
CHECKS: Mapping[str, Mapping[str, int]] = {
    PLAIN: {},
    PLAIN + AGAIN: {},
    "checksums": {"checksum_every": 1},
    "replay": {"replay_every": 1},
}
WORLDS = {"one process": 1, "two data ranks, ZeRO 1": 2}
EVERY = (1, 10, 100, 1000)
MICRO_BATCHES = 2
SHAPE = replace(WIDTH_512, name="D=512 L=4", num_layers=4)
TIMEOUT_SECONDS = 1800.0

Seconds = dict[str, list[float]]


def config_with(checks: Mapping[str, int], shape: Shape, precision: str, world_size: int) -> Config:
    """Returns the configuration of a step with some checks; each data rank has the shape's batch."""
    sections: dict[str, Any] = {
        "train": {
            "global_batch_size": shape.batch_size * MICRO_BATCHES * world_size,
            "micro_batch_size": shape.batch_size,
            "device": "cpu",
        },
        "guard": {"enabled": True, **checks},
        "deepspeed": {"zero_optimization": {"stage": 1}} if world_size > 1 else {},
    }
    return config_of(shape, "mlra", precision, **sections)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = parser_of("benchmarks.corruption", "Cost of the checks against corruption.", rounds=7, has_device=False)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    arguments = parse(parser, argv)
    shape = TINY if arguments.quick else SHAPE
    report = Report.begin(arguments)
    for world, size in WORLDS.items():
        seconds: Seconds = {name: [] for name in CHECKS}
        with Ranks(world, size, serve, shape, arguments.precision, timeout_s=TIMEOUT_SECONDS) as ranks:
            for number in range(arguments.rounds + 1):
                for name in rotated([*CHECKS], number):
                    seconds[name].append(max(ranks.ask((name, number))))
        report.numbers[world] = {name: values[1:] for name, values in seconds.items()}  # the first one is warm-up
        report.add(costs_of(f"{shape.name}, {arguments.precision}, {world}", report.numbers[world]))
    report.write(arguments.json)
    return 0


def serve(commands: Iterator[tuple[str, int]], shape: Shape, precision: str) -> Iterator[Any]:
    """A rank: makes a step with the checks of a name for every (name, number of the round)."""
    device = initialize_distributed("cpu", MINUTES)
    world_size = dist.get_world_size()
    with mesh(config_with({}, shape, precision, world_size), device) as topology:
        step = step_of(shape, precision, topology)
        yield "ready"
        for name, number in commands:
            yield step(name, number)


def step_of(shape: Shape, precision: str, topology: Topology) -> Callable[[str, int], float]:
    """Returns a training step as a function of its checks and the round's number; it returns the seconds."""
    engine = build_ours(config_with({}, shape, precision, topology.world_size), topology)
    batch_size = shape.batch_size * MICRO_BATCHES * topology.data

    def read(data_rank: int, first_sample: int) -> list[Batch]:
        firsts = [first_sample + (m * topology.data + data_rank) * shape.batch_size for m in range(MICRO_BATCHES)]
        return [shape.samples(range(first, first + shape.batch_size)) for first in firsts]

    def check_of(checks: Mapping[str, int]) -> CorruptionCheck:
        config = config_with(checks, shape, precision, topology.world_size)
        return CorruptionCheck(engine, config, Guard(config.guard, batch_size), "", read, print, lambda: None)

    all_checks = {name: check_of(checks) for name, checks in CHECKS.items()}

    def step(name: str, number: int) -> float:
        check, given = all_checks[name], read(topology.data_rank, number * batch_size)
        this = Step(number + 1, is_logged=True, first_sample=number * batch_size, batches=given)
        if CHECKS[name].get("checksum_every"):
            engine.state_note.take()  # as after the step before; the one after this step is dropped by the next
        dist.barrier()
        started = perf_counter()
        check.before_step(this)
        result = engine.train_batch(given, LEARNING_RATE, check.before_update)
        check.after_step(this, result)
        assert result.applied, name
        return perf_counter() - started

    return step


def costs_of(title: str, seconds: Seconds) -> Table:
    """Returns the table of the times of a step, and of the cost where only every N-th step is checked."""
    rows: list[list[Any]] = []
    for name, values in seconds.items():
        ratio = ratios(values, seconds[PLAIN])
        shares = [f"{100 * (ratio['median'] - 1.0) / every:+.3g} %" for every in EVERY]
        rows.append([name, median_of(values), ratio, *shares])
    headers = ["step", "seconds", "x plain", *(f"every {every}" for every in EVERY)]
    return Table(title, headers, rows, "every N: what all steps take longer where one in N is checked")


if __name__ == "__main__":
    sys.exit(main())
