"""Peak tensor memory of a training step: exact on a CPU too, where torch keeps no counters of its own."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.contenders import Step
from benchmarks.tensor_memory import recording
from mlra_scale.data import Batch


@dataclass(frozen=True)
class Started:
    """A contender that has taken two steps.

    Attributes:
        step: What it does for a step.
        loss: Of the first step.
        peak_bytes: The most that its tensors took at once during the second step: weights, gradients, optimizer,
            buffers, activations, temporary results. What was there before it was built does not count.
    """

    step: Step
    loss: float
    peak_bytes: int


def start(build: Callable[[], Step], device: torch.device, first: Batch, second: Batch) -> Started:
    """Builds a contender and takes two steps, the second one with a steady state of memory.

    Args:
        build: Makes everything that it holds.
        device: Where it computes. On a CPU the allocator's own events are added up: everything that is allocated and
            freed from here on, inside operators too.
        first: A batch.
        second: Another one.
    """
    gc.collect()  # what earlier contenders left behind must not be freed while this one is observed
    if device.type == "cuda":
        return _start_on_cuda(build, first, second)
    with recording() as memory:
        step = build()
        loss = step(first)
        with memory.span("second"):
            step(second)
    return Started(step, loss, memory.peaks["second"])


def _start_on_cuda(build: Callable[[], Step], first: Batch, second: Batch) -> Started:
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step = build()
    loss = step(first)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(second)
    torch.cuda.synchronize()
    return Started(step, loss, torch.cuda.max_memory_allocated() - before)
