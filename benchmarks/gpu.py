"""One GPU: utilisation in bf16 against what its matrix products reach, against other trainers, and parity with a CPU.

    python -m benchmarks.gpu [--dry-run] [--models "72 layers" gpt2-xl] [--contenders NAME ...] [--batch B]
        [--rounds N] [--no-parity] [--json FILE]
    python -m benchmarks.gpu --device cpu --quick

For 72 layers of width 1024 and for gpt2-xl: our trainer, dense and MLRA at R = D/2, plain PyTorch and transformers'
GPT2LMHeadModel, each compiled and not, one after another, each in a process of its own with the whole device (a
contender for which the memory is too small is reported as such). Plain PyTorch runs first and again at the end: the
noise. All have a vocabulary of 50304, so that nobody pays for an odd number of columns.

MFU is ModelConfig.flops_per_token (factors counted once, no recomputation) times tokens/s over the best rate of square
matrix products that was measured in the same run, so it does not depend on a data sheet. The aim is 50 % or better.

Parity: losses and every gradient of small models on the GPU against a CPU, in fp32 to a tolerance, and in bf16 no
further from the CPU's fp32 than twice what the CPU's own bf16 is. The exit code is 1 if it does not hold.

No GPU: `--dry-run` prints what would be run, with FLOPs and predicted memory; `--device cpu --quick` runs the same
code at a tiny size.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.contenders import COMPILED_BLOCKS, Shape, config_of
from benchmarks.gpu_child import AGAIN, COMPILED, DENSE, MLRA, PLAIN, TRANSFORMERS
from benchmarks.step_time import environment_of, ratios, spread
from mlra_scale.config import Config, batch_plan
from mlra_scale.planning.memory import rank_memory

VOCAB = 50304
MODELS = {
    "72 layers": Shape("72 layers", 72, 1024, 16, batch_size=8, sequence_length=1024, vocab_size=VOCAB),
    "gpt2-xl": Shape("gpt2-xl", 48, 1600, 25, batch_size=8, sequence_length=1024, vocab_size=VOCAB),
}
TINY = Shape("tiny", 2, 32, 2, batch_size=2, sequence_length=16, vocab_size=256)
PARITY = Shape("parity", 4, 128, 4, batch_size=2, sequence_length=64, vocab_size=512)
KINDS = (PLAIN, TRANSFORMERS, DENSE, MLRA)
NAMES = (*KINDS, *(kind + COMPILED for kind in KINDS), PLAIN + AGAIN)
STEPS_PER_ROUND = 3
PRODUCTS = (4096, 8192, 16384)
CHILD_TIMEOUT = 900.0
FP32_TOLERANCE = 1e-4
"""Of a gradient, relative to its norm, with a hundredth of it relative to the norm of all (exact zeros are noise)."""


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="One GPU: utilisation, peers, parity.")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and end")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and two rounds: shows that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --quick only")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument(
        "--contenders", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help="%(choices)s"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="sequences per step (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, help="per contender, 2 or more (default: %(default)s)")
    parser.add_argument("--no-parity", action="store_true", help="leave out the comparison with a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here as well")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables; returns 1 where parity does not hold."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: a spread needs at least 2")
    if arguments.batch is not None and arguments.batch < 1:
        parser.error(f"--batch {arguments.batch}: at least 1")
    shapes = [TINY] if arguments.quick else [MODELS[name] for name in arguments.models]
    if arguments.batch is not None:
        shapes = [dataclasses.replace(shape, batch_size=arguments.batch) for shape in shapes]
    names = [name for name in NAMES if name in arguments.contenders]
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
    report["models"] = []
    for shape in shapes:
        products = (128, 256) if arguments.quick else PRODUCTS
        report["models"].append(measure(shape, names, arguments.device, report["rounds"], products))
        print("\n".join(["", *table_lines(report["models"][-1], report["rounds"])]), flush=True)
    if not arguments.no_parity:
        report["parity"] = parity(TINY if arguments.quick else PARITY, arguments.device)
        print("\n".join(["", *parity_lines(report["parity"], arguments.device)]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(not all(row["holds"] for row in report.get("parity", {}).values()))


def why_not(device: str, is_quick: bool) -> str | None:
    """Why this machine or command line cannot run the benchmark, with the remedy; None if it can."""
    instead = "--dry-run shows what would be run, and --device cpu --quick runs the same code at a tiny size"
    if device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: there is no CUDA device here; {instead}"
    if device == "cpu" and not is_quick:
        return f"--device cpu: the models of this benchmark are for a GPU; {instead}"
    return None


def config_for(shape: Shape, name: str) -> Config:
    """The configuration of a contender's model; of ours the real one, of others one of as many FLOPs."""
    sections = COMPILED_BLOCKS if name in (DENSE + COMPILED, MLRA + COMPILED) else {}
    return config_of(shape, "mlra" if name.startswith(MLRA) else "dense", "bf16", **sections)


