"""Where DeepSpeed keeps the fp32 weights, moments and gradients: one view per kind of optimizer wrapper.

DeepSpeed 0.19 wraps torch's optimizer in one of four ways, depending on ZeRO stage and precision. Each class below
knows some of them and offers the same: this rank's fragments of the fp32 weights with their moments, its fragments of
the gradient before the update, how to leave an update out, how to make the model follow changed weights, and whether
the copies are replicated over data ranks. All of it relies on DeepSpeed's inner attributes and is covered by
tests/distributed.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Protocol

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from mlra_scale.parallel.adam import AdamState
from mlra_scale.parallel.fragments import Fragment

Named = Mapping[str, nn.Parameter]


class MasterView(Protocol):
    """One rank's view of the fp32 training state, ownership among replicas not yet decided."""

    is_replicated_over_data: bool
    adam: AdamState

    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        """Yields fragments of the fp32 weights (views, not copies), with Adam's moments if asked for."""
        ...

    def gradients(self) -> Iterator[Fragment]:
        """Yields fragments of the reduced gradient, in DeepSpeed's type and times the loss scale; only in the gate."""
        ...

    def forget_moments(self) -> None:
        """Puts the optimizer back to before its first update."""
        ...

    def skip_update(self) -> None:
        """Drops the gradients so that no update takes place; weights, moments and loss scale stay as they are."""
        ...

    def publish(self) -> None:
        """Makes the weights that the model computes with follow the fp32 ones; collective."""
        ...


def master_view(optimizer: Any, named: Named, data_rank: int) -> MasterView:
    """Returns the view that fits DeepSpeed's optimizer.

    Args:
        optimizer: `engine.optimizer` of the DeepSpeed engine.
        named: This rank's parameters by canonical name.
        data_rank: Coordinate on the data axis.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Stage3View(optimizer, named, data_rank)
    if isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer):
        return PartitionedView(optimizer, named)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        _undo_rehearsal(optimizer)
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return ReplicatedView(optimizer, named, masters)
    assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
    return ReplicatedView(optimizer, named, {})


@torch.no_grad()
def _undo_rehearsal(optimizer: FP16_UnfusedOptimizer) -> None:
    """Takes back the update with zero gradients by which this wrapper allocates Adam's state.

    It decays the masters once and counts as a step, so that the first real update would be 0.73 of its size.
    """
    optimizer.optimizer.state.clear()
    for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for low, high in zip(lows, highs, strict=True):
            high.copy_(low)


def mend_loss_scaling(optimizer: Any) -> None:
    """Mends two habits of DeepSpeed's fp16 loss scaling (ZeRO 1 to 3).

    When the scale grows it does so before the gradients are divided by it, so that one update in a thousand would take
    half its gradient: growth waits until the update is done. And a row of overflows is ours to judge
    (`train.max_consecutive_overflows`), not an exception inside DeepSpeed.
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


class ReplicatedView:
    """ZeRO stage 0: every data rank holds everything; the masters are the parameters themselves or copies of them."""

    is_replicated_over_data = True

    def __init__(self, optimizer: Any, named: Named, masters: dict[int, torch.Tensor]) -> None:
        self.optimizer = optimizer
        self.named = named
        self.masters = masters
        updated = [masters.get(id(parameter), parameter) for parameter in named.values()]
        self.adam = AdamState(optimizer.optimizer if masters else optimizer, updated)
        if masters:
            self._unscale_and_clip = optimizer.unscale_and_clip_grads

    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        """See MasterView."""
        for name, parameter in self.named.items():
            master = self.masters.get(id(parameter), parameter)
            state = self.adam.of(master) if with_moments else {}
            yield Fragment(name, 0, master.detach().view(-1), *_moments(state, 0, master.numel()))

    def gradients(self) -> Iterator[Fragment]:
        """See MasterView."""
        for name, parameter in self.named.items():
            assert parameter.grad is not None, name
            yield Fragment(name, 0, parameter.grad.view(-1))

    def skip_update(self) -> None:
        """See MasterView. The engine zeroes the gradients after every step."""

    def forget_moments(self) -> None:
        """See MasterView."""
        self.adam.forget()

    def clip(self, gradient_norm: float, limit: float) -> None:
        """Clips this update's gradients by the true global norm, which DeepSpeed does not know at stage 0.

        DeepSpeed would clip fp32 gradients before the gate; for bf16 parameters under tensor parallelism it takes the
        norm of the first rank's shards for that of the whole.
        """
        if self.masters:
            scaled_norm = gradient_norm * self.optimizer.loss_scale_config.cur_scale
            self.optimizer.clip_grad = limit
            self.optimizer.unscale_and_clip_grads = lambda _norm, apply_scale=True: self._unscale_and_clip(
                scaled_norm, apply_scale
            )
        elif limit > 0.0 and gradient_norm > limit:
            gradients = [parameter.grad for parameter in self.named.values() if parameter.grad is not None]
            torch._foreach_mul_(gradients, limit / (gradient_norm + 1e-6))

    def publish(self) -> None:
        """See MasterView."""
        for parameter in self.named.values():
            if id(parameter) in self.masters:
                parameter.data.copy_(self.masters[id(parameter)].data)


