"""One GPU: utilisation in bf16 against what its matrix products reach, against other trainers, and parity with a CPU.

    python -m benchmarks.gpu [--dry-run] [--models "72 layers" gpt2-xl] [--contenders NAME ...] [--batch B]
        [--rounds N] [--timeout S] [--no-parity | --parity-only] [--json FILE]
    python -m benchmarks.gpu --device cpu --quick

For 72 layers of width 1024 and for gpt2-xl: our trainer under ZeRO 1, dense and MLRA at R = D/2, plain PyTorch and
transformers' GPT2LMHeadModel, each compiled and not, one after another, each in a process of its own with the whole
device. All have a vocabulary of 50304, so that nobody pays for an odd number of columns. The initial weights of a shape
are drawn once. A contender that fails (memory too small, an
error of the compiler, not done in time) is reported with its reason, and the others go on; the file of --json is
written after each of them.

The processes do not take turns, so rounds of two of them are not of the same time and are not paired: a ratio is that
of the medians, and beside it stand the extremes of each one's own times. What the machine did in between is in it:
plain PyTorch runs first and again at the end, and its ratio to itself is the noise (without it where --contenders
leaves plain PyTorch out, and with --quick where it is not named).

Dense contenders start from the same weights and see the same tokens. One whose loss at the first step is another than
plain PyTorch's (or, without that, than the first dense one's) is reported as differing, without any ratio.

MFU is ModelConfig.flops_per_token (factors counted once, no recomputation) times tokens/s over the best rate of square
matrix products that was measured in the same run, so it does not depend on a data sheet. The aim is 50 % or better.

Parity (benchmarks/gpu_parity.py): losses and every gradient of small models on the GPU against a CPU, in fp32 to a
tolerance, and in bf16 no further from the CPU's fp32 than twice what the CPU's own bf16 is. One model is small; another
has a document mask, and its head takes the tokens in several chunks. The exit code is 1 if it does not hold or could
not be computed.

No GPU: `--dry-run` prints what would be run, with FLOPs and predicted memory; `--device cpu --quick` runs the same
code at a tiny size.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import CommandFailed, end_on_sigterm
from benchmarks.contenders import Shape
from benchmarks.gpu_child import AGAIN, COMPILED, DENSE, MLRA, PLAIN, TRANSFORMERS, config_for, run_child
from benchmarks.gpu_parity import CASES, QUICK_CASES, parity, parity_lines
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import TOLERANCE, environment_of
from mlra_scale.config import batch_plan
from mlra_scale.planning.memory import rank_memory

VOCAB = 50304
MODELS = {
    "72 layers": Shape("72 layers", 72, 1024, 16, batch_size=8, sequence_length=1024, vocab_size=VOCAB),
    "gpt2-xl": Shape("gpt2-xl", 48, 1600, 25, batch_size=8, sequence_length=1024, vocab_size=VOCAB),
}
TINY = Shape("tiny", 2, 32, 2, batch_size=2, sequence_length=16, vocab_size=256)
KINDS = (PLAIN, TRANSFORMERS, DENSE, MLRA)
NAMES = (*KINDS, *(kind + COMPILED for kind in KINDS), PLAIN + AGAIN)
STEPS_PER_ROUND = 3
PRODUCTS = (4096, 8192, 16384)
PRECISION = "bf16"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="One GPU: utilisation, peers, parity.")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and end")
    add_common(parser, rounds=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --quick only")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument(
        "--contenders", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="%(choices)s"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="sequences per step (default: 8)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="of a contender (default: 900)")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-parity", action="store_true", help="leave out the comparison with a CPU")
    parts.add_argument("--parity-only", action="store_true", help="nothing but the comparison with a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables; returns 1 where parity does not hold."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    if arguments.batch is not None and arguments.batch < 1:
        parser.error(f"--batch {arguments.batch}: at least 1")
    shapes = [TINY] if arguments.quick else [MODELS[name] for name in arguments.models]
    if arguments.batch is not None:
        shapes = [dataclasses.replace(shape, batch_size=arguments.batch) for shape in shapes]
    has_noise = PLAIN in arguments.contenders and not arguments.quick
    names = [name for name in NAMES if name in arguments.contenders or (has_noise and name == PLAIN + AGAIN)]
    if arguments.dry_run:
        print("\n".join(dry_run_lines(shapes, names)))
        return 0
    if problem := why_not(arguments.device, arguments.quick):
        parser.error(problem)
    report: dict[str, Any] = {
        "environment": environment_of(arguments.device),
        "rounds": 2 if arguments.quick else arguments.rounds,
        "steps_per_round": STEPS_PER_ROUND,
    }
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    models: list[dict[str, Any]] = []
    products = (128, 256) if arguments.quick else PRODUCTS
    task = {"precision": PRECISION, "rounds": report["rounds"], "steps": STEPS_PER_ROUND, "products": products}
    for shape in [] if arguments.parity_only else shapes:
        with drawn_weights(shape, arguments.timeout) as weights:
            time_one = partial(time_child, shape, task | {"weights": weights}, arguments.device, arguments.timeout)
            for result in measure(shape, names, time_one):
                write_report(arguments, report | {"models": [*models, result]})
        models.append(result)
        print("\n".join(["", *table_lines(result, report["rounds"])]), flush=True)
    report["models"] = models
    holds = True
    if not arguments.no_parity:
        holds = add_parity(report, arguments)
    write_report(arguments, report)
    return int(not holds)


def add_parity(report: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Puts parity into the report and prints it; returns whether it holds."""
    try:
        found = parity(QUICK_CASES if arguments.quick else CASES, arguments.device, arguments.timeout)
    except CommandFailed as error:
        report["parity_failed"] = error.last_line
        print(f"\nparity failed: {error.last_line}", flush=True)
        print(error, file=sys.stderr)
        return False
    report["parity"] = found
    print("\n".join(["", *parity_lines(found, arguments.device)]), flush=True)
    return all(row["holds"] for row in found.values())


