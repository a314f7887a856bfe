"""Loops whose pieces are large hold one piece at a time: a loop variable does not keep the last one.

The bytes are those of all tensors that torch's CPU allocator reports (benchmarks/tensor_memory.py). A piece that is
kept adds its own size to the peak, which every bound here is below.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.tensor_memory import recording
from mlra_scale.model import head_chunks, probe
from mlra_scale.model.loss import head_loss
from mlra_scale.model.probe import Heads

TOKENS, WIDTH, ROWS = 512, 8, 4096
CHUNK = 64 * ROWS
"""Logits of one of the eight chunks."""


def added(function: Callable[[], Any]) -> int:
    """Bytes that a call adds at its peak."""
    with recording() as memory, memory.span("call"):
        function()
    return memory.peaks["call"] - memory.start["call"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_holds_one_chunk(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK_NUMBERS", {"cpu": CHUNK})
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # has no means to communicate
    context: Any = SimpleNamespace(model=SimpleNamespace(z_loss=0.0), tensor_group=group)
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(ROWS, WIDTH, dtype=dtype).requires_grad_()
    targets = torch.zeros(1, TOKENS, dtype=torch.int64)
    element = dtype.itemsize
    of_chunk = CHUNK * (4 if element == 4 else 4 + element)  # logits in fp32, and in the type of the weights
    of_gradients = (ROWS * (4 + element) + TOKENS * element) * WIDTH
    bound = of_chunk + of_gradients + 0.1 * CHUNK * 4
    assert added(lambda: head_loss(context, hidden, weight, None, targets, True)) < bound


def test_the_probe_holds_one_piece_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    size, num_heads = 128, 8
    monkeypatch.setattr(probe, "LOGITS_AT_ONCE", size**2)  # one head at a time
    q_BNSH, k_BNSH = torch.randn(2, num_heads, size, 4), torch.randn(2, num_heads, size, 4)
    heads = Heads(0, q_BNSH, k_BNSH, None)
    piece = size**2 * 4

    def look() -> None:
        for found in heads.logits():
            del found

    allowed = 2 * size**2  # the mask and its inverse
    assert added(look) < 1.5 * piece + allowed