class PartitionedView:
    """ZeRO 1 and 2, the bf16 optimizer of stage 1 included: flat fp32 partitions, split over data ranks."""

    is_replicated_over_data = False

    def __init__(self, optimizer: Any, named: Named) -> None:
        self.optimizer = optimizer
        self.named = named
        self.is_bf16 = isinstance(optimizer, BF16_Optimizer)
        flats = optimizer.fp32_groups_flat_partition if self.is_bf16 else optimizer.single_partition_of_fp32_groups
        self.adam = AdamState(optimizer.optimizer, flats)

    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        """See MasterView."""
        for name, mapping in self._mappings():
            where = mapping.hp_fragment_address
            state = self.adam.of(self.adam.masters[mapping.param_group_index]) if with_moments else {}
            moments = _moments(state, where.start, where.numel)
            yield Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach(), *moments)

    def gradients(self) -> Iterator[Fragment]:
        """See MasterView."""
        if not self.is_bf16:
            self.optimizer._wait_for_offload_copies()  # which DeepSpeed does only inside its step
        groups: dict[int, _Pieces] = {}
        for name, mapping in self._mappings():
            group, where = mapping.param_group_index, mapping.hp_fragment_address
            if group not in groups:
                groups[group] = _Pieces(self._flat_gradients(group))
            yield Fragment(name, mapping.lp_fragment_address.start, groups[group].narrow(where.start, where.numel))

    def skip_update(self) -> None:
        """See MasterView."""
        optimizer = self.optimizer
        if self.is_bf16:
            return  # the engine zeroes both kinds of gradients after every step
        # What the wrapper itself does when it meets an overflow, without touching the loss scale.
        optimizer.micro_step_id = -1
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        else:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None

    def forget_moments(self) -> None:
        """See MasterView."""
        self.adam.forget()
        # DeepSpeed's own views of the moments, made after the first update, would keep them alive.
        for _, mapping in self._mappings():
            mapping.optim_fragment = None
        self.optimizer._hp_optimizer_states_linked = False

    def publish(self) -> None:
        """See MasterView."""
        self.optimizer.update_lp_params()

    def _mappings(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.named.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                yield name, mapping

    def _flat_gradients(self, group: int) -> list[torch.Tensor]:
        """The group's gradient partition as consecutive pieces."""
        if self.is_bf16:
            return [self.optimizer.fp32_groups_gradient_flat_partition[group]]
        if self.optimizer.cpu_offload:
            return [self.optimizer.single_partition_of_fp32_groups[group].grad]
        return self.optimizer.averaged_gradients[group]


class Stage3View:
    """ZeRO 3: every parameter is cut into one equal (padded) piece per data rank."""

    is_replicated_over_data = False

    def __init__(self, optimizer: Any, named: Named, data_rank: int) -> None:
        self.optimizer = optimizer
        self.named = named
        self.data_rank = data_rank
        self.adam = AdamState(optimizer.optimizer, optimizer.fp32_partitioned_groups_flat)

    def weights(self, with_moments: bool) -> Iterator[Fragment]:
        """See MasterView."""
        for name, parameter, start, length in self._pieces():
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            state = self.adam.of(flat) if with_moments else {}
            moments = _moments(state, offset, length)
            yield Fragment(name, start, flat.detach().narrow(0, offset, length), *moments)

    def gradients(self) -> Iterator[Fragment]:
        """See MasterView."""
        for name, parameter, start, length in self._pieces():
            yield Fragment(name, start, self.optimizer.get_local_fp32_grad_for_param(parameter)[:length])

    def skip_update(self) -> None:
        """See MasterView."""
        self.optimizer._pre_step()
        self.optimizer._partition_all_parameters()
        self.optimizer._overflow_clean_up(self.optimizer.loss_scale)

    def forget_moments(self) -> None:
        """See MasterView."""
        self.adam.forget()

    def publish(self) -> None:
        """See MasterView."""
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _pieces(self) -> Iterator[tuple[str, Any, int, int]]:
        """(name, parameter, first element, number of real elements) of the pieces that are not only padding."""
        for name, parameter in self.named.items():
            size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            start = self.data_rank * size
            length = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if length > 0:
                yield name, parameter, start, length


def _moments(state: Mapping[str, Any], start: int, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Adam's moments of elements start..start+length; (None, None) before the first update."""
    if "exp_avg" not in state:
        return None, None
    exp_avg, exp_avg_sq = (state[key].view(-1).narrow(0, start, length) for key in ("exp_avg", "exp_avg_sq"))
    return exp_avg, exp_avg_sq


class _Pieces:
    """Consecutive tensors that together are one flat tensor."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.starts = [0, *accumulate(tensor.numel() for tensor in tensors)]

    def narrow(self, start: int, length: int) -> torch.Tensor:
        """Elements start..start+length of the whole; they lie in one of the tensors."""
        index = bisect_right(self.starts, start) - 1
        offset = start - self.starts[index]
        assert offset + length <= self.tensors[index].numel(), "a gradient fragment crosses DeepSpeed's pieces"
        return self.tensors[index].view(-1).narrow(0, offset, length)
