"""Removes waits of the host for the device from DeepSpeed's ZeRO optimizers.

After each micro-batch ZeRO 2 and 3 let the host wait for the stream on which gradients are reduced; the device is then
idle until the host has started the next micro-batch. Only the order of the work matters, so here the device's current
stream waits instead of the host. Memory that the reduction has read is freed after that wait, for later work on the
same stream.

The host still waits where it reads numbers: those of a step's proposal, and offloaded gradients. DeepSpeed's flow
control of ZeRO 3 stays: before a weight is fetched or a bucket of gradients is reduced, the host waits if more than two
earlier ones are unfinished, so that memory stays bounded (`__max_ongoing_fetch_events` of its
PartitionedParameterCoordinator, `max_param_reduce_events` of its optimizer).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator


class DeviceOrdered(torch.cuda.Stream):
    """The same stream, on which `synchronize` makes the device's current stream wait instead of the host."""

    def synchronize(self) -> None:
        """Orders later work of the current stream after all work of this one."""
        torch.cuda.current_stream().wait_stream(self)

    def wait_on_host(self) -> None:
        """Waits until the device has finished all work of this stream."""
        super().synchronize()


def order_stage3_on_device(optimizer: Any) -> None:
    """Makes the device wait for ZeRO 3's reduction; on CUDA."""
    stream = optimizer.reduce_and_partition_stream
    optimizer.reduce_and_partition_stream = DeviceOrdered(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


def order_stage2_on_device(optimizer: Any) -> None:
    """Makes the device wait for the reduction of ZeRO 1 and 2 with overlap_comm; on CUDA."""
    if not optimizer.overlap_comm:
        return
    for name in ("independent_gradient_partition_epilogue", "reduce_ipg_grads"):
        setattr(optimizer, name, _ordered(getattr(optimizer, name), optimizer.reduction_stream))


def _ordered(method: Callable[..., Any], stream: torch.cuda.Stream) -> Callable[..., Any]:
    """The method, in which DeepSpeed's `get_accelerator().synchronize()` orders work after this stream."""

    def order(device_index: int | None = None) -> None:
        torch.cuda.current_stream().wait_stream(stream)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(get_accelerator(), "synchronize", order):
            return method(*args, **kwargs)

    return call
