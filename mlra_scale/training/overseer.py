"""What looks after a rank from outside: the launcher of a cluster job, or nobody."""

from __future__ import annotations

import torch


class Overseer:
    """Nobody. A launcher that watches its ranks hands its own to `train.main`.

    Attributes:
        lock_seconds: How long to wait for another run that is still in the run directory.
    """

    lock_seconds = 2.0

    def beat(self, doing: str, step: int) -> None:
        """Takes a sign of progress; called often, and must cost nothing that a step would feel.

        Args:
            doing: What the rank begins now, such as `training`.
            step: The step that it is at.
        """

    def check(self, device: torch.device) -> None:
        """Examines the ranks together, once, as soon as they can talk to each other; collective.

        Args:
            device: This rank's device.
        """
