"""A copy of a rank's fragments in host memory, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mlra_scale.checkpoint.contents import PARTS, tensor_key
from mlra_scale.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from mlra_scale.parallel.fragments import Fragment

Named = list[tuple[str, torch.Tensor]]


def named_parts(fragments: Sequence[Fragment]) -> Named:
    """Returns the tensors of fragments under the names that they have in a file: all weights, then all moments."""
    found: Named = []
    for part, attribute in zip(PARTS, ("values", "exp_avg", "exp_avg_sq"), strict=True):
        for fragment in fragments:
            if (tensor := getattr(fragment, attribute)) is not None:
                found.append((tensor_key(part, fragment.name, fragment.start), tensor.detach()))
    return found


class HostMemory:
    """Host memory that is taken at the first snapshot and used again for every later one."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def copy(self, tensors: Named) -> Named:
        """Copies fp32 tensors. From a GPU the copies are on their way when this returns (see `Arrival`).

        Raises:
            CheckpointError: There is not enough memory.
        """
        numel = sum(tensor.numel() for _, tensor in tensors)
        if self._buffer.numel() < numel:
            self._buffer = torch.empty(0)  # the old one goes before the new one comes
            is_pinned = any(tensor.is_cuda for _, tensor in tensors)
            try:
                self._buffer = torch.empty(numel, dtype=torch.float32, pin_memory=is_pinned)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{4e-9 * numel:.3g} GB of host memory for a copy of weights and moments are not to be had "
                    f"({str(error).splitlines()[0]}); set checkpoint.asynchronous=false, which needs no copy"
                ) from error
        copies: Named = []
        position = 0
        for name, tensor in tensors:
            copy = self._buffer[position : position + tensor.numel()]
            copy.copy_(tensor, non_blocking=True)
            copies.append((name, copy))
            position += tensor.numel()
        return copies


class Arrival:
    """The moment from which on all copies that have been started are complete."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Waits for it."""
        if self._event is not None:
            self._event.synchronize()