def why_not(device: str, is_quick: bool) -> str | None:
    """Why this machine or command line cannot run the benchmark, with the remedy; None if it can."""
    instead = "--dry-run shows what would be run, and --device cpu --quick runs the same code at a tiny size"
    if device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: there is no CUDA device here; {instead}"
    if device == "cpu" and not is_quick:
        return f"--device cpu: the models of this benchmark are for a GPU; {instead}"
    return None


@contextlib.contextmanager
def drawn_weights(shape: Shape, timeout_s: float) -> Iterator[str | None]:
    """A file with the initial weights of a shape, dense and MLRA; None where it cannot be made: each draws its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        try:
            run_child("cpu", "weights", {"shape": shape}, file, timeout_s)
        except CommandFailed as error:
            print(f"{shape.name}: the weights are drawn by each contender: {error.last_line}", flush=True)
        yield str(file) if file.exists() else None


def flops_per_step(shape: Shape, name: str) -> float:
    """Useful FLOPs of a contender's step."""
    return config_for(shape, name).model.flops_per_token(shape.sequence_length) * shape.tokens_per_step


def predicted_bytes(shape: Shape, name: str) -> float:
    """The planner's memory of our trainer; of others weights, gradients and moments in fp32, activations not."""
    config = config_for(shape, name)
    if name.startswith((DENSE, MLRA)):
        return rank_memory(config, batch_plan(config, 1), 0).device
    return 16.0 * config.model.num_parameters()


