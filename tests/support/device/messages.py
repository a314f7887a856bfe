"""Bytes of a message, as the planner counts them: what one rank of k sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_iter

from tests.support.device.report import Message


def _nbytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor))


def message_of(name: str, args: Sequence[Any]) -> tuple[Message, dist.ProcessGroup]:
    """Returns the message of a c10d operator, and its group.

    An all-reduce of k ranks sends 2 (k - 1) / k of the tensor; a gather, a reduce-scatter and a broadcast
    (k - 1) / k of the whole; an all-to-all sends all but the part that the rank keeps; of a pair, one sends all, and
    receiving sends nothing.
    """
    group = next(
        dist.ProcessGroup.unbox(value)
        for value in args
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())
    )
    size = group.size()
    if name in ("recv_", "recv_any_source_"):
        return Message(), group
    if name == "send":
        return Message(1, float(_nbytes(args[0]))), group
    if name == "barrier":
        return Message(1), group
    if name.startswith("alltoall"):
        parts = args[4] or [1] * size
        return Message(1, _nbytes(args[1]) * (1.0 - parts[group.rank()] / max(1, sum(parts)))), group
    whole = max(_nbytes(args[0]), _nbytes(args[1]))
    times = 2 if name.startswith("allreduce") else 1
    return Message(1, times * whole * (size - 1) / size), group
