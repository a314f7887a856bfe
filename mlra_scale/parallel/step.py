"""What goes into a training step and what comes out of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class MicroBatch(Protocol):
    """The tensors of one micro-batch (int64; B samples of S tokens), as data.Batch has them."""

    @property
    def tokens_BS(self) -> torch.Tensor: ...
    @property
    def targets_BS(self) -> torch.Tensor: ...
    @property
    def positions_BS(self) -> torch.Tensor: ...
    @property
    def documents_BS(self) -> torch.Tensor: ...
    @property
    def sample_ids_B(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class UpdateProposal:
    """What is known right before an optimizer update; the same numbers on every rank."""

    loss: float  # mean over all tokens of the global batch, in nats, z-loss included
    gradient_norm: float  # global L2 norm of its gradient, before clipping

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class StepResult:
    """What a training step did; the same on every rank."""

    loss: float  # as in UpdateProposal: before the update
    gradient_norm: float  # global L2 norm of its gradient, before clipping
    applied: bool  # whether the weights were updated
    overflow: bool  # whether fp16 gradients overflowed, so that the loss scale was lowered instead of an update
    loss_scale: float | None  # fp16 loss scale used in this step, else None
    is_stop_wanted: bool = False  # whether some rank wanted to stop after this step


BeforeUpdate = Callable[[UpdateProposal], bool]
Between = Callable[[], None]
