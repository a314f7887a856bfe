"""Whether losses and gradients of a device are those of a CPU: the step `parity` of benchmarks/check.py.

Losses and every gradient of small models, in fp32 to a tolerance, and in bf16 no further from the CPU's fp32 than twice
what the CPU's own bf16 is. One model is small; another has a document mask, and its head takes the tokens in several
chunks.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.check import Task, Write
from benchmarks.child import run_child
from benchmarks.contenders import DENSE, LEARNING_RATE, MLRA, Shape, build_ours
from benchmarks.gpu import gpu_config
from benchmarks.harness import Table, text_of
from mlra_scale.model.head_chunks import num_chunks
from mlra_scale.parallel import Topology

FP32_TOLERANCE = 1e-4
"""Of a gradient, relative to its norm, with a hundredth of it relative to the norm of all (exact zeros are noise)."""


@dataclass(frozen=True)
class Case:
    """A comparison with a CPU.

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


def parity(task: Task, write: Write) -> dict[str, Any]:
    """Losses and gradients of this device against a CPU's."""
    found: dict[str, Any] = {}
    for case in QUICK_CASES if task.is_quick else CASES:
        found |= compare(case, task.device, task.seconds)
        headers = ["", "loss", "bound", "gradient", "bound", "", "worst"]
        title = f"{task.device} against cpu, relative differences; fp32 gradients: the worst, as a share of its bound"
        rows: list[list[Any]] = [[name, *_columns(row)] for name, row in found.items()]
        lines = text_of(Table(title, headers, rows)).splitlines()
        write(result := {"holds": all(row["holds"] for row in found.values()), "lines": lines, "cases": found})
    return result


def _columns(row: Mapping[str, Any]) -> list[Any]:
    values = [f"{row[name]:.2e}" for name in ("loss", "loss_bound", "gradient", "gradient_bound")]
    return [*values, "holds" if row["holds"] else "DOES NOT HOLD", row["worst"]]


def compare(case: Case, device: str, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Compares losses and gradients of a device with a CPU's; device "cpu" compares a CPU with itself.

    Returns:
        By case, attention and precision: relative differences of the loss and of the gradients, their bounds, and
        whether they hold.

    Raises:
        CommandFailed: A process failed.
    """
    arguments = {name: getattr(case, name) for name in ("attentions", "is_masked", "has_chunks")}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        files = [Path(folder) / "reference", Path(folder) / "device"]
        running = [
            pool.submit(run_child, kind, "parity.gradients", case.shape, arguments, file, timeout_s)
            for kind, file in zip(("cpu", device), files, strict=True)
        ]
        for child in running:
            child.result()
        reference, ours = (load_file(file) for file in files)
    found = {}
    for attention in case.attentions:
        name, exact = f"{case.shape.name}: {attention}", _tensors(reference, f"{attention}/fp32/")
        found[f"{name} fp32"] = compare_fp32(_tensors(ours, f"{attention}/fp32/"), exact)
        ours_bf16, cpu_bf16 = (_tensors(tensors, f"{attention}/bf16/") for tensors in (ours, reference))
        found[f"{name} bf16"] = compare_bf16(ours_bf16, cpu_bf16, exact)
    return found


def gradients(
    shape: Shape, topology: Topology, attentions: Sequence[str], is_masked: bool, has_chunks: bool
) -> dict[str, torch.Tensor]:
    """Returns losses and gradients of our models in fp32 and bf16, of one batch.

    Args:
        shape: A small model.
        topology: The mesh of this process.
        attentions: As in Case.
        is_masked: As in Case.
        has_chunks: As in Case.

    Returns:
        fp32 on the CPU, by "attention/precision/parameter"; the loss is called "loss".
    """
    batch, data = shape.batch(0), {}
    if is_masked:
        # Borders in other places for each sample.
        shifted = batch.positions_BS + 7 * batch.sample_ids_B[:, None]
        batch = replace(batch, documents_BS=shifted // (shape.sequence_length // 3))
        data = {"document_attention": "masked"}
    found: dict[str, torch.Tensor] = {}
    for attention in attentions:
        for precision in ("fp32", "bf16"):
            config = gpu_config(shape, MLRA[2] if attention == "mlra" else DENSE, precision, data=data)
            columns = config.model.padded_vocab_size
            assert not has_chunks or num_chunks(shape.tokens_per_step, columns, topology.device.type, False) > 1
            engine = build_ours(config, topology)
            prefix = f"{attention}/{precision}"

            def keep(proposal: Any, engine: Any = engine, prefix: str = prefix) -> bool:
                for fragment in engine.owned_gradients():
                    info = engine.table[fragment.name]
                    name = f"{prefix}/{fragment.name}"
                    whole = found.setdefault(name, torch.zeros(info.shape)).view(-1)
                    whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values.float().cpu()
                return False

            loss = engine.train_batch([batch], LEARNING_RATE, keep).loss
            found[f"{prefix}/loss"] = torch.tensor([loss], dtype=torch.float64)
    return found


def _tensors(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the tensors under a prefix, in fp64."""
    return {name.removeprefix(prefix): value.double() for name, value in tensors.items() if name.startswith(prefix)}


def compare_fp32(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the worst gradient, as a share of its tolerance, and the loss."""
    assert ours.keys() == exact.keys()
    loss = float((ours["loss"] / exact["loss"] - 1.0).abs())
    names = [name for name in exact if name != "loss"]
    whole = float(_norm([exact[name] for name in names]))
    shares = {
        name: float((ours[name] - exact[name]).norm()) / (FP32_TOLERANCE * (float(exact[name].norm()) + 0.01 * whole))
        for name in names
    }
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return _judged(loss, 1e-5, worst, shares[worst], 1.0)


def compare_bf16(
    ours: dict[str, torch.Tensor], cpu: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Returns distances from fp32 in bf16, over all gradients together, against twice the CPU's own."""
    names = [name for name in exact if name != "loss"]
    whole = _norm([exact[name] for name in names])

    def distances(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
        gradient = _norm([tensors[name] - exact[name] for name in names]) / whole
        return float((tensors["loss"] / exact["loss"] - 1.0).abs()), float(gradient)

    (loss, gradient), (cpu_loss, cpu_gradient) = distances(ours), distances(cpu)
    # The loss of one batch can be right by chance: what bf16 rounds off once is always allowed.
    return _judged(loss, max(2.0 * cpu_loss, 2.0**-9), "all gradients", gradient, 2.0 * cpu_gradient)


def _judged(loss: float, loss_bound: float, worst: str, gradient: float, gradient_bound: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "loss_bound": loss_bound,
        "worst": worst,
        "gradient": gradient,
        "gradient_bound": gradient_bound,
        "holds": loss <= loss_bound and gradient <= gradient_bound,
    }


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()