def measure(shape: Shape, names: Sequence[str], time_one: Callable[[str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Times contenders, one after another.

    Args:
        shape: What is trained.
        names: Of the contenders; at least one.
        time_one: Gives what a contender reported.

    Yields:
        After every contender, the result of all so far.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = time_one(name)
        print(f"{shape.name}: {name} {state_of(found[name]) or 'done'}", flush=True)
        yield evaluate(shape, found)


def time_child(shape: Shape, task: Mapping[str, Any], device: str, timeout_s: float, name: str) -> dict[str, Any]:
    """What a contender reported from its process; `failed` with the reason, and `output`, if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        try:
            run_child(device, "time", {**task, "shape": shape, "name": name}, file, timeout_s)
            found: dict[str, Any] = json.loads(file.read_text())
        except CommandFailed as error:
            print(error, file=sys.stderr)
            return {"failed": error.last_line, "output": str(error)}
    return found


def state_of(item: Mapping[str, Any]) -> str:
    """Why a contender has no ratios, as text; empty if it has."""
    return next((f"{key}: {item[key]}" for key in ("failed", "differs") if key in item), "")


def evaluate(shape: Shape, reported: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """MFU, and ratios of tokens/s, of what contenders reported.

    Args:
        shape: What they train.
        reported: By contender, as benchmarks.gpu_child reports it.

    Returns:
        With `differs` and the losses at those whose loss is not what it must be. A ratio is that of the medians; with
        it are the extremes of the seconds per step of both.
    """
    found = {name: dict(item) for name, item in reported.items()}
    for name, reason in differences({name: item["first_loss"] for name, item in found.items() if "failed" not in item}):
        found[name]["differs"] = reason
    peak = max((item["product_flops"] for item in found.values() if "product_flops" in item), default=math.nan)
    times = {name: item["seconds_per_step"] for name, item in found.items() if not state_of(item)}
    references = [name for name in (PLAIN, PLAIN + COMPILED, TRANSFORMERS, TRANSFORMERS + COMPILED) if name in times]
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    extremes = {name: [min(seconds), max(seconds)] for name, seconds in times.items()}
    return {
        "shape": dataclasses.asdict(shape),
        "product_flops": None if math.isnan(peak) else peak,
        "contenders": found,
        "mfu": {name: flops_per_step(shape, name) / peak / seconds for name, seconds in medians.items()},
        "ratios": {
            f"{name} / {other}": {
                "of_medians": medians[other] / medians[name],
                "seconds": extremes[name],
                "seconds_of_other": extremes[other],
            }
            for name in times
            for other in references
            if other != name
        },
        "predicted_bytes": {name: predicted_bytes(shape, name) for name in found},
    }


def differences(first_loss: Mapping[str, float]) -> list[tuple[str, str]]:
    """Dense contenders whose loss at the first step is another than plain PyTorch's, and how far off they are."""
    dense = {name: first_loss[name] for name in NAMES if name in first_loss and not name.startswith(MLRA)}
    if not dense:
        return []
    reference = next(iter(dense))  # plain PyTorch, where it is there
    return [
        (name, f"loss {loss!r} at the first step, {reference} has {dense[reference]!r}")
        for name, loss in dense.items()
        if not abs(loss / dense[reference] - 1.0) <= TOLERANCE[PRECISION]
    ]


def dry_run_lines(shapes: Sequence[Shape], names: Sequence[str]) -> list[str]:
    """What would be run, as text."""
    lines = []
    for shape in shapes:
        lines += [
            "",
            f"{shape.name}: {shape.num_layers} layers, D={shape.hidden_size}, {shape.num_heads} heads, "
            f"{shape.batch_size} x {shape.sequence_length} tokens per step, vocabulary {shape.vocab_size}, bf16",
            f"{'':32}{'parameters':>15}{'TFLOP per step':>16}{'GiB predicted':>15}",
        ]
        for name in names:
            parameters = config_for(shape, name).model.num_parameters()
            is_ours = name.startswith((DENSE, MLRA))
            memory = f"{predicted_bytes(shape, name) / 2**30:>15.2f}{'' if is_ours else ' and activations'}"
            lines.append(f"{name:32}{parameters:>15,}{flops_per_step(shape, name) / 1e12:>16.2f}{memory}")
    lines += ["", "then losses and gradients of small models, dense and MLRA, fp32 and bf16, against a CPU"]
    return lines


def table_lines(result: dict[str, Any], rounds: int) -> list[str]:
    """A model's result as text."""
    shape = Shape(**result["shape"])
    products = f"{(result['product_flops'] or math.nan) / 1e12:.2f} TFLOP/s"
    lines = [
        f"{shape.name}: {shape.num_layers} layers, D={shape.hidden_size}, {shape.batch_size} x {shape.sequence_length} "
        f"tokens per step, vocabulary {shape.vocab_size}, bf16; matrix products {products}",
        f"ms/step: median (extremes) of {rounds} rounds of {STEPS_PER_ROUND} steps; tokens/s as ratios of medians",
        f"{'':32}{'ms/step':>9}{'':24}{'MFU %':>8}{'GiB':>9}{'predicted':>10}  {'/ ' + PLAIN:18}/ {TRANSFORMERS}",
    ]
    for name, item in result["contenders"].items():
        if state := state_of(item):
            lines.append(f"{name:32}{state}")
            continue
        found = [result["ratios"].get(f"{name} / {other}") for other in (PLAIN, TRANSFORMERS)]
        cells = ["" if ratio is None else f"{ratio['of_medians']:.3f}" for ratio in found]
        memory = f"{item['peak_bytes'] / 2**30:>9.3f}{result['predicted_bytes'][name] / 2**30:>10.3f}"
        seconds = [1e3 * value for value in item["seconds_per_step"]]
        time = f"{statistics.median(seconds):>9.1f}{f' ({min(seconds):.1f} {max(seconds):.1f})':24}"
        lines.append(f"{name:32}{time}{100 * result['mfu'][name]:>8.1f}{memory}  {cells[0]:18}{cells[1]}")
    return lines


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
