"""Peak tensor memory of a training step: exact on a CPU too, where torch keeps no counters of its own."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contenders import Step
from mlra_scale.data import Batch

SECOND_STEP = "benchmarks: the second step"


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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step = build()
        loss = step(first)
        with record_function(SECOND_STEP):
            step(second)
    return Started(step, loss, peak_within(trace, SECOND_STEP))


def peak_within(trace: profile, region: str) -> int:
    """The largest number of bytes allocated since a trace began, within one of its regions (CPU).

    Args:
        trace: A finished trace with `profile_memory`.
        region: The name of its `record_function`.
    """
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events: list[Any] = list(trace.profiler.kineto_results.events())
    (marked,) = (event for event in events if event.name() == region)
    begin, end = marked.start_ns(), marked.start_ns() + marked.duration_ns()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held, peak = 0, 0
    for moment, change in changes:
        if begin <= moment and peak == 0:
            peak = held
        held += change
        if begin <= moment <= end:
            peak = max(peak, held)
    return peak


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
