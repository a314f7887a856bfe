"""What supervises a rank from outside: the node agent of a cluster job, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Watchdog:
    """Does nothing. A cluster job passes a subclass to `train.main`.

    Attributes:
        lock_seconds: How long to wait for another run that still holds the lock of the run directory.
    """

    lock_seconds = 2.0

    def heartbeat(self, phase: str, step: int) -> None:
        """Reports progress; called often, so it must be cheap compared with a step.

        Args:
            phase: What the rank does from now on, such as `training`.
            step: Its present step.
        """

    def check(self, device: torch.device) -> None:
        """Checks all ranks together, once, as soon as they can communicate; collective."""
