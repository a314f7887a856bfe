"""Whether losses and gradients of a device are those of a CPU: the parity of benchmarks.gpu."""

import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.contenders import Shape
from benchmarks.gpu_child import run_child

FP32_TOLERANCE = 1e-4
"""Of a gradient, relative to its norm, with a hundredth of it relative to the norm of all (exact zeros are noise)."""


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        shape: The model and its batch.
        attentions: "dense", "mlra" or both.
        is_masked: Whether attention stops at the borders of documents.
        has_chunks: Whether the head must take the tokens in several chunks.
    """

    shape: Shape
    attentions: tuple[str, ...] = ("dense", "mlra")
    is_masked: bool = False
    has_chunks: bool = False


CASES = (
    Case(Shape("small", 4, 128, 4, batch_size=2, sequence_length=64, vocab_size=512)),
    # 12,288 tokens, of which a GPU's head takes 5,336 at a time.
    Case(Shape("masked, head chunks", 2, 64, 2, 12, 1024, vocab_size=50304), ("mlra",), True, True),
)
QUICK_CASES = (
    Case(Shape("small", 2, 32, 2, batch_size=2, sequence_length=16, vocab_size=256)),
    # 256 tokens, of which a CPU's head takes 83 at a time.
    Case(Shape("masked, head chunks", 2, 32, 2, 2, 128, vocab_size=50304), ("mlra",), True, True),
)


def parity(cases: Sequence[Case], device: str, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Compares losses and gradients of a device with a CPU's.

    Args:
        cases: What is compared.
        device: "cuda"; "cpu" compares a CPU with itself.
        timeout_s: Seconds for each process.

    Returns:
        By case, attention and precision: relative differences of the loss and of the gradients, their bounds, and
        whether they hold.

    Raises:
        CommandFailed: A process failed.
    """
    found = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            task = {name: getattr(case, name) for name in ("shape", "attentions", "is_masked", "has_chunks")}
            files = [Path(folder) / "reference", Path(folder) / "device"]
            running = [
                pool.submit(run_child, place, "gradients", task, file, timeout_s)
                for place, file in zip(("cpu", device), files, strict=True)
            ]
            for child in running:
                child.result()
            reference, ours = (load_file(file) for file in files)
        for attention in case.attentions:
            name, exact = f"{case.shape.name}: {attention}", tensors_of(reference, f"{attention}/fp32/")
            found[f"{name} fp32"] = compare_fp32(tensors_of(ours, f"{attention}/fp32/"), exact)
            found[f"{name} bf16"] = compare_bf16(
                tensors_of(ours, f"{attention}/bf16/"), tensors_of(reference, f"{attention}/bf16/"), exact
            )
    return found


def parity_lines(found: dict[str, dict[str, Any]], device: str) -> list[str]:
    """Parity as text."""
    lines = [f"{device} against cpu, relative differences (bounds); fp32 gradients: the worst, as a share of its bound"]
    for name, row in found.items():
        lines.append(
            f"{name:32} loss {row['loss']:.2e} ({row['loss_bound']:.2e})   gradient {row['gradient']:.2e} "
            f"({row['gradient_bound']:.2e})  {'holds' if row['holds'] else 'DOES NOT HOLD'}  {row['worst']}"
        )
    return lines


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
