"""Where DeepSpeed keeps the fp32 weights, moments and gradients: one view per kind of optimizer wrapper.

DeepSpeed 0.19 wraps torch's optimizer in one of several ways, depending on ZeRO stage and precision. Each class below
knows one of them. All of it relies on DeepSpeed's inner attributes and is covered by tests/distributed.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from mlra_scale.parallel.adam import AdamState
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.gradient_sums import GradientSums
from mlra_scale.parallel.host_waits import DeviceOrdered, order_stage2_on_device, order_stage3_on_device

NamedParameters = Mapping[str, nn.Parameter]


class MasterView(ABC):
    """One rank's view of the fp32 training state, ownership among replicas not yet decided.

    `inner` is the optimizer that DeepSpeed's wraps, `masters` its fp32 tensors.
    """

    is_replicated_over_data = False
    """Whether every data rank holds all of it."""

    def __init__(
        self,
        optimizer: Any,
        named: NamedParameters,
        inner: Any,
        masters: Sequence[torch.Tensor],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """`groups`: the parameter group of each master."""
        self.optimizer = optimizer
        self.named = named
        self.adam = AdamState(inner, masters, groups)

    @abstractmethod
    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        """Yields fragments of the fp32 weights (views, not copies), with Adam's moments if requested."""

    @abstractmethod
    def gradients(self) -> Iterator[Fragment]:
        """Yields fragments of the reduced gradient, unclipped and times the loss scale.

        They exist only between the reduction and the update, that is within `Engine._gated_update`. Their dtype is that
        in which DeepSpeed keeps them.
        """

    @abstractmethod
    def update(self, gradient_norm: float, limit: float) -> None:
        """Updates the weights. DeepSpeed would find the norm itself: by more kernels, sums over ranks and host reads.

        Args:
            gradient_norm: Global L2 norm of the gradient, without the loss scale. Where it is not finite (fp16), the
                loss scale is lowered instead.
            limit: The gradient is scaled down to this norm; 0: never.
        """

    def skip_update(self) -> None:  # noqa: B027
        """Drops the gradients so that no update takes place; weights, moments and loss scale stay as they are.

        By default nothing is to be done: DeepSpeed's engine zeroes the gradients after every step.
        """

    def state(self) -> Iterator[torch.Tensor]:
        """Yields all that the next pass and the next update read: fp32 weights, moments, and the model's weights."""
        for master in self.adam.masters:
            yield master
            yield from (values for values in self.adam.of(master).values() if torch.is_tensor(values))
        yield from self._model_weights()

    def _model_weights(self) -> Iterator[torch.Tensor]:
        yield from self.named.values()

    def forget_moments(self) -> None:
        self.adam.forget()

    @abstractmethod
    def copy_masters_to_model(self) -> None:
        """Gives the model the changed fp32 weights in its own precision; collective."""


