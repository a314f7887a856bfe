"""What a run costs besides its steps: watching, logging, evaluation, reading, starting up and preparing its data.

    python -m benchmarks.running [--quick] [--rounds N] [--json FILE]

One process, MLRA at D = 512, L = 12, trained on Python's own documentation. Watching and logging cost the same
whatever a step's tokens are, so they are set against a step of the size that such a model is trained with: 16,384
tokens, accumulated over 32 micro-batches. A share is formed from two times of the same round:

- TEV: one measurement, of the master weights as the training loop takes it, after the step has had the caches;
- record: one line of metrics.jsonl, and the same values handed to wandb (offline);
- reading: all samples of a step, read by the stream as they are; and what the loop waits for them where the feed reads
  them one step ahead, as in a run;
- evaluation: a validation micro-batch against the forward pass of a training micro-batch, which keeps what the backward
  pass needs, and whose head forms its gradients already (two thirds of the head's work, mlra_scale/model/loss.py);
- start-up (benchmarks/start_up.py): from the start of the process to the end of the first step, as a multiple of a
  process that imports torch and DeepSpeed and does nothing else;
- prepare_data (benchmarks/preparation.py): tokens per second as a share of those of `tokenizers` alone.

Saving has a benchmark of its own (benchmarks/checkpoint.py), and so have the other measurements
(benchmarks/stability.py).
"""

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks import preparation, start_up
from benchmarks.contenders import LEARNING_RATE, Shape, one_process_mesh
from benchmarks.layouts import Layout
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import environment_of, ratios, spread
from mlra_scale.config import Config, batch_plan
from mlra_scale.data import Batch, open_datasets
from mlra_scale.parallel import Topology, build_engine
from mlra_scale.stability.tev import TevHook
from mlra_scale.training.feed import Feed, read_batches
from mlra_scale.training.measuring import tev_values
from mlra_scale.training.metrics import Throughput
from mlra_scale.training.record import JsonLines
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.trainer import step_values
from mlra_scale.training.wandb_log import open_wandb