def flops_per_step(shape: Shape, name: str) -> float:
    """Useful FLOPs of a contender's step."""
    return config_for(shape, name).model.flops_per_token(shape.sequence_length) * shape.tokens_per_step


def predicted_bytes(shape: Shape, name: str) -> float:
    """The planner's memory of our trainer; of others weights, gradients and moments in fp32, activations not."""
    config = config_for(shape, name)
    if name.startswith((DENSE, MLRA)):
        return rank_memory(config, batch_plan(config, 1), 0).device
    return 16.0 * config.model.num_parameters()


def measure(shape: Shape, names: Sequence[str], device: str, rounds: int, products: Sequence[int]) -> dict[str, Any]:
    """Times contenders, one process after another.

    Returns:
        What each reported, and MFU and ratios formed from it.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        specification = {"name": name, "precision": "bf16", "rounds": rounds, "steps": STEPS_PER_ROUND}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            run_child(device, "time", {**specification, "shape": shape, "products": products}, file)
            found[name] = json.loads(file.read_text())
        print(f"{shape.name}: {name} {found[name].get('failed', 'done')}", flush=True)
    peak = max(item["product_flops"] for item in found.values())
    times = {name: item["seconds_per_step"] for name, item in found.items() if "failed" not in item}
    references = [name for name in (PLAIN, PLAIN + COMPILED, TRANSFORMERS, TRANSFORMERS + COMPILED) if name in times]
    return {
        "shape": dataclasses.asdict(shape),
        "product_flops": peak,
        "contenders": found,
        "mfu": {
            name: flops_per_step(shape, name) / peak / statistics.median(seconds) for name, seconds in times.items()
        },
        "ratios": {
            f"{name} / {other}": ratios(times[other], times[name])
            for name in times
            for other in references
            if other != name
        },
        "predicted_bytes": {name: predicted_bytes(shape, name) for name in names},
    }


def run_child(device: str, what: str, specification: dict[str, Any], file: Path) -> None:
    """Runs benchmarks.gpu_child.

    Raises:
        SystemExit: It failed, with the end of what it wrote, or took too long.
    """
    text = json.dumps({**specification, "shape": dataclasses.asdict(specification["shape"])})
    command = [sys.executable, "-m", "benchmarks.gpu_child", "--device", device, what, text, str(file)]
    environment = {**os.environ, "DS_ACCELERATOR": device}  # not what this process, on a GPU, chose for itself
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{what} {text}: not done after {CHILD_TIMEOUT:g} s") from None
    if result.returncode != 0:
        raise SystemExit(f"{what} {text}: exit code {result.returncode}\n{result.stderr[-3000:]}")


def parity(shape: Shape, device: str) -> dict[str, dict[str, Any]]:
    """Compares losses and gradients of a device with a CPU's.

    Args:
        shape: A small model.
        device: "cuda"; "cpu" compares a CPU with itself.

    Returns:
        By attention and precision: relative differences of the loss and of the gradients, their bounds, and whether
        they hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "reference", Path(folder) / "device"]
        for place, file in zip(("cpu", device), files, strict=True):
            run_child(place, "gradients", {"shape": shape}, file)
        reference, ours = (load_file(file) for file in files)
    found = {}
    for attention in ("dense", "mlra"):
        exact = tensors_of(reference, f"{attention}/fp32/")
        found[f"{attention} fp32"] = compare_fp32(tensors_of(ours, f"{attention}/fp32/"), exact)
        found[f"{attention} bf16"] = compare_bf16(
            tensors_of(ours, f"{attention}/bf16/"), tensors_of(reference, f"{attention}/bf16/"), exact
        )
    return found


