"""What the trace holds the code to, as data: where the host may wait, and how many kernels a block may start.

Numbers are what the code does, rounded up: lower them when it does better.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY_TOLERANCE = 0.02
"""Share by which the traced peak may differ from planning.memory's."""
BYTES_TOLERANCE = 0.01
"""Share by which bytes sent may differ from planning.communication's."""
MAX_WAITS, MAX_WAITS_ZERO_3 = 3, 8
"""Waits of the host in one step, all together: ZeRO 0 to 2 and pipelines, and ZeRO 3 and offload."""


@dataclass(frozen=True)
class Wait:
    """A place where the host may wait for the device.

    Attributes:
        kind: As tracing.Trace names it.
        site: File and function.
        number: How often in a step, at most.
        reason: Why.
    """

    kind: str
    site: str
    number: int
    reason: str


WAITS = (
    Wait(
        "tolist",
        "mlra_scale/parallel/engine.py:EngineBase._propose",
        1,
        "the packed read of a step: loss, gradient norm and the wish to stop, on which finite check, guard and stop "
        "decide",
    ),
    Wait(
        "item",
        "deepspeed/runtime/utils.py:get_flattened_grad_norm",
        1,
        "DeepSpeed reads its own gradient norm, with which it clips",
    ),
)


@dataclass(frozen=True)
class Launches:
    """Kernels that a block may start in one micro-batch, forward and backward, with what lies between micro-batches."""

    per_block: float


LAUNCHES: dict[str, float] = {}
"""Kernels per block and micro-batch, by layout."""
