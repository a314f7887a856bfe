"""Peak bytes of tensors on the CPU, exact: every allocation and release that torch's allocator reports.

torch.profiler's memory events carry the address, the size and the time of each. What is summed is what has been
allocated since `recording` began, so it must begin before the first tensor that counts is made; buffers inside an
operation and inside the backward pass are seen as well, which a look at Python's objects, or at operations' outputs,
would miss. The process' resident size (RSS) is another matter: it also has the libraries, the allocator's slack, the
process groups' own buffers and this recording.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile

_MARK = "tensor_memory/"
_GRACE_SECONDS = 1e-3


@dataclass
class TensorMemory:
    """What a recording found, once it has ended.

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
    """Lets gloo's threads release what they hold first.

    They do so a moment after they have told that a collective is done. If this thread were faster, theirs would be the
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
    moments: list[tuple[int, int, int, Any]] = []
    pending = list(roots)
    while pending:
        event = pending.pop()
        pending += event.children
        if event.name == "[memory]":
            moments.append((event.start_time_ns, 1, event.id, event.extra_fields))
        elif event.name.startswith(_MARK):
            name = event.name.removeprefix(_MARK)
            moments += [(event.start_time_ns, 0, event.id, name), (event.end_time_ns, 2, event.id, name)]
    held: dict[int, int] = {}
    total, spans = 0, set[str]()
    for _, kind, _, content in sorted(moments, key=lambda moment: moment[:3]):
        if kind == 0:
            spans.add(content)
            found.start[content] = max(found.start.get(content, 0), total)
        elif kind == 2:
            spans.discard(content)
        else:
            # A tensor that another thread released leaves no trace of that but its address being given out again.
            total -= held.pop(content.ptr, 0)
            if content.alloc_size > 0:
                held[content.ptr] = content.alloc_size
                total += content.alloc_size
        for name in spans:
            found.peaks[name] = max(found.peaks.get(name, 0), total)


def reset_resident_peak() -> None:
    """Makes `resident_peak` begin anew, where the kernel lets a process do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident_peak() -> int:
    """Returns the largest resident size of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
