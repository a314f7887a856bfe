"""What a traced rank reports to the test: pickled in the subprocess, read by running.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.support.device.expected import is_flow_control


@dataclass(frozen=True)
class Message:
    """Messages of a kind: how many, and the bytes that this rank sends in them."""

    number: int = 0
    sent: float = 0.0

    def __add__(self, other: Message) -> Message:
        return Message(self.number + other.number, self.sent + other.sent)


@dataclass
class Phase:
    """What happened in one phase of a traced rank.

    Attributes:
        launches: Kernels by operator.
        waits: By (kind, site, lines): how often the host waited for the device.
        messages: By (operator, group, site).
        wide_products: By site: matrix products of fp32.
        host_results: By site: bytes of results that the host computed by itself.
        misplaced: What is not where it must be.
        start, peak, end: Bytes on the device.
        host_start, host_peak: Bytes of page-locked memory.
        holders: Who holds how many bytes at the peak, by the site that made them; known when the phase has ended.
        marks: (name, launches so far).
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    messages: dict[tuple[str, str, str], Message] = field(default_factory=dict)
    wide_products: Counter[str] = field(default_factory=Counter)
    host_results: Counter[str] = field(default_factory=Counter)
    misplaced: Counter[str] = field(default_factory=Counter)
    start: int = 0
    peak: int = 0
    end: int = 0
    host_start: int = 0
    host_peak: int = 0
    holders: Counter[str] = field(default_factory=Counter)
    marks: list[tuple[str, int]] = field(default_factory=list)
    num_launches: int = 0

    @property
    def num_waits(self) -> int:
        """How often the host waits for the device, without flow control."""
        return self.waits.total() - self.num_flow_control

    @property
    def num_flow_control(self) -> int:
        """How often the host waits because it is too far ahead (expected.FLOW_CONTROL), if the device is behind."""
        return sum(number for (kind, site, _), number in self.waits.items() if is_flow_control(kind, site))

    def sent(self, *groups: str) -> float:
        """Bytes that the rank sends in groups of these names."""
        return sum(message.sent for (_, group, _), message in self.messages.items() if group in groups)


@dataclass
class Report:
    """What is known of a layout.

    Attributes:
        layout: Its name.
        engine: Names of DeepSpeed's engine and optimizer.
        num_micro_batches: Of a step.
        num_blocks: Of this rank.
        num_parameters: Parameters (tensors) of this rank.
        misplaced: Parameters and buffers that are not on the device.
        phases: By name; `step` is the second step of training.
        block_launches: Kernels of a block in the middle, or with ZeRO 3 of the mean block: forward, backward.
        between_launches: Kernels between the blocks' backward pass and the next forward pass.
        planned_bytes: planning.memory's peak.
        planned_sent: planning.communication's bytes of a step: tensor, pipeline, tied, data.
        mesh: Tensor-parallel, pipeline and data-parallel ranks.
        groups: Process groups that the rank had a part in creating, by their number of ranks.
        results: Of the measurements.
    """

    layout: str
    engine: tuple[str, str]
    num_micro_batches: int
    num_blocks: int
    num_parameters: int
    misplaced: list[str]
    phases: dict[str, Phase]
    block_launches: tuple[float, float]
    between_launches: int
    planned_bytes: float
    planned_sent: dict[str, float]
    mesh: tuple[int, int, int]
    groups: dict[int, int]
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> Phase:
        """The step that stands for all."""
        return self.phases["step"]

    @property
    def launches_per_block(self) -> float:
        """Kernels per block and micro-batch, with those between two micro-batches divided by the blocks."""
        return sum(self.block_launches) + self.between_launches / self.num_blocks
