"""What watching a run costs: each measurement as a share of a step, and TEV against the variance of gradients.

    python -m benchmarks.stability [--quick] [--rounds N] [--json FILE] [--clock wall|cpu]

One process, MLRA at D = 512, L = 12. In every round a training step and each measurement take their turn, and a share
is formed from two times of the same round: what a measurement costs once, divided by the steps between two of them,
over the time of a step. The variance of gradients over all parameters is computed in three ways:
- local partitions: mean and variance of every piece that this rank owns, merged, and nothing else (the gradient
  statistics above give more: norms, weights and updates, per kind and block);
- full gather: all gradients copied into one vector first, as a naive tool would; in one process nothing is sent;
- over micro-batches: for every element the variance of its gradient over the micro-batches of a step, which needs two
  more copies of the gradient and a pass over them for every micro-batch (around plain PyTorch: a dense model of as many
  parameters, two micro-batches).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import (
    LEARNING_RATE,
    Shape,
    build_ours,
    build_plain,
    config_of,
    one_process_mesh,
    weights_of,
)
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import environment_of, ratios, spread
from mlra_scale.config import ActivationsConfig, Config, GradientsConfig, GuardConfig, TevConfig, batch_plan
from mlra_scale.data import Batch
from mlra_scale.parallel import Engine, Topology, UpdateProposal
from mlra_scale.stability.activations import ActivationProbe
from mlra_scale.stability.gradients import GradientStatistics
from mlra_scale.stability.guard import Guard
from mlra_scale.stability.spikes import SpikeScores
from mlra_scale.stability.tev import TevHook

SHAPE = Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=8)
TINY = Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=256)
EVERY = {"TEV": 1, "gradient statistics": 10, "activation probe": 100, "guard and spike scores": 1}
"""Steps between two measurements: of the shares that are reported."""
TEV, LOCAL, GATHERED, MICRO = "TEV", "local partitions", "full gather", "over micro-batches"

Clock = Callable[[], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.stability", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    add_common(parser, rounds=9)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of this process alone")
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    torch.set_num_threads(1)
    shape, rounds = (TINY, 2) if arguments.quick else (SHAPE, arguments.rounds)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    report: dict[str, Any] = {"environment": environment_of("cpu"), "clock": arguments.clock, "rounds": rounds}
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    with one_process_mesh("cpu") as topology:
        report |= measure(shape, topology, clock, rounds)
    print("\n".join(["", *table_lines(report)]), flush=True)
    write_report(arguments, report)
    return 0


def measure(shape: Shape, topology: Topology, clock: Clock, rounds: int) -> dict[str, Any]:
    """Takes times.

    Returns:
        Seconds of a step and of each measurement, by round, and the shares formed from them.
    """
    engine = build_ours(shape, "mlra", "fp32", topology)
    config = config_of(shape, "mlra", "fp32").model_copy(update={"gradients": GradientsConfig(every=1)})
    step = _Step(engine, config, clock)
    actions = {
        "TEV": _tev(engine, topology, shape),
        "activation probe": _probe(engine, config, shape),
        "guard and spike scores": _guard(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("step", LOCAL, GATHERED, "gradient statistics", *actions)}
    micro = _MicroBatches(shape, weights_of(build_ours(shape, "dense", "fp32", topology)), clock)
    seconds[MICRO] = []
    for turn in range(rounds + 1):
        found = step.run(shape.batch(turn))
        for name, action in actions.items():
            started = clock()
            action()
            found[name] = clock() - started
        found[MICRO] = micro.run(turn)
        if turn > 0:  # the first is warm-up
            for name, value in found.items():
                seconds[name].append(value)
    shares = {
        f"{name}, every {every} step(s)": ratios([value / every for value in seconds[name]], seconds["step"])
        for name, every in EVERY.items()
    }
    against = {f"{name} / TEV": ratios(seconds[name], seconds[TEV]) for name in (LOCAL, GATHERED, MICRO)}
    return {
        "shape": shape.name,
        "tokens_per_step": shape.tokens_per_step,
        "seconds": seconds,
        "shares_of_a_step": shares,
        "gradient_variance_against_tev": against,
    }


class _Step:
    """A training step in which gradients are measured, and the time of each part."""

    def __init__(self, engine: Engine, config: Config, clock: Clock) -> None:
        self._engine, self._clock = engine, clock
        self._statistics = GradientStatistics(engine, config)
        self._number = 0
        self._in_gate = self._local = self._gathered = 0.0

    def run(self, batch: Batch) -> dict[str, float]:
        self._number += 1
        self._statistics.before_step(self._number, [batch])
        started = self._clock()
        result = self._engine.train_batch([batch], LEARNING_RATE, self._approve)
        trained = self._clock()
        self._statistics.after_update(result, LEARNING_RATE)
        after = self._clock() - trained
        return {
            "step": trained - started - self._in_gate - self._local - self._gathered,
            LOCAL: self._local,
            GATHERED: self._gathered,
            "gradient statistics": self._in_gate + after,
        }

    def _approve(self, proposal: UpdateProposal) -> bool:
        started = self._clock()
        self._statistics.in_gate(proposal)
        self._in_gate = self._clock() - started
        started = self._clock()
        variance_of_pieces(fragment.values for fragment in self._engine.owned_gradients())
        self._local = self._clock() - started
        started = self._clock()
        torch.cat([fragment.values.flatten() for fragment in self._engine.owned_gradients()]).var(correction=0).item()
        self._gathered = self._clock() - started
        return True


def variance_of_pieces(pieces: Iterable[Tensor]) -> float:
    """Returns the population variance over the elements of all pieces, each of which is read where it lies.

    As the mean square minus the squared mean, which gradients allow: their mean is next to zero.
    """
    kept = list(pieces)
    count = sum(piece.numel() for piece in kept)
    mean = torch.stack([piece.sum() for piece in kept]).double().sum() / count
    square = torch.stack(torch._foreach_norm(kept)).double().square().sum() / count
    return float(square - mean.square())


def _tev(engine: Engine, topology: Topology, shape: Shape) -> Callable[[], object]:
    hook = TevHook(engine.table, topology, TevConfig(), shape.vocab_size)
    return lambda: hook.measure(engine.owned_fragments())


def _probe(engine: Engine, config: Config, shape: Shape) -> Callable[[], object]:
    settings = ActivationsConfig(samples=min(4, shape.batch_size))
    probe = ActivationProbe(engine, config.model, settings, batch_plan(config, 1))
    return lambda: probe.measure([shape.batch(0)])


def _guard() -> Callable[[], None]:
    guard, spikes = Guard(GuardConfig(enabled=True), 8), SpikeScores()
    for number in range(2000):
        spikes.update(3.0 + 0.01 * (number % 7), 1.0)

    def watch() -> None:
        guard.approve(3.0, 1.0)
        guard.judge(1, 0, 3.0, 1.0)
        spikes.update(3.0, 1.0)

    return watch


class _MicroBatches:
    """The variance over micro-batches, beside a plain loop: what it takes more than the loop without it."""

    def __init__(self, shape: Shape, weights: dict[str, Tensor], clock: Clock) -> None:
        self._shape, self._clock = shape, clock
        self._module = build_plain(shape, weights)
        self._parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def run(self, turn: int, num_micro_batches: int = 2) -> float:
        sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        squares = [torch.zeros_like(parameter) for parameter in self._parameters]
        spent = 0.0
        for index in range(num_micro_batches):
            batch = self._shape.batch(turn * num_micro_batches + index)
            self._module(batch.tokens_BS, batch.targets_BS).backward()
            started = self._clock()
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            torch._foreach_add_(sums, gradients)
            torch._foreach_addcmul_(squares, gradients, gradients)
            spent += self._clock() - started
            for parameter in self._parameters:
                parameter.grad = None
        started = self._clock()
        total = 0.0
        for one, square in zip(sums, squares, strict=True):
            total += (square / num_micro_batches - (one / num_micro_batches).square()).sum().item()
        return spent + self._clock() - started


def table_lines(report: dict[str, Any]) -> list[str]:
    """The result as text."""
    seconds = report["seconds"]
    lines = [
        f"{report['shape']}, {report['tokens_per_step']} tokens per step, one process, {report['clock']} time; median "
        f"[quartiles] (extremes) of {report['rounds']} rounds",
        f"a step: {1e3 * statistics.median(seconds['step']):.1f} ms",
        "",
        f"{'in % of a step':42}{'once, ms':>10}",
    ]
    for name, share in report["shares_of_a_step"].items():
        once = statistics.median(seconds[name.split(",")[0]])
        lines.append(f"{name:42}{1e3 * once:>10.2f}  {spread({key: 100 * value for key, value in share.items()})}")
    lines += ["", f"{'variance of gradients, times TEV':42}{'once, ms':>10}"]
    for name, ratio in report["gradient_variance_against_tev"].items():
        once = statistics.median(seconds[name.removesuffix(" / TEV")])
        lines.append(f"{name.removesuffix(' / TEV'):42}{1e3 * once:>10.2f}  {spread(ratio)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
