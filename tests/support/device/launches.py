"""How many kernels an operator starts, as far as this can be said without a device.

One for every operator that computes, none for one that only makes a view or allocates. Operators on lists of tensors
count as their multi-tensor kernels are started (ATen/native/cuda/MultiTensorApply.cuh): chunks of 65,536 elements, at
most 320 chunks and a few dozen tensors to a kernel; where the types, shapes or strides of the lists forbid that kernel,
one for every tensor, as ATen does then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense

CHUNK = 65536
MAX_CHUNKS = 320
MAX_TENSORS = (110, 64, 48, 36, 30)
"""Tensors of one launch, by number of lists."""
MAX_TENSORS_WITH_SCALARS = (96, 64, 48, 36, 30)
"""The same where every tensor has a number of its own."""
FREE = {
    "_local_scalar_dense",
    "_unsafe_view",
    "_has_compatible_shallow_copy_type",
    "empty",
    "empty_like",
    "empty_strided",
    "is_pinned",
    "is_same_size",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "record_stream",
    "resize_",
    "set_",
}
"""Operators that start nothing, beside those whose outputs are all views."""
NO_OUTPUT_LIST = ("_foreach_norm", "_fused_adamw_", "_fused_adam_")
_VIEWS: dict[Any, bool] = {}


def is_free(func: Any, name: str) -> bool:
    """Returns whether an operator starts no kernel."""
    found = _VIEWS.get(func)
    if found is None:
        returns = func._schema.returns
        only_views = bool(returns) and all(
            value.alias_info is not None and not value.alias_info.is_write for value in returns
        )
        found = _VIEWS[func] = name in FREE or only_views
    return found


def num_launches(func: Any, name: str, arguments: Sequence[Any]) -> int:
    """Returns the number of kernels of an operator that is not free."""
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    lists = [value for value in arguments if isinstance(value, list | tuple) and _holds_tensors(value)]
    if name.startswith("_fused_"):
        return multi_tensor_launches([tensor.numel() for tensor in lists[0]], 4, MAX_TENSORS)
    has_scalars = any(isinstance(value, list | tuple) and value and not _holds_tensors(value) for value in arguments)
    if not _has_fast_path(name, lists):
        return len(lists[0])
    depth = len(lists) + (not name.endswith("_") and name not in NO_OUTPUT_LIST)
    limits = MAX_TENSORS_WITH_SCALARS if has_scalars else MAX_TENSORS
    # A norm has a second kernel, which adds the chunks' results, and a buffer of zeros for them.
    more = 2 if name == "_foreach_norm" else 0
    return multi_tensor_launches([tensor.numel() for tensor in lists[0]], depth, limits) + more


def multi_tensor_launches(sizes: Sequence[int], depth: int, limits: Sequence[int]) -> int:
    """Returns how often the multi-tensor kernel is started."""
    launches = tensors = chunks = 0
    for size in sizes:
        rest = -(-size // CHUNK)
        if rest == 0:
            continue
        tensors += 1
        while rest:
            taken = min(rest, MAX_CHUNKS - chunks)
            rest, chunks = rest - taken, chunks + taken
            if chunks == MAX_CHUNKS or (rest == 0 and tensors == limits[depth - 1]):
                launches += 1
                # A tensor that is not done goes into the next launch as its first.
                tensors, chunks = (1 if rest else 0), 0
    return launches + (chunks > 0)


def _holds_tensors(value: Sequence[Any]) -> bool:
    return len(value) > 0 and isinstance(value[0], torch.Tensor)


def _has_fast_path(name: str, lists: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether ATen takes the multi-tensor kernel (can_use_fast_route): like types, shapes and strides, and dense."""
    first = lists[0]
    for tensors in lists:
        dtype = tensors[0].dtype if name == "_foreach_copy_" else first[0].dtype
        for tensor, counterpart in zip(tensors, first, strict=True):
            if tensor.dtype != dtype or tensor.device != first[0].device:
                return False
            if tensor.shape != counterpart.shape or tensor.stride() != counterpart.stride():
                return False
            if not is_dense(tensor):
                return False
    return name in ("_foreach_zero_", "_foreach_copy_") or first[0].is_floating_point()