def tensors_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, in fp64."""
    return {name.removeprefix(prefix): value.double() for name, value in tensors.items() if name.startswith(prefix)}


def compare_fp32(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The worst gradient, as a share of its tolerance, and the loss."""
    assert ours.keys() == exact.keys()
    loss = float((ours["loss"] / exact["loss"] - 1.0).abs())
    whole = float(_norm([value for name, value in exact.items() if name != "loss"]))
    shares = {
        name: float((ours[name] - value).norm()) / (FP32_TOLERANCE * (float(value.norm()) + 0.01 * whole))
        for name, value in exact.items()
        if name != "loss"
    }
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return {
        "loss": loss,
        "loss_bound": 1e-5,
        "worst": worst,
        "gradient": shares[worst],
        "gradient_bound": 1.0,
        "holds": loss <= 1e-5 and shares[worst] <= 1.0,
    }


def compare_bf16(
    ours: dict[str, torch.Tensor], cpu: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Distances from fp32 in bf16, over all gradients together, against twice the CPU's own."""
    names = [name for name in exact if name != "loss"]
    whole = _norm([exact[name] for name in names])

    def distances(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
        gradient = _norm([tensors[name] - exact[name] for name in names]) / whole
        return float((tensors["loss"] / exact["loss"] - 1.0).abs()), float(gradient)

    (loss, gradient), (cpu_loss, cpu_gradient) = distances(ours), distances(cpu)
    # The loss of one batch can be right by chance: what bf16 rounds off once is always allowed.
    loss_bound = max(2.0 * cpu_loss, 2.0**-9)
    return {
        "loss": loss,
        "loss_bound": loss_bound,
        "worst": "all gradients",
        "gradient": gradient,
        "gradient_bound": 2.0 * cpu_gradient,
        "holds": loss <= loss_bound and gradient <= 2.0 * cpu_gradient,
    }


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


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
    lines += ["", "then losses and gradients of a small model, dense and MLRA, fp32 and bf16, against a CPU"]
    return lines


def table_lines(result: dict[str, Any], rounds: int) -> list[str]:
    """A model's result as text."""
    shape = Shape(**result["shape"])
    lines = [
        f"{shape.name}: {shape.num_layers} layers, D={shape.hidden_size}, {shape.batch_size} x {shape.sequence_length} "
        f"tokens per step, vocabulary {shape.vocab_size}, bf16; matrix products {result['product_flops'] / 1e12:.2f} "
        "TFLOP/s",
        f"tokens/s as ratios: median [quartiles] (extremes) of {rounds} rounds of {STEPS_PER_ROUND} steps",
        f"{'':32}{'ms/step':>9}{'MFU %':>8}{'GiB':>9}{'predicted':>10}  {'/ ' + PLAIN:38}/ {TRANSFORMERS}",
    ]
    for name, item in result["contenders"].items():
        if "failed" in item:
            lines.append(f"{name:32}{item['failed']}")
            continue
        cells = [spread(result["ratios"].get(f"{name} / {other}")) for other in (PLAIN, TRANSFORMERS)]
        memory = f"{item['peak_bytes'] / 2**30:>9.3f}{result['predicted_bytes'][name] / 2**30:>10.3f}"
        median = statistics.median(item["seconds_per_step"]) * 1e3
        lines.append(f"{name:32}{median:>9.1f}{100 * result['mfu'][name]:>8.1f}{memory}  {cells[0]:38}{cells[1]}")
    return lines


def parity_lines(found: dict[str, dict[str, Any]], device: str) -> list[str]:
    """Parity as text."""
    lines = [f"{device} against cpu, relative differences (bounds); fp32 gradients: the worst, as a share of its bound"]
    for name, row in found.items():
        lines.append(
            f"{name:12} loss {row['loss']:.2e} ({row['loss_bound']:.2e})   gradient {row['gradient']:.2e} "
            f"({row['gradient_bound']:.2e})  {'holds' if row['holds'] else 'DOES NOT HOLD'}  {row['worst']}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
