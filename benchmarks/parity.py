"""Whether losses and gradients of a device are those of a CPU: the step `parity` of benchmarks/check.py.

Losses and every gradient of small models, in fp32 to a tolerance, and in bf16 no further from the CPU's fp32 than twice
what the CPU's own bf16 is. One model is small; another has a document mask, and its head takes the tokens in several
chunks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks.check import Task, Write
from benchmarks.contenders import DENSE, LEARNING_RATE, MLRA, Shape, build_ours, one_process_mesh
from benchmarks.gpu import gpu_config
from benchmarks.harness import Table, text_of
from benchmarks.ranks import alone
from mlra_scale.model.head_chunks import num_chunks

FP32_TOLERANCE = 1e-4
"""Of a gradient, relative to its norm, with a hundredth of it relative to the norm of all (exact zeros are noise)."""
MASKED = "masked, head chunks"
CASES = (
    Shape("small", 4, 128, 4, batch_size=2, sequence_length=64, vocab_size=512),
    Shape(MASKED, 2, 64, 2, 12, 1024, vocab_size=50304),  # 12,288 tokens, of which a GPU's head takes 5,336 at a time
)
QUICK_CASES = (
    Shape("small", 2, 32, 2, batch_size=2, sequence_length=16, vocab_size=256),
    Shape(MASKED, 2, 32, 2, 2, 128, vocab_size=50304),  # 256 tokens, of which a CPU's head takes 83 at a time
)
ATTENTIONS = {"small": ("dense", "mlra"), MASKED: ("mlra",)}
Tensors = dict[str, torch.Tensor]


def parity(task: Task, write: Write) -> dict[str, Any]:
    """Losses and gradients of this device against a CPU's."""
    found: dict[str, Any] = {}
    for shape in QUICK_CASES if task.is_quick else CASES:
        found |= compare(shape, task.device, task.seconds)
        headers = ["", "loss", "bound", "gradient", "bound", "", "worst"]
        title = f"{task.device} against cpu, relative differences; fp32 gradients: the worst, as a share of its bound"
        rows: list[list[Any]] = [[name, *_columns(row)] for name, row in found.items()]
        lines = text_of(Table(title, headers, rows)).splitlines()
        write(result := {"holds": all(row["holds"] for row in found.values()), "lines": lines, "cases": found})
    return result


def _columns(row: Mapping[str, Any]) -> list[Any]:
    values = [f"{row[name]:.2e}" for name in ("loss", "loss_bound", "gradient", "gradient_bound")]
    return [*values, "holds" if row["holds"] else "DOES NOT HOLD", row["worst"]]


def compare(shape: Shape, device: str, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Compares losses and gradients of a device with a CPU's; device "cpu" compares a CPU with itself.

    Returns:
        By case, attention and precision: relative differences of the loss and of the gradients, their bounds, and
        whether they hold.

    Raises:
        RanksFailed: A process failed.
    """
    with ThreadPoolExecutor(2) as pool:
        devices = ("cpu", device)
        reference, ours = pool.map(lambda kind: alone(f"parity on {kind}", kind, timeout_s, gradients, shape), devices)
    found = {}
    for attention in ATTENTIONS[shape.name]:
        name, exact = f"{shape.name}: {attention}", _under(reference, f"{attention}/fp32/")
        found[f"{name} fp32"] = compare_fp32(_under(ours, f"{attention}/fp32/"), exact)
        ours_bf16, cpu_bf16 = (_under(tensors, f"{attention}/bf16/") for tensors in (ours, reference))
        found[f"{name} bf16"] = compare_bf16(ours_bf16, cpu_bf16, exact)
    return found


def gradients(commands: Iterator[Any], device: str, shape: Shape) -> Iterator[Tensors]:
    """A process: yields losses and gradients of one batch, dense and MLRA, in fp32 and bf16.

    They are on the CPU, by "attention/precision/parameter"; the loss is called "loss".
    """
    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))
    batch, data = shape.batch(0), {}
    if shape.name == MASKED:
        # Borders in other places for each sample.
        shifted = batch.positions_BS + 7 * batch.sample_ids_B[:, None]
        batch = replace(batch, documents_BS=shifted // (shape.sequence_length // 3))
        data = {"document_attention": "masked"}
    found: Tensors = {}
    with one_process_mesh(device) as topology:
        for attention in ATTENTIONS[shape.name]:
            for precision in ("fp32", "bf16"):
                config = gpu_config(shape, MLRA[2] if attention == "mlra" else DENSE, precision, data=data)
                columns = config.model.padded_vocab_size
                assert shape.name != MASKED or num_chunks(shape.tokens_per_step, columns, device, False) > 1
                engine = build_ours(config, topology)
                prefix = f"{attention}/{precision}"

                def keep(proposal: Any, engine: Any = engine, prefix: str = prefix) -> bool:
                    for fragment in engine.owned_gradients():
                        info = engine.table[fragment.name]
                        whole = found.setdefault(f"{prefix}/{fragment.name}", torch.zeros(info.shape)).view(-1)
                        whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values.float().cpu()
                    return False

                loss = engine.train_batch([batch], LEARNING_RATE, keep).loss
                found[f"{prefix}/loss"] = torch.tensor([loss], dtype=torch.float64)
    yield found


def _under(tensors: Tensors, prefix: str) -> Tensors:
    """Returns the tensors under a prefix, in fp64."""
    return {name.removeprefix(prefix): value.double() for name, value in tensors.items() if name.startswith(prefix)}


def compare_fp32(ours: Tensors, exact: Tensors) -> dict[str, Any]:
    """Returns the worst gradient, as a share of its tolerance, and the loss."""
    assert ours.keys() == exact.keys()
    names = [name for name in exact if name != "loss"]
    whole = float(_norm([exact[name] for name in names]))
    shares = {
        name: float((ours[name] - exact[name]).norm()) / (FP32_TOLERANCE * (float(exact[name].norm()) + 0.01 * whole))
        for name in names
    }
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return _judged(_loss_difference(ours, exact), 1e-5, worst, shares[worst], 1.0)


def compare_bf16(ours: Tensors, cpu: Tensors, exact: Tensors) -> dict[str, Any]:
    """Returns distances from fp32 in bf16, over all gradients together, against twice the CPU's own."""
    names = [name for name in exact if name != "loss"]
    whole = _norm([exact[name] for name in names])
    gradient, cpu_gradient = (
        float(_norm([tensors[name] - exact[name] for name in names]) / whole) for tensors in (ours, cpu)
    )
    # The loss of one batch can be right by chance: what bf16 rounds off once is always allowed.
    loss_bound = max(2.0 * _loss_difference(cpu, exact), 2.0**-9)
    return _judged(_loss_difference(ours, exact), loss_bound, "all gradients", gradient, 2.0 * cpu_gradient)


def _loss_difference(ours: Tensors, exact: Tensors) -> float:
    return float((ours["loss"] / exact["loss"] - 1.0).abs())


def _judged(loss: float, loss_bound: float, worst: str, gradient: float, gradient_bound: float) -> dict[str, Any]:
    holds = loss <= loss_bound and gradient <= gradient_bound
    bounds = {"loss_bound": loss_bound, "gradient_bound": gradient_bound}
    return {"loss": loss, "worst": worst, "gradient": gradient, **bounds, "holds": holds}


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()
