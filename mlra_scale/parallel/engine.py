"""The interface that both engines offer, and what they share.

Everything above this interface (loop, stability, checkpoints) does not know which engine it talks to.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from mlra_scale.config import BatchPlan, Config, OptimConfig, deepspeed_config, offload_optimizer, zero_stage
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.spectral import SpectralNorm, load_vectors, spectral_norms, stored_vectors
from mlra_scale.parallel.fragments import Fragment, scale_rows
from mlra_scale.parallel.master import MasterView, ReplicatedView, master_view, mend_loss_scaling
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
        overflow: Whether fp16 gradients overflowed, so that DeepSpeed lowered the loss scale instead of updating.
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

_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's dynamic loss scaler; the rest of it is configuration."""


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
                called when fp16 gradients overflow: DeepSpeed then leaves the update out by itself.
            wants_stop: Asked on every rank before the update; one that says yes is enough for all to learn of it. It
                changes nothing in the step.
        """
        ...

    def eval_batch(self, batches: Sequence[MicroBatch]) -> float:
        """Returns the mean loss over all ranks' micro-batches, without dropout; the same on every rank."""
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

    def owned_gradients(self) -> list[Fragment]:
        """Returns this rank's share of the gradient of the mean loss (unclipped, unscaled); only in before_update."""
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


def parameter_groups(named: dict[str, nn.Parameter], table: ParameterTable, optim: OptimConfig) -> list[dict[str, Any]]:
    """Splits parameters by weight decay: matrices, and by policy factors and embeddings; never biases and norms."""
    decays = {
        "matrix": True,
        "factor": optim.decay_factors,
        "embedding": optim.decay_embedding,
        "positions": optim.decay_embedding,
        "bias": False,
        "norm": False,
    }
    groups = []
    for decay in (True, False):
        members = [parameter for name, parameter in named.items() if decays[table[name].kind] is decay]
        weight_decay = optim.weight_decay if decay else 0.0
        groups.append({"params": members, "weight_decay": weight_decay})
    return [group for group in groups if group["params"]]


def build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or DeepSpeed's CPU one (compiled on first use) when the optimizer is offloaded."""
    optim = config.optim
    if offload_optimizer(config):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


