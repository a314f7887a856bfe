"""Whether losses and gradients of a device are those of a CPU: the arithmetic of benchmarks.gpu's parity."""

import math
from collections.abc import Sequence
from typing import Any

import torch

FP32_TOLERANCE = 1e-4
"""Of a gradient, relative to its norm, with a hundredth of it relative to the norm of all (exact zeros are noise)."""


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
