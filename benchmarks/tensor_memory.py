"""Peak bytes of tensors, on a GPU by torch's counters, on a CPU by every allocation that torch's allocator reports.

On a CPU the profiler's memory events carry the address, the size and the time of each allocation. The sum is of what
was allocated since `recording` began, so it must begin before the first tensor that counts; buffers inside operations
and inside the backward pass are included. The resident size of the process (RSS) also has libraries, the allocator's
slack and this recording.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile

_MARK = "tensor_memory/"
_GRACE_SECONDS = 1e-3
Data = TypeVar("Data")
"""What a step takes."""


@dataclass(frozen=True)
class Started(Generic[Data]):
    """A trainer that has taken two steps.

    Attributes:
        step: Takes one more, and returns its loss.
        loss: Of the first step.
        peak_bytes: The most that its tensors took at once in the second step: weights, gradients, optimizer, buffers,
            activations, temporary results. What existed before it was built does not count.
    """

    step: Callable[[Data], float]
    loss: float
    peak_bytes: int


def start(
    build: Callable[[], Callable[[Data], float]], device: torch.device, first: Data, second: Data
) -> Started[Data]:
    """Builds a trainer and takes two steps; from the second one on its memory is steady."""
    gc.collect()  # what earlier ones left must not be freed while this one is observed
    if device.type == "cpu":
        with recording() as memory:
            step = build()
            loss = step(first)
            with memory.span("second"):
                step(second)
        return Started(step, loss, memory.peaks["second"])
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    step = build()
    loss = step(first)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(second)
    torch.cuda.synchronize(device)
    return Started(step, loss, torch.cuda.max_memory_allocated(device) - before)


@dataclass
class TensorMemory:
    """Results of a recording, once it has ended.

    Attributes:
        peaks: Largest sum of bytes within each marked span, by its name; a name used again keeps the largest.
        start: Bytes at the beginning of the marked spans, likewise.
    """

    peaks: dict[str, int] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Marks what happens inside as the span of a name."""
        with torch.profiler.record_function(_MARK + name):
            yield


@contextmanager
def recording() -> Iterator[TensorMemory]:
    """Records every allocation of this thread inside; results are there when it is left."""
    found = TensorMemory()
    with (
        _patient_collectives(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded,
    ):
        yield found
    _evaluate(recorded.profiler.kineto_results.experimental_event_tree(), found)


@contextmanager
def _patient_collectives() -> Iterator[None]:
    """Lets gloo's threads release their tensors first.

    They do so a moment after they report that a collective is done. If this thread were faster, theirs would be the
    last reference, and a release in another thread is not recorded.
    """
    wait = Work.wait

    def wait_patiently(self: Work, *arguments: Any, **options: Any) -> bool:
        is_done = wait(self, *arguments, **options)
        time.sleep(_GRACE_SECONDS)
        return is_done

    Work.wait = wait_patiently  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work.wait = wait  # type: ignore[method-assign]


def _evaluate(roots: list[Any], found: TensorMemory) -> None:
    """Replays the allocations in order of time."""
    events: list[tuple[int, int, int, Any]] = []
    pending = list(roots)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.name == "[memory]":
            events.append((event.start_time_ns, 1, event.id, event.extra_fields))
        elif event.name.startswith(_MARK):
            name = event.name.removeprefix(_MARK)
            events += [(event.start_time_ns, 0, event.id, name), (event.end_time_ns, 2, event.id, name)]
    allocated: dict[int, int] = {}
    total, spans = 0, set[str]()
    for _, kind, _, content in sorted(events, key=lambda event: event[:3]):
        if kind == 0:
            spans.add(content)
            found.start[content] = max(found.start.get(content, 0), total)
        elif kind == 2:
            spans.discard(content)
        else:
            # A tensor that another thread released leaves no trace but that its address is given out again.
            total -= allocated.pop(content.ptr, 0)
            if content.alloc_size > 0:
                allocated[content.ptr] = content.alloc_size
                total += content.alloc_size
        for name in spans:
            found.peaks[name] = max(found.peaks.get(name, 0), total)
