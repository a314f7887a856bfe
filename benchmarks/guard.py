"""What the guard is worth: pairs of runs with and without it, poisoned at a known turn of the data.

    python -m benchmarks.guard [--jobs N] [--output DIR] [--quick] [POISON ...] [section.field=value ...]

Runs docs/studies/guard.yaml once for every poison (none, labels, tokens, rate; default: all) into DIR/POISON, as
tools/sweep.py would; `python tools/report.py DIR/POISON` then draws the curves and the paired differences.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mlra_scale import train
from mlra_scale.cli.sweep import run_cells
from mlra_scale.config import BatchPlan, ConfigError
from mlra_scale.data import Batch, SampleStream
from mlra_scale.model import embedding
from mlra_scale.parallel import StepResult
from mlra_scale.parallel.engine import Engine
from mlra_scale.study.grid import Study, cells_of, load_study
from mlra_scale.study.results import SweepDirectory
from mlra_scale.study.sweep import Sweep
from mlra_scale.training.loop import batches as reading
from mlra_scale.training.loop import session

STUDY = Path(__file__).parents[1] / "docs" / "studies" / "guard.yaml"


@dataclass(frozen=True)
class Poison:
    """What is done to a run, and where.

    Attributes:
        labels: Turns whose targets are renamed by a random permutation of the vocabulary; a turn is a step in the order
            of the data, counted from 0.
        tokens: Turns at which one token is repeated throughout.
        nan: Turns whose loss and gradients are not finite.
        rate: Steps whose learning rate is multiplied by `rate_factor`, the first time that the run comes to them.
        rate_factor: The factor.
        vocab_size: Tokens that labels are renamed among.
        batch: Samples of a step.
    """

    labels: Sequence[int] = ()
    tokens: Sequence[int] = ()
    nan: Sequence[int] = ()
    rate: Sequence[int] = ()
    rate_factor: float = 300.0
    vocab_size: int = 512
    batch: int = 8

    def spoil(self, batches: list[Batch], consumed_samples: int) -> list[Batch]:
        """Returns what a rank reads instead of `batches`: it depends on the samples alone, not on who reads them."""
        turn = consumed_samples // self.batch
        if turn in self.labels:
            words = torch.randperm(self.vocab_size, generator=torch.Generator().manual_seed(turn))
            batches = [replace(batch, targets_BS=words[batch.targets_BS]) for batch in batches]
        if turn in self.tokens:
            token = torch.full_like(batches[0].tokens_BS, (77 + turn) % self.vocab_size)
            batches = [replace(batch, tokens_BS=token, targets_BS=(token * 31) % self.vocab_size) for batch in batches]
        return batches


@contextlib.contextmanager
def poisoned(poison: Poison) -> Iterator[None]:
    """Poisons the runs of this process until the end of the block."""
    read, rate = reading.read_batches, session.learning_rate
    train_batch, head_loss = Engine.train_batch, embedding.head_loss
    done: set[int] = set()
    factor = 1.0

    def read_batches(stream: SampleStream, plan: BatchPlan, data_rank: int, consumed_samples: int) -> list[Batch]:
        return poison.spoil(read(stream, plan, data_rank, consumed_samples), consumed_samples)

    def learning_rate(step: int, *arguments: Any) -> float:
        is_high = step in poison.rate and step not in done
        done.add(step)
        return (poison.rate_factor if is_high else 1.0) * rate(step, *arguments)

    def train_spoiled(engine: Engine, batches: Sequence[Batch], *arguments: Any) -> StepResult:
        nonlocal factor
        factor = math.nan if int(batches[0].sample_ids_B[0]) // poison.batch in poison.nan else 1.0
        try:
            return train_batch(engine, batches, *arguments)
        finally:
            factor = 1.0

    def spoiled_loss(*arguments: Any) -> torch.Tensor:
        return head_loss(*arguments) * factor

    with (
        mock.patch.object(reading, "read_batches", read_batches),
        mock.patch.object(session, "learning_rate", learning_rate),
        mock.patch.object(Engine, "train_batch", train_spoiled),
        mock.patch.object(embedding, "head_loss", spoiled_loss),
    ):
        yield


NAMES = ("none", "labels", "tokens", "rate")
TURN = 153
"""A third of the way through the study's runs, and not just behind a checkpoint."""
QUICK = ["model.num_layers=2", "train.steps=44", "guard.window=8", "guard.min_window=8", "checkpoint.every=8"]
QUICK_TURN = 30


def poison_of(name: str, turn: int) -> Poison:
    """Returns a poison of the study: the data of 8 turns, or the rate of 3 steps."""
    turns = range(turn, turn + 8)
    return {
        "none": Poison(),
        "labels": Poison(labels=turns, vocab_size=4096),
        "tokens": Poison(tokens=turns, vocab_size=4096),
        "rate": Poison(rate=range(turn, turn + 3), rate_factor=100.0),
    }[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit code of the worst sweep."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--train"]:
        with poisoned(poison_of(arguments[1], int(arguments[2]))):
            return train.main(arguments[3:])
    parser = argparse.ArgumentParser(prog="benchmarks.guard", description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    add("--output", type=Path, default=Path("runs/guard"), metavar="DIR", help="where all of it goes")
    add("--quick", action="store_true", help="one seed, few steps: shows that it runs")
    add("words", nargs="*", metavar="POISON|section.field=value", help="poisons, and fields of the runs")
    options = parser.parse_intermixed_args(arguments)
    names = [word for word in options.words if "=" not in word] or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: no such poison; there are {', '.join(NAMES)}")
    fields = [*(QUICK if options.quick else []), *(word for word in options.words if "=" in word)]
    try:
        study = load_study(STUDY, fields)
        if options.quick:
            study = study.model_copy(update={"seeds": study.seeds[:1]})
        turn = QUICK_TURN if options.quick else TURN
        codes = [run(study, name, turn, options.output / name, options.jobs, arguments) for name in names]
    except ConfigError as error:
        print("\n".join(["guard: bad input", *(f"  {problem}" for problem in error.problems)]), file=sys.stderr)
        return 2
    return max(codes)


def run(study: Study, poison: str, turn: int, output: Path, jobs: int, arguments: Sequence[str]) -> int:
    """Runs the study with one poison; returns the exit code."""
    study = study.model_copy(update={"name": f"{study.name}-{poison}"})
    entry = ["benchmarks.guard", "--train", poison, str(turn)]
    sweep = Sweep(study, cells_of(study), SweepDirectory(output), entry)
    return run_cells(sweep, sweep.cells, jobs, ["-m", "benchmarks.guard", *arguments])


if __name__ == "__main__":
    sys.exit(main())
