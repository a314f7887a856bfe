"""Counts of what a rank computes and sends, taken while the real modules run."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _added_product_flops(_: object, left: tuple[int, int], right: tuple[int, int], **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


PRODUCTS = {torch.ops.aten.addmm_: _added_product_flops}
"""For FlopCounterMode, which by itself does not count a product that is added in place."""


class SentNumbers(TorchDispatchMode):
    """Adds up how many numbers this rank sends in collectives, by the rings' shares: (t - 1) / t, all-reduce twice."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.share = (ranks - 1) / ranks
        self.numbers = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            # In each case what is whole: what is summed, gathered, or reduced before it is scattered.
            whole = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1}
            if name not in whole:
                raise NotImplementedError(f"numbers that {func} sends")
            factor = 2 if name == "allreduce_" else 1
            self.numbers += factor * self.share * sum(tensor.numel() for tensor in _flat(args[whole[name]]))
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterable[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _flat(item)]
