"""The engine: a model that trains on a mesh of ranks, whatever library runs its passes.

`Engine` is what the rest of the project sees; what differs between the two kinds is in zero_engine.py and
pipeline_engine.py, and what differs between DeepSpeed's optimizers in master.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlra_scale.config import BatchPlan, Config, deepspeed_config, zero_stage
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.spectral import load_vectors, spectral_norms, stored_vectors
from mlra_scale.model.update_rules import update_rules
from mlra_scale.parallel.checksums import PassRecorder, StateNote
from mlra_scale.parallel.factor_norms import FactorNorms
from mlra_scale.parallel.fragments import Fragment, scale_rows
from mlra_scale.parallel.master import (
    Bf16View,
    MasterView,
    ReplicatedView,
    clipping_factor,
    grow_loss_scale_after_update,
    master_view,
)
from mlra_scale.parallel.matrix_optimizer import MatrixOptimizer
from mlra_scale.parallel.step import BeforeUpdate, Between, MicroBatch, StepResult, UpdateProposal
from mlra_scale.parallel.topology import Topology

_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's dynamic loss scaler; the rest of it is configuration."""


class Engine(ABC):
    """A model that trains on a mesh of ranks. Its methods are called on every rank alike.

    Attributes:
        module: This rank's module (a pipeline stage or the whole model).
        rules: How each parameter is updated.
        adam_begun_at: After how many updates of the run AdamW of a parameter began, of those where that is not 0: its
            optimizer was another one until then. AdamW counts its updates from there.
        num_skipped: Updates left out so far, overflows included.
        recorder: Records fingerprints of passes, where it is started.
        state_note: Finds changes of weights and optimizer state that no update has made.
        deepspeed_engine: DeepSpeed's engine, whose `optimizer.step` is replaced by the gated update.
        before_change: Called before weights or moments change; it may wait. A save that still reads them sets it, and
            clears it afterwards; None: there is none.
    """

    module: nn.Module
    recorder: PassRecorder
    state_note: StateNote
    deepspeed_engine: Any
    before_change: Callable[[], None] | None = None
    _view: MasterView

    def __init__(self, config: Config, plan: BatchPlan, topology: Topology, adam_begun_at: Mapping[str, int]) -> None:
        self.config = config
        self.plan = plan
        self.topology = topology
        self.table = ParameterTable(config.model)
        self.rules = update_rules(config.model, config.optim)
        self.adam_begun_at = self._built_for = adam_begun_at
        self.num_skipped = 0
        self._learning_rate = 0.0
        self._settings = deepspeed_config(config, plan)
        if zero_stage(config) == 0:
            self._settings["gradient_clipping"] = 0.0  # see ReplicatedView.update
        self._before_update: BeforeUpdate | None = None
        self._wants_stop: Callable[[], bool] | None = None
        self._is_stop_wanted = False
        self._proposal: UpdateProposal | None = None
        self._was_applied = False
        self._has_update = True

    def _install(self, deepspeed_engine: Any, named: dict[str, nn.Parameter], tied_copies: frozenset[str]) -> None:
        """Adopts an initialized DeepSpeed engine with this rank's parameters, of which another stage owns some."""
        self.deepspeed_engine = deepspeed_engine
        self.module = deepspeed_engine.module
        if self.config.train.precision == "fp16":
            grow_loss_scale_after_update(deepspeed_engine.optimizer)
        self._view = master_view(deepspeed_engine.optimizer, named, self.topology.data_rank, self.topology.device)
        if isinstance(self._view, ReplicatedView | Bf16View) and self.topology.data == 1:
            # DeepSpeed would copy all gradients into one buffer, to reduce them over a single rank.
            deepspeed_engine.enable_backward_allreduce = False
            deepspeed_engine.pipeline_enable_backward_allreduce = False
        self.recorder = PassRecorder(self.module, self._view, self.topology.device)
        self.state_note = StateNote(self._view, self.topology.device)
        self._tied_copies = tied_copies
        self._spectral_norms = spectral_norms(self.module)
        self._matrix_optimizer = self._build_matrix_optimizer(named)
        self._initial_loss_scaler = self._loss_scaler_state()
        deepspeed_engine.optimizer.step = self._gated_update
        for name, parameter in named.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            assert tuple(shape) == self.table[name].local_shape(self.topology.tensor), (name, tuple(shape))

    def _build_matrix_optimizer(self, named: Mapping[str, nn.Parameter]) -> MatrixOptimizer | None:
        rules = {name: self.rules[name] for name in self.table if name in named}
        if all(rule.is_adamw for rule in rules.values()):
            return None
        held = {each.name: (each.start, each.values.numel()) for each in self._view.weights(with_moments=False)}
        return MatrixOptimizer(
            self.config, self.table, self.topology, rules, held, self.owns, self._view.is_replicated_over_data
        )

    # Training and evaluation.

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
            wants_stop: Asked on every rank before the update. The result tells all ranks whether any of them said yes;
                it changes nothing in the step.
        """
        self._before_update, self._wants_stop = before_update, wants_stop
        self._learning_rate = learning_rate
        for group in self.deepspeed_engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        loss_scale = self._loss_scale()
        proposal = self._pass(batches, None)
        for norm in self._spectral_norms:
            norm.advance()
        self.num_skipped += not self._was_applied
        is_overflow = loss_scale is not None and not proposal.is_finite
        return StepResult(
            proposal.loss, proposal.gradient_norm, self._was_applied, is_overflow, loss_scale, self._is_stop_wanted
        )

    def gradient_norm(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """Returns the L2 norm of the gradient of the mean loss over these micro-batches of all data ranks; collective.

        The pass is that of a training step (with its dropout) without an update: weights, moments, loss scale and
        `num_skipped` stay as they are. The norm is not finite if fp16 gradients overflow at the current loss scale.

        Args:
            batches: As many micro-batches as gradients are accumulated over.
            between: See eval_batch. After a pass that it ended, the engine can be saved, but not train.
        """
        self._wants_stop = None
        self._has_update = False
        try:
            return self._pass(batches, between).gradient_norm
        finally:
            self._has_update = True
            self._forget_spectral_norms()  # the next pass computes them itself: so it can be compared with this one

    def _pass(self, batches: Sequence[MicroBatch], between: Between | None) -> UpdateProposal:
        assert len(batches) == self.plan.accumulation_steps, (len(batches), self.plan.accumulation_steps)
        self._run(batches, between)
        assert self._proposal is not None
        return self._proposal

    @abstractmethod
    def _run(self, batches: Sequence[MicroBatch], between: Between | None) -> None:
        """Forward and backward over the micro-batches, gradient reduction, gated update."""

    @abstractmethod
    def eval_batch(self, batches: Sequence[MicroBatch], between: Between | None = None) -> float:
        """Returns the mean loss over all ranks' micro-batches, without dropout; the same on every rank.

        Args:
            batches: This data rank's micro-batches.
            between: Called equally often on every rank, before every micro-batch (in a pipeline: before every step of
                its schedule). It may be collective, and may raise on all ranks alike to end the pass.
        """

    @abstractmethod
    def _local_loss(self) -> torch.Tensor:
        """Sum of this rank's micro-batch losses where it counts (one rank per data shard), else zero."""

    @torch.no_grad()
    def _propose(self) -> UpdateProposal:
        """The one reduction and host read of a step: global loss, gradient norm, and whether a rank wants to stop."""
        values = [fragment.values for fragment in self._view.gradients() if self.owns(fragment.name)]
        squares = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        if values:
            norms = torch.stack(torch._foreach_norm(values, dtype=torch.float32))
            squares = (norms.to(squares) / (self._loss_scale() or 1.0)).square().sum()
        wants_stop = self._wants_stop is not None and self._wants_stop()
        stop = torch.full_like(squares, float(wants_stop))  # a fill, where torch.tensor would be a copy that waits
        num_micro_batches = self.plan.accumulation_steps * self.plan.data
        packed = torch.stack([self._local_loss().double() / num_micro_batches, squares, stop])
        dist.all_reduce(packed)
        loss, square, num_stops = packed.tolist()
        self._is_stop_wanted = num_stops > 0
        return UpdateProposal(loss, square**0.5)

    def _gated_update(self) -> None:
        """Stands in for DeepSpeed's optimizer.step: decides, on the same numbers on every rank, and then updates."""
        self._proposal = proposal = self._propose()
        self.recorder.end_pass(self._local_loss(), proposal)
        if not self._has_update:
            self._view.skip_update()
            return
        limit = self.config.optim.grad_clip
        is_finite = proposal.is_finite
        if not is_finite and self.config.train.precision == "fp16":
            self._view.update(math.inf, limit)  # lowers the loss scale instead
            self._was_applied = False
            return
        is_wanted = self._before_update is None or self._before_update(proposal)
        self._was_applied = is_finite and is_wanted
        if not self._was_applied:
            self._view.skip_update()
            return
        self._announce_change()
        if self._matrix_optimizer is not None:
            self._view.adam.create_momentum()
            masters = {each.name: each for each in self._view.weights(with_moments=True)}
            factor = clipping_factor(proposal.gradient_norm, limit) / (self._loss_scale() or 1.0)
            self._matrix_optimizer.update(masters, self._view.gradients(), factor, self._learning_rate)
        self._view.update(proposal.gradient_norm, limit)

    def _announce_change(self) -> None:
        if self.before_change is not None:
            self.before_change()

    def _on_device(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies tensors of a batch to the device, from pinned memory, so that the host does not wait for it."""
        device = self.topology.device
        if device.type == "cuda":
            tensors = tuple(tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors)
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

    # Weights and gradients, as fragments of the global tensors.

    def owns(self, name: str) -> bool:
        """Returns whether this rank owns the elements of a parameter that it holds."""
        if name in self._tied_copies:
            return False
        if self.table[name].shard_dim is None and self.topology.tensor_rank != 0:
            return False
        return not self._view.is_replicated_over_data or self.topology.data_rank == 0

    def held_fragments(self, with_moments: bool = False) -> list[Fragment]:
        """Returns all fragments that this rank holds, those that other ranks own included: views, not copies."""
        return list(self._view.weights(with_moments))

    def owned_fragments(self, with_moments: bool = False) -> list[Fragment]:
        """Returns this rank's share of the fp32 weights: each element of each tensor has exactly one owner.

        Tensor rank 0 owns a weight that all tensor ranks hold, the first pipeline stage owns the tied embedding, and
        data rank 0 owns what ZeRO does not shard. There are no moments before the first update.
        """
        return [fragment for fragment in self._view.weights(with_moments) if self.owns(fragment.name)]

    def owned_gradients(self) -> Iterator[Fragment]:
        """Yields this rank's share of the gradient of the mean loss (unclipped, unscaled); only in before_update.

        One at a time: where gradients are converted, there is never a second copy of all of them.
        """
        scale = self._loss_scale()
        for fragment in self._view.gradients():
            if self.owns(fragment.name):
                yield Fragment(fragment.name, fragment.start, _unscaled(fragment.values, scale))

    @torch.no_grad()
    def scale_rows(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Multiplies rows of weights in fp32 and copies them to the model; moments stay. Collective.

        Args:
            factors: By parameter, one number per row of the global tensor (per element, of a vector), on the host. The
                same on every rank; a rank ignores parameters that it does not hold. Of parameters sharded by rows only.
        """
        self._announce_change()
        for fragment in self._view.weights(with_moments=False):
            if fragment.name not in factors:
                continue
            info = self.table[fragment.name]
            assert info.shard_dim == 0, fragment.name
            mine = factors[fragment.name].chunk(self.topology.tensor)[self.topology.tensor_rank]
            scale_rows(fragment, math.prod(info.shape[1:]), mine)
        self._view.copy_masters_to_model()
        self._weights_have_changed()

    def _weights_have_changed(self) -> None:
        """Drops what was found from the weights before something else than an update changed them."""
        self.state_note.drop()
        self._forget_spectral_norms()

    def _forget_spectral_norms(self) -> None:
        for norm in self._spectral_norms:
            norm.found = None

    # What a checkpoint holds.

    def training_state(self) -> dict[str, Any]:
        """Returns what continues a run besides weights and moments; the same on every rank, and fit for JSON.

        Returns:
            optimizer_step: Updates that the moments have seen. adam_begun_at: See Engine. num_skipped: Updates left
            out. loss_scaler: State of the fp16 loss scale, else None.
        """
        return {
            "optimizer_step": self._view.adam.step(),
            "adam_begun_at": dict(self.adam_begun_at),
            "num_skipped": self.num_skipped,
            "loss_scaler": self._loss_scaler_state(),
        }

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns the vectors of power iterations, of sigmaReparam and spectron: all of them on rank 0; collective."""
        # Not by what this stage has: optim.rules may give factors of another stage alone to spectron.
        if not self.config.model.sigma_reparam and all(rule.optimizer != "spectron" for rule in self.rules.values()):
            return {}
        norms, topology = self._factor_norms, self.topology
        is_first_copy = topology.tensor_rank == 0 and topology.data_rank == 0
        mine = stored_vectors(self._spectral_norms) if is_first_copy else {}
        if is_first_copy and norms is not None:
            mine |= norms.stored_vectors()
        gathered: list[Any] | None = [None] * topology.world_size if topology.rank == 0 else None
        dist.gather_object(mine, gathered, dst=0, group=topology.control_group)
        return {name: vector for part in gathered or [mine] for name, vector in part.items()}

    def load_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Loads what `buffers` returned on rank 0 in any layout."""
        load_vectors(self._spectral_norms, buffers)
        if self._factor_norms is not None:
            self._factor_norms.load_vectors(buffers)

    @property
    def _factor_norms(self) -> FactorNorms | None:
        return None if self._matrix_optimizer is None else self._matrix_optimizer.norms

    @torch.no_grad()
    def restore(self, fill: Callable[[Fragment], None], state: dict[str, Any] | None, with_moments: bool) -> None:
        """Replaces weights and optimizer state, of a new engine or one that has trained; collective.

        Training then continues as if it had never stopped. None of DeepSpeed's own counters matters for it.

        Args:
            fill: Writes new values into every fragment that this rank holds, moments included where it has them.
            state: What `training_state` returned, `adam_begun_at` such that `has_counts_for` is true; None for a start
                at step 0 with these weights.
            with_moments: Whether the moments come back too; without them the optimizer starts anew.
        """
        assert state is not None or not with_moments
        self._announce_change()
        self.adam_begun_at = state["adam_begun_at"] if state is not None and with_moments else {}
        if with_moments:
            self._view.adam.create()
        else:
            self._view.forget_moments()
            if self._factor_norms is not None:
                self._factor_norms.load_vectors({})
        for fragment in self._view.weights(with_moments):
            fill(fragment)
        if state is not None and with_moments:
            begun = dict(self._counts_for(self.adam_begun_at))
            self._view.adam.set_step(state["optimizer_step"], begun)
        self.num_skipped = state["num_skipped"] if state is not None else 0
        if self._initial_loss_scaler is not None:
            stored = state["loss_scaler"] if state is not None else None
            vars(self.deepspeed_engine.optimizer.loss_scaler).update(stored or self._initial_loss_scaler)
        self._view.copy_masters_to_model()
        self._weights_have_changed()

    def has_counts_for(self, adam_begun_at: Mapping[str, int]) -> bool:
        """Returns whether parameters whose updates this engine counts together began together, too."""
        pairs = self._counts_for(adam_begun_at)
        return len(pairs) == len({built for built, _ in pairs})

    def _counts_for(self, adam_begun_at: Mapping[str, int]) -> set[tuple[int, int]]:
        """For AdamW's parameters: when they began in the state that the engine was built for, and in another one."""
        names = [name for name, rule in self.rules.items() if rule.is_adamw]
        return {(self._built_for.get(name, 0), adam_begun_at.get(name, 0)) for name in names}

    def _loss_scaler_state(self) -> dict[str, Any] | None:
        if self.config.train.precision != "fp16":
            return None
        scaler = self.deepspeed_engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in _LOSS_SCALER_STATE}

    def _loss_scale(self) -> float | None:
        if self.config.train.precision != "fp16":
            return None
        return float(self.deepspeed_engine.optimizer.loss_scale)


def _unscaled(gradient: torch.Tensor, scale: float | None) -> torch.Tensor:
    """A gradient in fp32; without a name in the caller, which would keep it while it converts the next one."""
    return gradient.float() if scale is None else gradient.float() / scale
