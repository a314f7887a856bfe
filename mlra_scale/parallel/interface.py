"""The interface that both engines offer.

Everything above it (loop, stability, checkpoints) does not know which engine it talks to.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mlra_scale.model.parameters import ParameterTable
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.topology import Topology


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
    """What is known right before an optimizer update; the same numbers on every rank.

    Attributes:
        loss: Mean loss of the global batch.
        gradient_norm: Global L2 norm of its gradient, before clipping.
    """

    loss: float
    gradient_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether neither number is infinite or NaN."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class StepResult:
    """What a training step did; the same on every rank.

    Attributes:
        loss: Mean loss of the global batch before the update.
        gradient_norm: Global L2 norm of its gradient, before clipping.
        applied: Whether the weights were updated.
        overflow: Whether fp16 gradients overflowed, so that the loss scale was lowered instead of an update.
        loss_scale: fp16 loss scale used in this step, else None.
        is_stop_wanted: Whether some rank wanted to stop after this step.
    """

    loss: float
    gradient_norm: float
    applied: bool
    overflow: bool
    loss_scale: float | None
    is_stop_wanted: bool = False


BeforeUpdate = Callable[[UpdateProposal], bool]
Between = Callable[[], None]


class Engine(Protocol):
    """A model that trains on a mesh of ranks.

    Attributes:
        table: The parameter table.
        topology: The mesh.
        module: This rank's module (a pipeline stage or the whole model).
        num_skipped: Updates left out so far, overflows included.
    """

    table: ParameterTable
    topology: Topology
    module: nn.Module
    num_skipped: int

    def train_batch(
        self,
        batches: Sequence[MicroBatch],
        learning_rate: float,
        before_update: BeforeUpdate | None = None,
        wants_stop: Callable[[], bool] | None = None,
    ) -> StepResult:
        """Runs one step over this data rank's micro-batches.

        Args:
            batches: As many micro-batches as gradients are accumulated over.
            learning_rate: Learning rate of this update.
            before_update: Called on every rank with the same proposal; False leaves the update out on all ranks. Not
                called when fp16 gradients overflow: the update is then left out, and the loss scale lowered.
            wants_stop: Asked on every rank before the update; one that says yes is enough for all to learn of it. It
                changes nothing in the step.
        """
        ...

    def eval_batch(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """Returns the mean loss over all ranks' micro-batches, without dropout; the same on every rank.

        Args:
            batches: This data rank's micro-batches.
            between: Called on every rank, as often on each, before every micro-batch (in a pipeline: before every step
                of its schedule). It may be collective, and may raise on all ranks alike to give the pass up.
        """
        ...

    def gradient_norm(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """Returns the L2 norm of the gradient of the mean loss over these micro-batches of all data ranks; collective.

        As in a training step (with its dropout), but there is no update, and nothing is different afterwards: weights,
        moments, loss scale and `num_skipped` are what they were.

        Args:
            batches: As many micro-batches as gradients are accumulated over.
            between: See eval_batch. After a pass that was given up the engine can be saved, but not train.

        Returns:
            The norm, the same on every rank; not finite if fp16 gradients overflow at the loss scale of now.
        """
        ...

    def owned_fragments(self, with_moments: bool = False) -> list[Fragment]:
        """Returns this rank's share of the fp32 weights: each element of each tensor has exactly one owner.

        Replicated over TP: tensor rank 0. Tied: the first stage. ZeRO stage 0: data rank 0. Moments are None before
        the first update.
        """
        ...

    def held_fragments(self, with_moments: bool = False) -> list[Fragment]:
        """Returns all fragments that this rank holds, those that other ranks own included: views, not copies."""
        ...

    def owns(self, name: str) -> bool:
        """Returns whether this rank is the owner of the elements of a parameter that it holds."""
        ...

    def owned_gradients(self) -> Iterator[Fragment]:
        """Yields this rank's share of the gradient of the mean loss (unclipped, unscaled); only in before_update."""
        ...

    def weight_decay(self, name: str) -> float:
        """Returns the weight decay of a parameter."""
        ...

    def scale_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiplies rows of weights, in fp32, and has the model follow; moments stay. Collective.

        Args:
            factors: By parameter, one number per row of the global tensor (per element, of a vector), on the host. The
                same on every rank; what a rank does not hold it passes over. Of parameters sharded by rows only.
        """
        ...

    def training_state(self) -> dict[str, Any]:
        """Returns what continues a run besides weights and moments; the same on every rank, and fit for JSON.

        Returns:
            optimizer_step: Updates that the moments have seen. num_skipped: Updates left out. loss_scaler: State of the
            fp16 loss scale, else None.
        """
        ...

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns small tensors that continue a run besides weights and moments, by name; collective.

        These are the vectors of sigmaReparam's power iterations. Rank 0 gets those of all stages; only its are stored.
        """
        ...

    def load_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `buffers` returned on rank 0, in whatever layout."""
        ...

    def restore(self, fill: Callable[[Fragment], None], state: dict[str, Any] | None, with_moments: bool) -> None:
        """Replaces weights and optimizer state, so that training goes on as if it had never stopped; collective.

        The engine may be new or have trained.

        Args:
            fill: Writes new values into a fragment, moments included where it has them; called for every fragment that
                this rank holds.
            state: What `training_state` returned; None for a start at step 0 with these weights.
            with_moments: Whether the moments come back too; without them the optimizer starts anew.
        """
        ...
