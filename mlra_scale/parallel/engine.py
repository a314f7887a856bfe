"""What the two engines share: the gate before an update, ownership, checkpoints."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlra_scale.config import BatchPlan, Config, deepspeed_config, zero_stage
from mlra_scale.model.low_rank_plan import low_rank_plan
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.spectral import SpectralNorm, load_vectors, spectral_norms, stored_vectors
from mlra_scale.parallel.fragments import Fragment, scale_rows
from mlra_scale.parallel.interface import BeforeUpdate, Between, MicroBatch, StepResult, UpdateProposal
from mlra_scale.parallel.master import Bf16View, MasterView, ReplicatedView, master_view, mend_loss_scaling
from mlra_scale.parallel.optimizer import has_weight_decay
from mlra_scale.parallel.topology import Topology

_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's dynamic loss scaler; the rest of it is configuration."""


def _unscaled(gradient: torch.Tensor, scale: float | None) -> torch.Tensor:
    """A gradient in fp32; without a name in the caller, which would keep it while it converts the next one."""
    return gradient.float() if scale is None else gradient.float() / scale


class EngineBase(ABC):
    """What the two engines share: the gate before an update, ownership, checkpoints."""

    def __init__(self, config: Config, plan: BatchPlan, topology: Topology) -> None:
        self.config = config
        self.plan = plan
        self.topology = topology
        self.table = ParameterTable(config.model, low_rank_plan(config, plan, topology.device.type))
        self.num_skipped = 0
        self.settings = deepspeed_config(config, plan)
        if zero_stage(config) == 0:
            self.settings["gradient_clipping"] = 0.0  # see ReplicatedView.update
        self.deepspeed_engine: Any = None
        self.view: MasterView
        self._before_update: BeforeUpdate | None = None
        self._wants_stop: Callable[[], bool] | None = None
        self._is_stop_wanted = False
        self._proposal: UpdateProposal | None = None
        self._was_applied = False
        self._is_rehearsal = False
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
        if self.config.train.precision == "fp16":
            mend_loss_scaling(deepspeed_engine.optimizer)
        self.view = master_view(deepspeed_engine.optimizer, named, self.topology.data_rank, self.topology.device)
        if isinstance(self.view, ReplicatedView | Bf16View) and self.topology.data == 1:
            # DeepSpeed would copy all gradients into one buffer, to reduce them over a single rank.
            deepspeed_engine.enable_backward_allreduce = False
            deepspeed_engine.pipeline_enable_backward_allreduce = False
        self._tied_copies = tied_copies
        self._spectral_norms = spectral_norms(self.module)
        self._initial_loss_scaler = self._loss_scaler_state()
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

    def owned_gradients(self) -> Iterator[Fragment]:
        """See Engine. One at a time: where they must be converted, the whole gradient is never there twice."""
        scale = self._loss_scale()
        for fragment in self.view.gradients():
            if self.owns(fragment.name):
                yield Fragment(fragment.name, fragment.start, _unscaled(fragment.values, scale))

    def weight_decay(self, name: str) -> float:
        """See Engine."""
        optim = self.config.optim
        return optim.weight_decay if has_weight_decay(self.table[name], optim) else 0.0

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
        self._forget_spectra()

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
        stop = torch.full_like(squares, float(wants_stop))  # a fill, where torch.tensor would be a copy that waits
        packed = torch.stack([self._local_loss().double() / self._num_micro_batches, squares, stop])
        dist.all_reduce(packed)
        loss, square, num_stops = packed.tolist()
        self._is_stop_wanted = num_stops > 0
        return UpdateProposal(loss, square**0.5)

    def _gated_update(self) -> None:
        """Stands in for DeepSpeed's optimizer.step: decides, on the same numbers on every rank, and then updates."""
        self._proposal = proposal = self._propose()
        if self._is_rehearsal:
            self.view.skip_update()
            return
        limit = self.config.optim.grad_clip
        is_finite = proposal.is_finite
        if not is_finite and self.config.train.precision == "fp16":
            self.view.update(math.inf, limit)  # lowers the loss scale instead
            self._was_applied = False
            return
        is_wanted = self._before_update is None or self._before_update(proposal)
        self._was_applied = is_finite and is_wanted
        if self._was_applied:
            self.view.update(proposal.gradient_norm, limit)
        else:
            self.view.skip_update()

    def _on_device(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies tensors of a batch to the device, from pinned memory, so that the host does not wait for it."""
        device = self.topology.device
        if device.type == "cuda":
            tensors = tuple(tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors)
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

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

    def gradient_norm(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """See Engine."""
        assert len(batches) == self.plan.accumulation_steps, (len(batches), self.plan.accumulation_steps)
        self._wants_stop = None
        self._forget_spectra()
        self._is_rehearsal = True
        try:
            self._run(batches, between)
        finally:
            self._is_rehearsal = False
        assert self._proposal is not None
        return self._proposal.gradient_norm

    @abstractmethod
    def _run(self, batches: Sequence[MicroBatch], between: Between | None = None) -> None:
        """Forward and backward over the micro-batches, gradient reduction, gated update."""