STEP = "step"
SHARES = ("TEV", "line of the record", "wandb, offline", "reading the samples", "waiting for the samples")
EVALUATION, FORWARD = "validation micro-batch", "forward pass of a training micro-batch"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shape: What is trained; its batch is one micro-batch.
        micro_batches: Of a step.
        corpus_bytes: Of text.
        repeats: How often something is measured within a round where that takes little time.
        starts: Runs that are started.
    """

    shape: Shape
    micro_batches: int
    corpus_bytes: int
    repeats: int
    starts: int


FULL = Plan(
    Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=4),
    micro_batches=32,
    corpus_bytes=20_000_000,
    repeats=5,
    starts=3,
)
QUICK = Plan(
    Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=512),
    micro_batches=2,
    corpus_bytes=300_000,
    repeats=2,
    starts=2,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.running", description=__doc__.splitlines()[0] if __doc__ else "")
    add_common(parser, rounds=3)
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    plan, rounds = (QUICK, 2) if arguments.quick else (FULL, arguments.rounds)
    report: dict[str, Any] = {"environment": environment_of("cpu"), "rounds": rounds, "shape": vars(plan.shape)}
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with preparation.tokenizer_threads(1):
            preparation.write_corpus(folder, plan.shape.vocab_size, plan.corpus_bytes)
        report["preparation"] = preparation.measure(folder, (1, 2), rounds)
        print("\n".join(["", *preparation_lines(report["preparation"], rounds)]), flush=True)
        report["start_up"] = measure_start_up(plan, folder)
        print("\n".join(["", *start_up_lines(report["start_up"], plan)]), flush=True)
        with one_process_mesh("cpu") as topology:
            report["steps"] = Run(plan, folder, topology).measure(rounds)
    print("\n".join(["", *step_lines(report["steps"], plan, rounds)]), flush=True)
    write_report(arguments, report)
    return 0


def config_with_data(plan: Plan, micro_batches: int, data: Path) -> Config:
    """The configuration of a run on the corpus."""
    config = Layout(micro_batches=micro_batches, micro_batch_size=plan.shape.batch_size).config(plan.shape, 1)
    values = config.model_dump()
    values["data"] |= {"path": str(data)}
    values["wandb"] |= {"mode": "offline"}
    return Config.from_dict(values)


def measure_start_up(plan: Plan, folder: Path) -> dict[str, Any]:
    """Starts runs with a step of one micro-batch.

    Returns:
        Seconds by phase and run, of a process with the bare imports, and the ratio of the whole to that.
    """
    config = config_with_data(plan, 1, folder / "data")
    seconds, bare = start_up.measure(config, folder / "data", folder, plan.starts)
    return {
        "seconds": seconds,
        "bare_imports_seconds": bare,
        "whole_to_bare_imports": ratios(seconds["whole"], bare),
        "shares": {name: ratios(values, seconds["whole"]) for name, values in seconds.items() if name != "whole"},
    }


class Run:
    """A run's parts: engine, data, record.

    Args:
        plan: What is measured.
        folder: Holds the data set.
        topology: The mesh of this process.
    """

    def __init__(self, plan: Plan, folder: Path, topology: Topology) -> None:
        config = config_with_data(plan, plan.micro_batches, folder / "data")
        self.repeats, self.config, self.plan = plan.repeats, config, batch_plan(config, 1)
        datasets = open_datasets(config)
        self.train, self.validation = datasets.train, datasets.validation
        self.engine: Any = build_engine(config, self.plan, topology)
        self.topology = topology
        self.tev = TevHook(self.engine.table, topology, config.tev, config.model.vocab_size)
        self.throughput = Throughput(config, 1, topology.device)
        self.directory = RunDirectory(folder / "run")
        self.directory.create(config)

    def measure(self, rounds: int) -> dict[str, Any]:
        """Takes times.

        Returns:
            Seconds by what was done and round, and the shares formed from them.
        """
        seconds: dict[str, list[float]] = {name: [] for name in (STEP, *SHARES, EVALUATION, FORWARD)}
        lines = JsonLines(self.directory.metrics)
        with redirect_stdout(StringIO()):
            wandb = open_wandb(self.config, self.directory)
        size = self.plan.global_batch_size
        with Feed(self.train, self.plan, 0) as feed:
            feed.take(0)
            self._warm_up()  # behind which the samples of the first step are read
            wandb.log(0, {"loss": 0.0})
            for turn in range(rounds):
                began = perf_counter()
                batches = feed.take(size * (turn + 1))
                seconds["waiting for the samples"].append(perf_counter() - began)
                self.throughput.start()
                began = perf_counter()
                result = self.engine.train_batch(batches, LEARNING_RATE, lambda proposal: proposal.is_finite)
                seconds[STEP].append(perf_counter() - began)
                self.throughput.stop(self.plan.tokens_per_step)
                began = perf_counter()
                tev = self.tev.measure(self.engine.owned_fragments())
                seconds["TEV"].append(perf_counter() - began)
                values = step_values(result, LEARNING_RATE, self.throughput.since_last(), self.topology.device)
                values = {"step": turn + 1, **values, **tev_values(tev)}
                seconds["line of the record"].append(self._median(partial(lines.write, values)))
                began = perf_counter()
                wandb.log(turn + 1, values)
                seconds["wandb, offline"].append(perf_counter() - began)
                first = size * (rounds + turn + 2)
                reading = self._median(partial(read_batches, self.train, self.plan, 0, first))
                seconds["reading the samples"].append(reading)
                batch = self.validation.batch(0, self.plan.micro_batch_size)
                seconds[EVALUATION].append(self._median(partial(self.engine.eval_batch, [batch])))
                seconds[FORWARD].append(self._median(partial(self._forward, batch)))
        lines.close()
        with redirect_stdout(StringIO()):
            mode = wandb.mode  # which the end takes away
            wandb.finish(0)
        return {
            "tokens_per_step": self.plan.tokens_per_step,
            "samples_per_step": size,
            "wandb": mode,
            "seconds": seconds,
            "shares_of_a_step": {name: ratios(seconds[name], seconds[STEP]) for name in SHARES},
            "evaluation_to_forward": ratios(seconds[EVALUATION], seconds[FORWARD]),
        }

    def _warm_up(self) -> None:
        """What is slow the first time only; a step is so long that its first one shows no difference."""
        self.tev.measure(self.engine.owned_fragments())
        batch = self.validation.batch(0, self.plan.micro_batch_size)
        self.engine.eval_batch([batch])
        self._forward(batch)

    def _forward(self, batch: Batch) -> None:
        self.engine.module.train()
        self.engine.module(
            batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.sample_ids_B, batch.targets_BS
        )

    def _median(self, action: Callable[[], object]) -> float:
        times = []
        for _ in range(self.repeats):
            began = perf_counter()
            action()
            times.append(perf_counter() - began)
        return statistics.median(times)


def preparation_lines(result: dict[str, Any], rounds: int) -> list[str]:
    """Of the preparation, as text."""
    lines = [f"prepare_data: {result['tokens']:,} tokens; median [quartiles] (extremes) of {rounds} rounds"]
    for name, values in result["seconds"].items():
        median = statistics.median(values)
        lines.append(f"{name:34}{median:>8.3f} s{result['tokens'] / median:>12,.0f} tokens/s")
    for count, ratio in result["tokens_per_second_to_tokenizers_alone"].items():
        lines.append(f"{'tokens/s to tokenizers alone, ' + count:34}  {spread(ratio)}")
    return lines


def start_up_lines(result: dict[str, Any], plan: Plan) -> list[str]:
    """Of the start of a run, as text."""
    tokens = plan.shape.tokens_per_step
    lines = [
        f"start-up, {plan.shape.name}, first step of {tokens} tokens; median [quartiles] (extremes) of {plan.starts} "
        "runs",
        f"{'':34}{'s':>8}  in % of the whole",
    ]
    for name, values in result["seconds"].items():
        share = result["shares"].get(name)
        percent = {key: 100 * value for key, value in share.items()} if share else None
        lines.append(f"{name:34}{statistics.median(values):>8.3f}  {spread(percent)}")
    bare = statistics.median(result["bare_imports_seconds"])
    lines.append(
        f"{'import torch, deepspeed':34}{bare:>8.3f}  whole to this: {spread(result['whole_to_bare_imports'])}"
    )
    return lines


def step_lines(result: dict[str, Any], plan: Plan, rounds: int) -> list[str]:
    """Of what accompanies a step, as text."""
    seconds = result["seconds"]
    lines = [
        f"{plan.shape.name}, {result['tokens_per_step']} tokens per step in {plan.micro_batches} micro-batches, one "
        f"process; median [quartiles] (extremes) of {rounds} rounds",
        f"{'':34}{'ms':>10}  in % of a step",
        f"{STEP:34}{1e3 * statistics.median(seconds[STEP]):>10.1f}",
    ]
    for name, share in result["shares_of_a_step"].items():
        percent = {key: 100 * value for key, value in share.items()}
        lines.append(f"{name:34}{1e3 * statistics.median(seconds[name]):>10.3f}  {spread(percent)}")
    rate = result["samples_per_step"] / statistics.median(seconds["reading the samples"])
    lines.append(f"reading: {rate:,.0f} samples/s of {plan.shape.sequence_length} tokens, one thread")
    lines.append(f"{EVALUATION} / {FORWARD}: {spread(result['evaluation_to_forward'])}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