def master_view(optimizer: Any, named: NamedParameters, data_rank: int, device: torch.device) -> MasterView:
    """Returns the view that fits `engine.optimizer` of DeepSpeed; also mends what that does (see the classes)."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if device.type == "cuda":
            order_stage3_on_device(optimizer)
        return Stage3View(optimizer, named, data_rank)
    if isinstance(optimizer, BF16_Optimizer):
        return Bf16View(optimizer, named)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        if device.type == "cuda":
            order_stage2_on_device(optimizer)
        return PartitionedView(optimizer, named)
    assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
    return ReplicatedView(optimizer, named)


def grow_loss_scale_after_update(optimizer: Any) -> None:
    """Corrects DeepSpeed's fp16 loss scaling (ZeRO 1 to 3) in two respects.

    DeepSpeed increases the scale before it divides the gradients by it, so that one update in a thousand would take
    half its gradient: here the scale grows after the update. And many overflows in a row are judged by the trainer
    (`train.max_consecutive_overflows`), not by an exception inside DeepSpeed.
    """
    optimizer.loss_scaler.raise_error_at_min_scale = False
    update_scale, step = optimizer._update_scale, optimizer.step

    def update_scale_on_overflow(has_overflow: bool) -> None:
        if has_overflow:
            update_scale(True)

    def step_then_grow(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        if not optimizer.overflow:
            update_scale(False)

    optimizer._update_scale = update_scale_on_overflow
    optimizer.step = step_then_grow


class ReplicatedView(MasterView):
    """ZeRO stage 0 in fp32: every data rank holds everything, and the masters are the parameters themselves."""

    is_replicated_over_data = True

    def __init__(self, optimizer: torch.optim.Optimizer, named: NamedParameters) -> None:
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        super().__init__(optimizer, named, optimizer, masters, groups)
        self._step = optimizer.step

    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        for name, parameter in self.named.items():
            state = self.adam.of(parameter) if with_moments else {}
            yield Fragment(name, 0, parameter.detach().view(-1), *_moments(state, 0, parameter.numel()))

    def gradients(self) -> Iterator[Fragment]:
        for name, parameter in self.named.items():
            assert parameter.grad is not None, name
            yield Fragment(name, 0, parameter.grad.view(-1))

    def update(self, gradient_norm: float, limit: float) -> None:
        """See MasterView. DeepSpeed would clip before the gate, and each pipeline stage by a norm of its own."""
        _clip([parameter.grad for parameter in self.named.values() if parameter.grad is not None], gradient_norm, limit)
        self._step()

    def copy_masters_to_model(self) -> None:
        """The model computes with the masters."""

    def _model_weights(self) -> Iterator[torch.Tensor]:
        return iter(())


class _MappedView(MasterView):
    """What ZeRO 1 and 2 have in common: flat fp32 partitions, split over data ranks."""

    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        for name, mapping in self._mappings():
            where = mapping.hp_fragment_address
            state = self.adam.of(self.adam.masters[mapping.param_group_index]) if with_moments else {}
            moments = _moments(state, where.start, where.numel)
            yield Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach(), *moments)

    def gradients(self) -> Iterator[Fragment]:
        groups: dict[int, _FlatGradients] = {}
        for name, mapping in self._mappings():
            group, where = mapping.param_group_index, mapping.hp_fragment_address
            if group not in groups:
                groups[group] = _FlatGradients(self._flat_gradients(group))
            yield Fragment(name, mapping.lp_fragment_address.start, groups[group].narrow(where.start, where.numel))

    def forget_moments(self) -> None:
        super().forget_moments()
        # DeepSpeed's own views of the moments, made after the first update, would keep them alive.
        for _, mapping in self._mappings():
            mapping.optim_fragment = None
        self.optimizer._hp_optimizer_states_linked = False

    def copy_masters_to_model(self) -> None:
        self.optimizer.update_lp_params()

    def _mappings(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.named.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                yield name, mapping

    @abstractmethod
    def _flat_gradients(self, group: int) -> list[torch.Tensor]:
        """The group's gradient partition as consecutive pieces."""


