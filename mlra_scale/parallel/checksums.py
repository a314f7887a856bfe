"""Fingerprints of what a rank computes and holds, by which silent data corruption is found.

They are checksums of bits (model/bit_checksum.py): no single flip is missed, and several are missed with a chance of
about 2^-32. Where a device does not repeat its results bit by bit,
the L2 norm stands in for the checksum, and is compared within a bound.

What a pass computes is recorded at four places of every rank:
FORWARD: the output of the rank's module (the hidden state that a pipeline stage sends, or the loss), and the loss.
BACKWARD: the gradients of its parameters, micro-batch by micro-batch, before they are added up or summed over data
ranks, and the gradient that a pipeline stage sends back.
REDUCED: the gradients that its update would use, summed over micro-batches and data ranks.
PROPOSED: loss and gradient norm, summed over all ranks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlra_scale.model.bit_checksum import bit_checksum
from mlra_scale.parallel.master import MasterView
from mlra_scale.parallel.step import UpdateProposal

FORWARD, BACKWARD, REDUCED, PROPOSED = range(4)
_MULTIPLIER = 6364136223846793005
"""Joins checksums in order; any odd number would do (this one: Knuth, The Art of Computer Programming, sec. 3.3.4)."""


def joined(total: Tensor, values: Tensor) -> Tensor:
    """Returns the checksum of what `total` (int64, one number) stands for, followed by the values."""
    return total * _MULTIPLIER + bit_checksum(values).to(total.device)


def checksum_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Returns the checksum of several tensors in their order, one int64 number on `device`."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for values in tensors:
        total = joined(total, values)
    return total


class StateNote:
    """A checksum of the weights and the optimizer state of a rank, to be compared before their next use.

    It covers the fp32 weights that the optimizer updates, its moments, and the weights that the model computes with.
    """

    def __init__(self, view: MasterView, device: torch.device) -> None:
        self._view, self._device = view, device
        self._noted: Tensor | None = None

    @property
    def is_taken(self) -> bool:
        """Whether there is something to compare with; the same on every rank."""
        return self._noted is not None

    def take(self) -> None:
        """Notes the present state."""
        self._noted = checksum_of(self._view.state(), self._device)

    def drop(self) -> None:
        """Forgets what was noted, because the state is changed on purpose."""
        self._noted = None

    def difference(self) -> Tensor:
        """Compares the state with what was noted, and drops that; one int64 number, zero where nothing has changed."""
        assert self._noted is not None
        noted, self._noted = self._noted, None
        return checksum_of(self._view.state(), self._device) - noted


class PassRecorder:
    """Records fingerprints of passes while it is started; otherwise it costs nothing."""

    def __init__(self, module: nn.Module, view: MasterView, device: torch.device) -> None:
        self._module, self._view, self._device = module, view, device
        self._handles: list[RemovableHandle] = []
        self._passes: list[Tensor] = []
        self._is_exact = True
        self._totals: list[Tensor] = []

    def start(self, is_exact: bool) -> None:
        """Begins to record: checksums, or L2 norms where a device does not repeat its results bit by bit."""
        assert not self._handles
        self._is_exact = is_exact
        self._clear()
        self._handles = [
            self._module.register_forward_pre_hook(self._see_inputs),
            self._module.register_forward_hook(self._see_outputs),
        ]
        self._handles += [parameter.register_hook(self._see_gradient) for parameter in self._view.named.values()]

    def end_pass(self, loss: Tensor, proposal: UpdateProposal) -> None:
        """Notes what a pass has computed, while its reduced gradients exist.

        Args:
            loss: The sum of this rank's losses, as in Engine._local_loss.
            proposal: Loss and gradient norm over all ranks, as this one has received them.
        """
        if not self._handles:
            return
        self._add(FORWARD, loss)
        self._add(PROPOSED, torch.tensor([proposal.loss, proposal.gradient_norm], dtype=torch.float64))
        for fragment in self._view.gradients():
            self._add(REDUCED, fragment.values)
        found = torch.stack(self._totals)
        self._passes.append(found if self._is_exact else found.sqrt())
        self._clear()

    def stop(self) -> Tensor:
        """Ends recording; returns [passes, 4]: int64 checksums, or float64 norms, of all passes since the start."""
        passes = torch.stack(self._passes)
        self.drop()
        return passes

    def drop(self) -> None:
        """Ends recording without a result."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._passes = [], []

    def _clear(self) -> None:
        dtype = torch.int64 if self._is_exact else torch.float64
        self._totals = [torch.zeros((), dtype=dtype, device=self._device) for _ in range(4)]

    @torch.no_grad()
    def _add(self, place: int, values: Tensor) -> None:
        if self._is_exact:
            self._totals[place] = joined(self._totals[place], values)
        else:
            square = torch.linalg.vector_norm(values.detach(), dtype=torch.float64).square()
            self._totals[place] = self._totals[place] + square.to(self._device)

    def _see_inputs(self, module: nn.Module, arguments: Any) -> None:
        """Registers a hook on the gradient of the hidden state that a stage has received."""
        hidden = _hidden_in(arguments)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(self._see_gradient)

    def _see_outputs(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        hidden = _hidden_in(outputs)
        if hidden is not None:
            self._add(FORWARD, hidden)

    def _see_gradient(self, gradient: Tensor) -> None:
        self._add(BACKWARD, gradient)


def _hidden_in(values: Any) -> Tensor | None:
    """Returns the hidden state, or the loss, among what a module takes or returns: its first floating-point tensor."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    found = (_hidden_in(value) for value in values)
    return next((value for value in found if value is not None), None)