class EngineBase(ABC):
    """What the two engines share: the gate before an update, ownership, checkpoints."""

    def __init__(self, config: Config, plan: BatchPlan, topology: Topology) -> None:
        self.config = config
        self.plan = plan
        self.topology = topology
        self.table = ParameterTable(config.model)
        self.num_skipped = 0
        self.settings = deepspeed_config(config, plan)
        if zero_stage(config) == 0:
            # Left to DeepSpeed, stage 0 clips before the gate, and each pipeline stage by a norm of its own.
            self.settings["gradient_clipping"] = 0.0
        self.deepspeed_engine: Any = None
        self.view: MasterView
        self._before_update: BeforeUpdate | None = None
        self._wants_stop: Callable[[], bool] | None = None
        self._is_stop_wanted = False
        self._proposal: UpdateProposal | None = None
        self._was_applied = False
        self._num_micro_batches = plan.accumulation_steps * plan.data
        self._spectral_norms: list[SpectralNorm] = []

    def _install(self, deepspeed_engine: Any, named: dict[str, nn.Parameter], tied_copies: frozenset[str]) -> None:
        """Adopts a DeepSpeed engine.

        Args:
            deepspeed_engine: The initialized engine.
            named: This rank's parameters by canonical name.
            tied_copies: Those that another stage owns.
        """
        self.deepspeed_engine = deepspeed_engine
        self.module = deepspeed_engine.module
        self.view = master_view(deepspeed_engine.optimizer, named, self.topology.data_rank)
        if not isinstance(self.view, ReplicatedView):  # which clips by itself
            deepspeed_engine.optimizer.clip_grad = self.config.optim.grad_clip
        if zero_stage(self.config) == 0 and self.topology.data == 1:
            # DeepSpeed would copy all gradients into one buffer, to reduce them over a single rank.
            deepspeed_engine.enable_backward_allreduce = False
            deepspeed_engine.pipeline_enable_backward_allreduce = False
        self._tied_copies = tied_copies
        self._spectral_norms = spectral_norms(self.module)
        if self.config.train.precision == "fp16":
            mend_loss_scaling(deepspeed_engine.optimizer)
        self._initial_loss_scaler = self._loss_scaler_state()
        self._update = deepspeed_engine.optimizer.step
        deepspeed_engine.optimizer.step = self._gated_update
        for name, parameter in named.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            assert tuple(shape) == self.table[name].local_shape(self.topology.tensor), (name, tuple(shape))

    def owns(self, name: str) -> bool:
        """See Engine."""
        if name in self._tied_copies:
            return False
        if self.table[name].shard_dim is None and self.topology.tensor_rank != 0:
            return False
        return not self.view.is_replicated_over_data or self.topology.data_rank == 0

    def held_fragments(self, with_moments: bool = False) -> list[Fragment]:
        """See Engine."""
        return list(self.view.weights(with_moments))

    def owned_fragments(self, with_moments: bool = False) -> list[Fragment]:
        """See Engine."""
        return [fragment for fragment in self.view.weights(with_moments) if self.owns(fragment.name)]

    def owned_gradients(self) -> list[Fragment]:
        """See Engine."""
        scale = self._loss_scale() or 1.0
        owned = (fragment for fragment in self.view.gradients() if self.owns(fragment.name))
        return [Fragment(fragment.name, fragment.start, fragment.values.float() / scale) for fragment in owned]

    @torch.no_grad()
    def scale_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """See Engine."""
        for fragment in self.view.weights(with_moments=False):
            if fragment.name not in factors:
                continue
            info = self.table[fragment.name]
            assert info.shard_dim == 0, fragment.name
            mine = factors[fragment.name].chunk(self.topology.tensor)[self.topology.tensor_rank]
            scale_rows(fragment, math.prod(info.shape[1:]), mine)
        self.view.publish()

    def training_state(self) -> dict[str, Any]:
        """See Engine."""
        return {
            "optimizer_step": self.view.adam.step(),
            "num_skipped": self.num_skipped,
            "loss_scaler": self._loss_scaler_state(),
        }

    def buffers(self) -> dict[str, torch.Tensor]:
        """See Engine."""
        if not self.config.model.sigma_reparam:
            return {}
        topology = self.topology
        is_first_copy = topology.tensor_rank == 0 and topology.data_rank == 0
        mine = stored_vectors(self._spectral_norms) if is_first_copy else {}
        gathered: list[Any] | None = [None] * topology.world_size if topology.rank == 0 else None
        dist.gather_object(mine, gathered, dst=0, group=topology.control_group)
        return {name: vector for part in gathered or [mine] for name, vector in part.items()}

    def load_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """See Engine."""
        load_vectors(self._spectral_norms, buffers)

    @torch.no_grad()
    def restore(self, fill: Callable[[Fragment], None], state: dict[str, Any] | None, with_moments: bool) -> None:
        """See Engine. None of DeepSpeed's own counters needs to come back: nothing here depends on them."""
        assert state is not None or not with_moments
        if with_moments:
            self.view.adam.create()
        else:
            self.view.forget_moments()
        for fragment in self.view.weights(with_moments):
            fill(fragment)
        if state is not None and with_moments:
            self.view.adam.set_step(state["optimizer_step"])
        self.num_skipped = state["num_skipped"] if state is not None else 0
        if self._initial_loss_scaler is not None:
            stored = state["loss_scaler"] if state is not None else None
            vars(self.deepspeed_engine.optimizer.loss_scaler).update(stored or self._initial_loss_scaler)
        self.view.publish()
        self._forget_spectra()

    def _forget_spectra(self) -> None:
        """Weights may have changed: the next pass through the model finds their largest singular values anew."""
        for norm in self._spectral_norms:
            norm.forget()

    def _loss_scaler_state(self) -> dict[str, Any] | None:
        if self.config.train.precision != "fp16":
            return None
        scaler = self.deepspeed_engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in _LOSS_SCALER_STATE}

    def _loss_scale(self) -> float | None:
        if self.config.train.precision != "fp16":
            return None
        return float(self.deepspeed_engine.optimizer.loss_scale)

    @abstractmethod
    def _local_loss(self) -> torch.Tensor:
        """Sum of this rank's micro-batch losses where it counts (one rank per data shard), else zero."""

    @torch.no_grad()
    def _propose(self) -> UpdateProposal:
        """The one reduction and host read of a step: global loss, gradient norm, and whether a rank wants to stop."""
        values = [fragment.values for fragment in self.view.gradients() if self.owns(fragment.name)]
        squares = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        if values:
            norms = torch.stack(torch._foreach_norm(values, dtype=torch.float32))
            squares = (norms.to(squares) / (self._loss_scale() or 1.0)).square().sum()
        wants_stop = self._wants_stop is not None and self._wants_stop()
        stop = torch.tensor(float(wants_stop), dtype=torch.float64, device=squares.device)
        packed = torch.stack([self._local_loss().double() / self._num_micro_batches, squares, stop])
        dist.all_reduce(packed)
        loss, square, num_stops = packed.tolist()
        self._is_stop_wanted = num_stops > 0
        return UpdateProposal(loss, square**0.5)

    def _gated_update(self, *args: Any, **kwargs: Any) -> None:
        """Stands in for DeepSpeed's optimizer.step: decides, on the same numbers on every rank, and then updates."""
        self._proposal = proposal = self._propose()
        is_finite = proposal.is_finite
        if not is_finite and self.config.train.precision == "fp16":
            self._update(*args, **kwargs)  # DeepSpeed finds the overflow itself and lowers the loss scale
            self._was_applied = False
            return
        is_wanted = self._before_update is None or self._before_update(proposal)
        self._was_applied = is_finite and is_wanted
        if not self._was_applied:
            self.view.skip_update()
            return
        if isinstance(self.view, ReplicatedView):
            self.view.clip(proposal.gradient_norm, self.config.optim.grad_clip)
        self._update(*args, **kwargs)

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.deepspeed_engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def train_batch(
        self,
        batches: Sequence[MicroBatch],
        learning_rate: float,
        before_update: BeforeUpdate | None = None,
        wants_stop: Callable[[], bool] | None = None,
    ) -> StepResult:
        """See Engine."""
        assert len(batches) == self.plan.accumulation_steps, (len(batches), self.plan.accumulation_steps)
        self._before_update, self._wants_stop = before_update, wants_stop
        self._set_learning_rate(learning_rate)
        self._forget_spectra()
        loss_scale = self._loss_scale()
        self._run(batches)
        for norm in self._spectral_norms:
            norm.advance()
        assert self._proposal is not None
        is_overflow = loss_scale is not None and not self._proposal.is_finite
        self.num_skipped += not self._was_applied
        return StepResult(
            self._proposal.loss,
            self._proposal.gradient_norm,
            self._was_applied,
            is_overflow,
            loss_scale,
            self._is_stop_wanted,
        )

    @abstractmethod
    def _run(self, batches: Sequence[MicroBatch]) -> None:
        """Forward and backward over the micro-batches, gradient reduction, gated update."""