class Bf16View(_MappedView):
    """bf16 with ZeRO 1: micro-batches add up in flat fp32 buffers of all of the rank's parameters.

    DeepSpeed's optimizer holds the buffers, reduces them and gathers the weights; adding up (GradientSums) and the
    update are done here.
    """

    def __init__(self, optimizer: BF16_Optimizer, named: NamedParameters) -> None:
        inner = optimizer.optimizer
        super().__init__(optimizer, named, inner, optimizer.fp32_groups_flat_partition, inner.param_groups)
        GradientSums(optimizer)

    def update(self, gradient_norm: float, limit: float) -> None:
        gradients = self.optimizer.fp32_groups_gradient_flat_partition
        _clip(gradients, gradient_norm, limit)
        for master, gradient in zip(self.adam.masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.optimizer.step()
        self.optimizer._lazy_init_hp_params_optimizer_state()
        self.copy_masters_to_model()

    def _flat_gradients(self, group: int) -> list[torch.Tensor]:
        return [self.optimizer.fp32_groups_gradient_flat_partition[group]]


class PartitionedView(_MappedView):
    """ZeRO 1 and 2, but for bf16 with ZeRO 1."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, named: NamedParameters) -> None:
        inner = optimizer.optimizer
        super().__init__(optimizer, named, inner, optimizer.single_partition_of_fp32_groups, inner.param_groups)
        self._step = optimizer.step
        self._known = _KnownNorm(optimizer)
        optimizer.scaled_global_norm = lambda norm_type=2: self._known.scaled
        optimizer.update_offload_overflow_tracker_for_param_grad = lambda parameter: None

    def gradients(self) -> Iterator[Fragment]:
        self.optimizer._wait_for_offload_copies()  # which DeepSpeed does only inside its step
        return super().gradients()

    def update(self, gradient_norm: float, limit: float) -> None:
        self._known.set(gradient_norm, limit)
        self._step()

    def skip_update(self) -> None:
        optimizer = self.optimizer
        # What the wrapper itself does when it meets an overflow, without touching the loss scale.
        optimizer.micro_step_id = -1
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        # Under offload too, where the wrapper keeps the fp32 sums of bf16 gradients: the next step would add to them.
        for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in sums:
                sums[group] = None

    def _flat_gradients(self, group: int) -> list[torch.Tensor]:
        if self.optimizer.cpu_offload:
            return [self.optimizer.single_partition_of_fp32_groups[group].grad]
        pieces: list[torch.Tensor] = self.optimizer.averaged_gradients[group]
        return pieces


class Stage3View(MasterView):
    """ZeRO 3: every parameter is cut into one equal (padded) piece per data rank.

    Data rank r holds elements r s to (r + 1) s of the rank's tensor-parallel shard, flattened row by row; s is the
    number of elements over the number of data ranks, rounded up. A piece may begin and end inside a row.
    """

    def __init__(self, optimizer: Any, named: NamedParameters, data_rank: int) -> None:
        inner, masters = optimizer.optimizer, optimizer.fp32_partitioned_groups_flat
        groups = [inner.param_groups[optimizer.sub_group_to_group_id[index]] for index in range(len(masters))]
        super().__init__(optimizer, named, inner, masters, groups)
        self.data_rank = data_rank
        self._step = optimizer.step
        self._known = _KnownNorm(optimizer)
        optimizer._get_norm_groups = lambda: [self._known.scaled]
        self._indices = {
            id(parameter): (group, index)
            for group, parameters in enumerate(optimizer.fp16_groups)
            for index, parameter in enumerate(parameters)
        }

    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        for name, parameter, start, length in self._pieces():
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            state = self.adam.of(flat) if with_moments else {}
            moments = _moments(state, offset, length)
            yield Fragment(name, start, flat.detach().narrow(0, offset, length), *moments)

    def gradients(self) -> Iterator[Fragment]:
        """See MasterView. Offloaded gradients are on the host, and it waits for them."""
        optimizer = self.optimizer
        if optimizer.offload_optimizer and isinstance(optimizer.reduce_and_partition_stream, DeviceOrdered):
            optimizer.reduce_and_partition_stream.wait_on_host()
        for name, parameter, start, length in self._pieces():
            if optimizer.offload_optimizer:
                group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
                gradient = optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, offset, length)
            else:
                group, index = self._indices[id(parameter)]
                gradient = optimizer.averaged_gradients[group][index].view(-1)[:length]
            yield Fragment(name, start, gradient)

    def update(self, gradient_norm: float, limit: float) -> None:
        self._known.set(gradient_norm, limit)
        self._step()

    def skip_update(self) -> None:
        self.optimizer._pre_step()
        self.optimizer._partition_all_parameters()
        self.optimizer._overflow_clean_up(self.optimizer.loss_scale)

    def copy_masters_to_model(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _model_weights(self) -> Iterator[torch.Tensor]:
        """Yields this rank's pieces; which whole weights are gathered differs from moment to moment."""
        yield from (parameter.ds_tensor for parameter in self.named.values())  # type: ignore[attr-defined]

    def _pieces(self) -> Iterator[tuple[str, Any, int, int]]:
        """(name, parameter, first element, number of real elements) of the pieces that are not only padding."""
        for name, parameter in self.named.items():
            size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            start = self.data_rank * size
            length = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if length > 0:
                yield name, parameter, start, length


class _KnownNorm:
    """Gives a ZeRO optimizer the gradient norm and whether there is an overflow, which it would compute itself."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        # The norm times the loss scale; on the host, where DeepSpeed's update then finds it without a wait.
        self.scaled = torch.tensor(math.nan)
        optimizer.check_overflow = self._check_overflow

    def set(self, gradient_norm: float, limit: float) -> None:
        """Sets what the next update works with (see MasterView.update)."""
        self.scaled = torch.tensor(gradient_norm * self._optimizer.loss_scale, dtype=torch.float32)
        self._optimizer.clip_grad = limit

    def _check_overflow(self, partition_gradients: bool = True) -> None:
        self._optimizer.overflow = not math.isfinite(self.scaled)


def _clip(gradients: list[torch.Tensor], gradient_norm: float, limit: float) -> None:
    """Scales gradients down, in place, so that their global norm is at most the limit; 0: never."""
    if (factor := clipping_factor(gradient_norm, limit)) != 1.0:
        torch._foreach_mul_(gradients, factor)


def clipping_factor(gradient_norm: float, limit: float) -> float:
    """Returns what a gradient is multiplied by so that its global norm is at most the limit; 0: never."""
    return limit / (gradient_norm + 1e-6) if 0.0 < limit < gradient_norm else 1.0


def _moments(state: Mapping[str, Any], start: int, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Moments of elements start..start+length; None before the first update, and the second one where it has none."""
    exp_avg, exp_avg_sq = (
        state[key].view(-1).narrow(0, start, length) if key in state else None for key in ("exp_avg", "exp_avg_sq")
    )
    return exp_avg, exp_avg_sq


class _FlatGradients:
    """Consecutive tensors that together are one flat tensor."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.starts = [0, *accumulate(tensor.numel() for tensor in tensors)]

    def narrow(self, start: int, length: int) -> torch.Tensor:
        index = bisect_right(self.starts, start) - 1
        offset = start - self.starts[index]
        assert offset + length <= self.tensors[index].numel(), "a gradient fragment crosses DeepSpeed's pieces"
        return self.tensors[index].view(-1).narrow(0, offset, length)
