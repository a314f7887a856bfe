"""What a log line is made of: throughput, MFU, memory, and the line itself."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from mlra_scale.config import Config

_PEAK_TFLOPS_16_BIT: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("A100", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.05),
    ("L4", 121.0),
)
"""Dense bf16 tensor-core peak in TFLOP/s by part of the device's name, the more special name first.

Source: the 'BFLOAT16 Tensor Core' rows, without sparsity, of NVIDIA's data sheets of these products (HGX B200 for the
B200). Where a sheet gives only the number with sparsity, it is halved. A name is matched as whole words, so that A10
does not stand for A100.
"""


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Returns the peak that MFU is measured against.

    Args:
        config: `train.peak_tflops` wins over the table.
        device: The rank's device.

    Returns:
        TFLOP/s of one device, or None where it is not known: CPUs, devices that are not in the table, and fp32, whose
        peak depends on whether TF32 is allowed.
    """
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops
    if device.type != "cuda" or config.train.precision == "fp32":
        return None
    return peak_of_device_name(torch.cuda.get_device_name(device))


def peak_of_device_name(name: str) -> float | None:
    """Returns the dense 16-bit peak in TFLOP/s of a device called `name`, or None if it is not in the table."""
    words = name.replace("-", " ").split()
    for part, peak in _PEAK_TFLOPS_16_BIT:
        if all(word in words for word in part.split()):
            return peak
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that this process has held: the device's on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Throughput:
    """Tokens per second of training, with evaluation and checkpoints left out of the time."""

    def __init__(self, config: Config, world_size: int, device: torch.device) -> None:
        self._flops_per_token = config.model.flops_per_token(config.train.sequence_length)
        peak = peak_tflops(config, device)
        self._peak_flops = None if peak is None else peak * 1e12 * world_size
        self._started: float | None = None
        self._seconds = self._total_seconds = 0.0
        self._tokens = self._total_tokens = 0

    def start(self) -> None:
        """Starts the clock of a step."""
        self._started = time.perf_counter()

    @property
    def so_far(self) -> float:
        """Seconds since the clock of this step was started."""
        assert self._started is not None, "so_far without start()"
        return time.perf_counter() - self._started

    def stop(self, num_tokens: int) -> float:
        """Stops the clock of a step.

        Args:
            num_tokens: Tokens of the step, over all ranks.

        Returns:
            Seconds of the step.
        """
        assert self._started is not None, "stop() without start()"
        seconds = time.perf_counter() - self._started
        self._started = None
        self._seconds += seconds
        self._total_seconds += seconds
        self._tokens += num_tokens
        self._total_tokens += num_tokens
        return seconds

    def since_last(self) -> dict[str, float]:
        """Returns tokens_per_second and, where a peak is known, mfu since the last call."""
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._seconds, self._tokens = 0.0, 0
        values = {"tokens_per_second": rate}
        if self._peak_flops is not None:
            values["mfu"] = rate * self._flops_per_token / self._peak_flops
        return values

    @property
    def mean(self) -> float:
        """Tokens per second over all steps of this process, the first and slowest included."""
        return self._total_tokens / self._total_seconds if self._total_seconds > 0 else 0.0


def train_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Returns the console line of one log step.

    Args:
        record: The step's record; keys that are absent are left out of the line.
        total_steps: Steps of the run.
    """
    width = len(str(total_steps))
    parts = [
        f"step {record['step']:>{width}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"grad {record['gradient_norm']:.3g}",
        f"lr {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    parts.append(f"mem {record['memory_gib']:.2f} GiB")
    if record.get("loss_scale") is not None:
        parts.append(f"scale {record['loss_scale']:g}")
    if "tev_mean" in record:
        parts.append(tev_text(record))
    if record.get("overflow"):
        parts.append("overflow, update skipped")
    return " | ".join(parts)


def tev_text(record: Mapping[str, Any]) -> str:
    """Returns TEV's mean and standard deviation over tokens, as the console shows them."""
    return f"TEV {record['tev_mean']:.5f} +- {record['tev_std']:.5f}"


def validation_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Returns the console line of one evaluation."""
    width = len(str(total_steps))
    return (
        f"step {record['step']:>{width}}/{total_steps} | validation loss {record['validation_loss']:.4f}"
        f" | perplexity {record['validation_perplexity']:,.1f}"
    )
