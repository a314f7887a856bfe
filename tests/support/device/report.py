"""What a traced subprocess reports, and its way through JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.support.device.expected import is_flow_control


@dataclass
class PhaseReport:
    """One phase of a traced rank (tracing.Phase), with keys as text.

    Attributes:
        start, peak, end: Bytes on the device.
        host_start, host_peak: Bytes of page-locked memory.
        num_launches: Kernels.
        launches: The same by operator.
        waits: [kind, site, lines, number].
        messages: [operator, group, site, number, bytes sent].
        wide_products: By site.
        host_results: By site, bytes.
        misplaced: By description.
        holders: By site, bytes at the peak; the largest.
    """

    start: int
    peak: int
    end: int
    host_peak: int
    num_launches: int
    launches: dict[str, int]
    waits: list[tuple[str, str, str, int]]
    messages: list[tuple[str, str, str, int, float]]
    wide_products: dict[str, int]
    host_results: dict[str, int]
    misplaced: dict[str, int]
    holders: dict[str, int]
    host_start: int = 0

    @property
    def num_waits(self) -> int:
        """How often the host waits for the device, without flow control."""
        return sum(number for kind, site, _, number in self.waits if not is_flow_control(kind, site))

    @property
    def num_flow_control(self) -> int:
        """How often the host waits because it is too far ahead (expected.FLOW_CONTROL), if the device is behind."""
        return sum(number for kind, site, _, number in self.waits if is_flow_control(kind, site))

    def sent(self, *groups: str) -> float:
        """Bytes that the rank sends in groups of these names."""
        return sum(sent for _, group, _, _, sent in self.messages if group in groups)


@dataclass
class Report:
    """What is known of a layout.

    Attributes:
        layout: Its name.
        engine: Names of DeepSpeed's engine and optimizer.
        seconds: Of the subprocess, by part.
        num_micro_batches: Of a step.
        num_blocks: Of this rank.
        num_parameters: Parameters (tensors) of this rank.
        misplaced: Parameters and buffers that are not on the device.
        phases: By name; `step` is the second step of training.
        block_launches: Kernels of a block in the middle, or with ZeRO 3 of the mean block: forward, backward.
        between_launches: Kernels between the blocks' backward pass and the next forward pass.
        micro_batch_launches: Kernels of a micro-batch in the middle of the step.
        planned_bytes: planning.memory's peak.
        planned_sent: planning.communication's bytes of a step: tensor, pipeline, tied, data.
        mesh: Tensor-parallel, pipeline and data-parallel ranks.
        groups: Process groups that the rank had a part in creating, by their number of ranks.
        results: Of the measurements.
    """

    layout: str
    engine: tuple[str, str]
    seconds: dict[str, float]
    num_micro_batches: int
    num_blocks: int
    num_parameters: int
    misplaced: list[str]
    phases: dict[str, PhaseReport]
    block_launches: tuple[float, float]
    between_launches: int
    micro_batch_launches: int
    planned_bytes: float
    planned_sent: dict[str, float]
    mesh: tuple[int, int, int]
    groups: dict[str, int]
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> PhaseReport:
        """The step that stands for all."""
        return self.phases["step"]

    @property
    def launches_per_block(self) -> float:
        """Kernels per block and micro-batch, with those between two micro-batches divided by the blocks."""
        return sum(self.block_launches) + self.between_launches / self.num_blocks

    def to_json(self) -> str:
        """The report in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse."""
        values = json.loads(text)
        values["phases"] = {name: PhaseReport(**phase) for name, phase in values["phases"].items()}
        values["mesh"] = tuple(values["mesh"])
        return cls(**values)
