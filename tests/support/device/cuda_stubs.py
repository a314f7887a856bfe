"""torch.cuda where there is no CUDA: what a program may ask of a device that computes nothing.

`install` replaces, for good, what the CPU build of torch cannot answer. What a host would wait for is reported to a
`Waits` observer; nothing else here has an effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Waits = Callable[[str], None]
"""Is given what the host waits for: `event.synchronize`, `stream.synchronize`, ..."""

GIB = 1 << 30
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * GIB,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
)
NUM_DEVICES = 8
TYPED_TENSORS = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}


class Event:
    """An event of a device that is behind: not over until the host has waited for it, or for the whole device.

    What the host waits for is reported.
    """

    report: Waits
    num_recorded = num_over = 0
    """Of all events: how many were recorded, and up to which of these the device is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._number = 0

    def record(self, *_: Any) -> None:
        Event.num_recorded += 1
        self._number = Event.num_recorded

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return self._number <= Event.num_over

    def synchronize(self) -> None:
        if not self.query():
            self.report("event.synchronize")
        self._number = 0

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class _Stream:
    """A stream: the order of a device that computes nothing needs no keeping."""

    report: Waits
    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        self.report("stream.synchronize")

    def query(self) -> bool:
        return False

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Device:
    """`with torch.cuda.device(...)`: there is one device per process."""

    def __init__(self, _: Any) -> None:
        self.idx = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def install(local_rank: int, report: Waits) -> None:
    """Has torch.cuda answer."""
    cuda: Any = torch.cuda
    Event.report = _Stream.report = staticmethod(report)
    current = [0]

    def set_device(device: Any) -> None:
        current[0] = device if isinstance(device, int) else torch.device(device).index or 0

    def synchronize(_: Any = None) -> None:
        report("cuda.synchronize")
        Event.num_over = Event.num_recorded

    def empty_cache() -> None:
        report("empty_cache")

    stream = _Stream.__new__(_Stream)
    stream.device = torch.device("cuda", local_rank)
    answers: dict[str, Any] = {
        # Streams and events: DeepSpeed and Megatron order copies and reductions by them.
        "Event": Event,
        "Stream": _Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "set_stream": lambda stream: None,
        "synchronize": synchronize,
        # The device: DeepSpeed's accelerator and our start look at it.
        "is_available": lambda: True,
        "device_count": lambda: NUM_DEVICES,
        "current_device": lambda: current[0],
        "set_device": set_device,
        "device": _Device,
        "_DeviceGuard": _Device,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: False,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        # The allocator: the trace keeps its own account.
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
            lambda device=None: 0,
        ),
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": empty_cache,
        # Random states: no kernel draws numbers; Megatron and checkpointing save and restore them.
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "default_generators": [torch.Generator() for _ in range(NUM_DEVICES)],
        **{name: _typed(dtype) for name, dtype in TYPED_TENSORS.items()},
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_, **__: None)
    cuda.nccl.version = lambda: (2, 29, 7)
    torch.version.cuda = "13.0"  # DeepSpeed and Megatron read it
    _mend_fake_tensors()


def answer_for_cpu_adam() -> None:
    """Has DeepSpeed's Adam on the host update nothing: a C++ extension, which reads memory that is not there."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    nothing = dict.fromkeys(("create_adam", "destroy_adam", "adam_update"), lambda *_: None)
    CPUAdamBuilder.load = lambda self, verbose=True: SimpleNamespace(**nothing)


def _typed(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """torch.cuda.FloatTensor and its like, which DeepSpeed makes its flags with."""

    def make(*arguments: Any) -> torch.Tensor:
        if arguments and isinstance(arguments[0], list | tuple):
            return torch.tensor(arguments[0], dtype=dtype, device="cuda")
        return torch.empty(*arguments, dtype=dtype, device="cuda")

    return make


def _mend_fake_tensors() -> None:
    """Makes good what FakeTensors do otherwise than tensors when a module moves to another device."""
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment, method-assign]
    data: Any = torch._C.TensorBase.data

    def set_data(self: FakeTensor, value: torch.Tensor) -> None:
        data.__set__(self, value)
        if isinstance(value, FakeTensor):
            self.fake_device = value.fake_device

    FakeTensor.data = property(lambda self: data.__get__(self), set_data)  # type: ignore[assignment]

    def apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """As for plain tensors: parameters stay the same objects. torch would swap FakeTensors, which hooks forbid."""
        for child in self.children() if recurse else ():
            child._apply(fn)
        for parameter in self._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = fn(parameter)
                if parameter.grad is not None:
                    parameter.grad.data = fn(parameter.grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    torch.nn.Module._apply = apply  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment, method-assign]
    FakeTensor.record_stream = torch.Tensor.record_stream  # type: ignore[method-assign]
