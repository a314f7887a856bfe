"""What a traced rank reports to the test: pickled in the subprocess, read by running.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.support.device.expected import is_flow_control, is_of_matrices


@dataclass(frozen=True)
class Message:
    """Messages of a kind: how many, and the bytes that this rank sends in them."""

    number: int = 0
    sent: float = 0.0

    def __add__(self, other: Message) -> Message:
        return Message(self.number + other.number, self.sent + other.sent)


@dataclass
class Phase:
    """What happened in one phase of a traced rank."""

    launches: Counter[str] = field(default_factory=Counter)  # kernels by operator
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # of the host, by (kind, site, lines)
    messages: dict[tuple[str, str, str], Message] = field(default_factory=dict)  # by (operator, group, site)
    wide_products: Counter[str] = field(default_factory=Counter)  # by site: matrix products of fp32
    host_results: Counter[str] = field(default_factory=Counter)  # by site: bytes that the host computed by itself
    misplaced: Counter[str] = field(default_factory=Counter)  # what is not where it must be
    start: int = 0  # bytes on the device
    peak: int = 0
    end: int = 0
    host_start: int = 0  # bytes of page-locked memory
    host_peak: int = 0
    # Who holds how many bytes at the peak, by the site that made them; known when the phase has ended.
    holders: Counter[str] = field(default_factory=Counter)
    marks: list[tuple[str, int]] = field(default_factory=list)  # (name, launches so far)
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
        """Bytes that the rank sends in groups of these names, those of MatrixOptimizer not counted."""
        others = [(group, sent) for (_, group, site), sent in self.messages.items() if not is_of_matrices(site)]
        return sum(message.sent for group, message in others if group in groups)

    @property
    def of_matrices(self) -> Message:
        """Messages of MatrixOptimizer."""
        found = [message for (_, _, site), message in self.messages.items() if is_of_matrices(site)]
        return sum(found, Message())


@dataclass(frozen=True)
class Matrices:
    """What muon and spectron do in a step, beside the messages of the trace (Phase.of_matrices)."""

    number: int  # of matrices of the stage
    num_launches: int  # kernels of the update of matrices
    planned_launches: float  # planning.step_time's
    expected_sent: float  # bytes that this rank sends, by what DeepSpeed gives every rank
    mean_sent: float  # the same of the mean rank of the stage
    planned_sent: float  # planning.communication's, of the mean rank
    planned_messages: int
    added: int  # bytes of the device beside what is there when the update of matrices begins, at most
    planned_added: float  # planning.memory_state's


@dataclass
class Report:
    """What is known of a layout."""

    layout: str  # its name
    engine: tuple[str, str]  # names of DeepSpeed's engine and optimizer
    num_micro_batches: int  # of a step
    num_blocks: int  # of this rank
    num_parameters: int  # parameters (tensors) of this rank
    misplaced: list[str]  # parameters and buffers that are not on the device
    phases: dict[str, Phase]  # by name; `step` is the second step of training
    # Kernels of a block in the middle, or with ZeRO 3 of the mean block: forward, backward.
    block_launches: tuple[float, float]
    between_launches: int  # kernels between the blocks' backward pass and the next forward pass
    planned_bytes: float  # planning.memory's peak
    planned_sent: dict[str, float]  # planning.communication's bytes of a step: tensor, pipeline, tied, data
    mesh: tuple[int, int, int]  # tensor-parallel, pipeline and data-parallel ranks
    matrices: Matrices | None  # of muon and spectron
    groups: dict[int, int]  # process groups that the rank had a part in creating, by their number of ranks
    results: dict[str, Any] = field(default_factory=dict)  # of the measurements

    @property
    def step(self) -> Phase:
        """The step that stands for all."""
        return self.phases["step"]

    @property
    def launches_per_block(self) -> float:
        """Kernels per block and micro-batch, with those between two micro-batches divided by the blocks."""
        return sum(self.block_launches) + self.between_launches / self.num_blocks
