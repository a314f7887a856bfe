"""What Python asks of a tensor, or of torch, that a FakeTensor cannot answer and a tensor of a GPU can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.device.tracing import Trace, unknown

aten = torch.ops.aten


class Answers(TorchFunctionMode):
    """Answers them; enter it inside the trace.

    tolist, numpy: one wait, and known or meaningless values. pin_memory: there is no such memory here; the trace keeps
    account of it. scaled_dot_product_attention: ATen chooses by device, and the CPU's build knows no choice for CUDA.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        # FakeTensor has a method of its own, which reads one element after the other.
        FakeTensor.tolist = lambda tensor: self._tolist(tensor)  # type: ignore[assignment, method-assign]
        run_backward: Any = torch.autograd._engine_run_backward

        def run_answered(*arguments: Any, **options: Any) -> Any:
            # A mode is off while the function runs that it was asked for; checkpointing computes again inside this one.
            with self:
                return run_backward(*arguments, **options)

        torch.autograd._engine_run_backward = run_answered
        self._answers: dict[str, Callable[..., Any]] = {
            "numpy": self._numpy,
            "pin_memory": self._pin_memory,
            "is_pinned": lambda tensor, *_: self.trace.is_pinned(tensor),
            "scaled_dot_product_attention": _attention,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = self._answers.get(getattr(func, "__name__", ""))
        if answer is not None:
            return answer(*args, **kwargs)
        if "pin_memory" in kwargs:
            is_pinned = kwargs.pop("pin_memory")
            result = func(*args, **kwargs)
            return self.trace.pin(result) if is_pinned else result
        return func(*args, **kwargs)

    def _tolist(self, tensor: torch.Tensor) -> Any:
        return self._read(tensor, "tolist", torch.Tensor.tolist)

    def _numpy(self, tensor: torch.Tensor, *, force: bool = False) -> Any:
        assert tensor.device.type == "cpu" or force, "numpy() of a tensor of the device"
        return self._read(tensor, "numpy", torch.Tensor.numpy)

    def _read(self, tensor: torch.Tensor, kind: str, convert: Callable[[torch.Tensor], Any]) -> Any:
        """Reads values that are known, or meaningless ones; a wait, where they are the device's."""
        if tensor.device.type == "cuda":
            self.trace.wait(kind)
        known = self.trace.values_of(tensor) if isinstance(tensor, FakeTensor) else tensor
        with _disable_current_modes():
            if known is None:
                known = torch.full(tuple(tensor.shape), unknown(tensor.dtype), dtype=tensor.dtype)
            return convert(known.detach().clone())

    def _pin_memory(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.trace.pin(tensor.clone())


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What CUDA chooses (sdp_utils.cpp): flash attention without a mask in bf16 and fp16, else memory-efficient."""
    if not query.is_cuda:
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal)[0]
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
        bias = bias.expand(query.size(0), query.size(1), query.size(2), key.size(2))
    needs_gradient = query.requires_grad or key.requires_grad or value.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]
