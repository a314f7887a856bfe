"""Watches every operator of the process: bytes that live, kernels, waits of the host, messages, types of products.

A `Trace` is a torch dispatch mode. It answers what a host reads of a device that computes nothing: a value that the
host itself has put there comes back (`values`), any other is 1.0, 0 or False. It also is the account of the device's
memory: the bytes of every storage, rounded to 512 as the allocator rounds them, from the operator that makes it to its
last reference.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._tools.fake_collectives
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from tests.support.device.launches import is_free, num_launches
from tests.support.device.messages import message_of
from tests.support.device.report import Message, Phase

ROUNDING = 512
SMALL = 1 << 13
"""Elements of a tensor of the host whose values are remembered on their way to the device."""
HOST_BYTES = 1 << 16
"""From here on a result of the host's own arithmetic is reported."""
PROJECT = ("/mlra_scale/", "/deepspeed/", "/megatron/", "/tests/", "/benchmarks/", "/torch/optim/", "/transformers/")
SKIPPED = ("/tests/support/device/", "/deepspeed/utils/nvtx.py", "/deepspeed/accelerator/", "/deepspeed/comm/")
"""The trace itself, and what only hands on."""
FAULTS = "/tests/support/device/faults.py"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_efficient_attention"}
WAITING = {"nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere"}
"""Operators whose result has a size, or is a value, that the host must know."""
KEEPS_VALUES = {"_to_copy", "clone", "lift_fresh", "detach", "alias", "copy_", "view", "slice", "select", "_pin_memory"}


@dataclass
class _Storage:
    reference: Any
    device_bytes: int = 0
    pinned_bytes: int = 0
    values: torch.Tensor | None = None
    site: str = ""


def frames(limit: int = 3) -> list[tuple[str, str]]:
    """Returns (file:function, file:line) of the innermost frames outside torch and the trace itself."""
    found: list[tuple[str, str]] = []
    frame: Any = sys._getframe(1)
    while frame is not None and len(found) < limit:
        name = frame.f_code.co_filename
        if not any(part in name for part in SKIPPED) or name.endswith(FAULTS):
            for part in PROJECT:
                at = name.rfind(part)
                if at >= 0 and not (part == "/torch/optim/" and found):
                    short = name[at + 1 :]
                    function = frame.f_code.co_qualname.split(".<locals>")[0]
                    found.append((f"{short}:{function}", f"{short}:{frame.f_lineno}"))
                    break
        frame = frame.f_back
    return found or [("autograd", "autograd")]


def _kind_of(tensor: torch.Tensor) -> str:
    return tensor.fake_device.type if isinstance(tensor, FakeTensor) else tensor.device.type


class Trace(TorchDispatchMode):
    """The dispatch mode; enter it inside a FakeTensorMode. `group_of` names a process group: tensor, data, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.group_of: Callable[[Any], str] = lambda group: "world"
        self.phases: dict[str, Phase] = {}
        self.live = self.pinned = 0
        self._storages: dict[int, _Storage] = {}
        self._phase = Phase()
        # (site, bytes) of every storage that came or, with a minus, went; and the journal's length at the peak.
        self._journal: list[tuple[str, int]] = []
        self._length_at_peak = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what happens inside as the phase of a name; phases may be nested."""
        outer = self._phase, self._journal, self._length_at_peak
        phase = Phase(start=self.live, peak=self.live, host_start=self.pinned, host_peak=self.pinned)
        self._phase = self.phases[name] = phase
        self._journal = [(held.site, held.device_bytes) for held in self._storages.values()]
        self._length_at_peak = len(self._journal)
        try:
            yield
        finally:
            phase.end = self.live
            for site, size in self._journal[: self._length_at_peak]:
                phase.holders[site] += size
            self._phase, self._journal, self._length_at_peak = outer

    def mark(self, name: str) -> None:
        """Notes how many kernels were started until now."""
        self._phase.marks.append((name, self._phase.num_launches))

    def wait(self, kind: str) -> None:
        """Notes that the host waits for the device."""
        found = frames()
        self._phase.waits[(kind, found[0][0], " < ".join(line for _, line in found))] += 1

    def sends_object(self, collective: str, group: Any, size: int) -> None:
        """Notes that this rank sends a Python object of so many bytes."""
        site = frames(1)[0][0]
        key = (collective, "world" if group is None else self.group_of(group), site)
        self._phase.messages[key] = self._phase.messages.get(key, Message()) + Message(1, float(size))

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the host is page-locked."""
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        return storage is not None and storage.pinned_bytes > 0

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Notes that a tensor of the host is page-locked."""
        storage = self._storage(tensor)
        if not storage.pinned_bytes:
            # torch's allocator of page-locked memory rounds up to a power of two.
            storage.pinned_bytes = 1 << (tensor.untyped_storage().nbytes() - 1).bit_length()
            self.pinned += storage.pinned_bytes
            self._phase.host_peak = max(self._phase.host_peak, self.pinned)
        return tensor

    def values_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the values of a tensor that the host knows, else None."""
        if not isinstance(tensor, FakeTensor):
            return tensor if tensor.device.type == "cpu" else None
        if tensor.constant is not None:
            return tensor.constant
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is None or storage.values is None:
            return None
        with _disable_current_modes():
            return storage.values.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _storage(self, tensor: torch.Tensor) -> _Storage:
        wrapped = tensor.untyped_storage()
        key = wrapped._cdata
        found = self._storages.get(key)
        if found is None:
            found = self._storages[key] = _Storage(weakref.ref(wrapped, lambda _: self._drop(key)))
        return found

    def _drop(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.live -= storage.device_bytes
        self._journal.append((storage.site, -storage.device_bytes))
        self.pinned -= storage.pinned_bytes

    def _allocated(self, tensor: torch.Tensor) -> None:
        """Counts a tensor whose storage may be new."""
        wrapped = tensor.untyped_storage()
        if wrapped._cdata in self._storages:
            return
        storage = self._storage(tensor)
        storage.device_bytes = -(-wrapped.nbytes() // ROUNDING) * ROUNDING
        storage.site = frames(1)[0][1]
        self.live += storage.device_bytes
        self._journal.append((storage.site, storage.device_bytes))
        if self.live > self._phase.peak:
            self._phase.peak, self._length_at_peak = self.live, len(self._journal)

    def _remember(self, tensor: torch.Tensor, values: torch.Tensor | None) -> None:
        """Keeps the values of a whole tensor of a storage of its own."""
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if values is None or values.numel() > SMALL or tensor.storage_offset() != 0:
            return
        if tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes() and tensor.is_contiguous():
            with _disable_current_modes():
                (storage or self._storage(tensor)).values = values.detach().to(tensor.dtype).clone().view(-1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        is_on_device = any(_kind_of(tensor) == "cuda" for tensor in tensors)
        if name == "_local_scalar_dense":
            return self._read(tensors[0])
        known = self.values_of(tensors[0]) if name in KEEPS_VALUES and tensors else None
        result = func(*args, **kwargs)
        results = [value for value in tree_iter(result) if isinstance(value, torch.Tensor)]
        if namespace == "c10d":
            self._communicates(name, args, tensors)
        elif name in ("_to_copy", "copy_"):
            self._copies(name, args, kwargs, results[0])
        elif is_on_device:
            self._waits(name, args)
        for tensor in results:
            if _kind_of(tensor) == "cuda":
                is_on_device = True
                self._allocated(tensor)
        if namespace not in ("c10d", "prim"):
            self._values(func, name, args, results, known)
            if is_on_device and not is_free(func, name):
                number = num_launches(func, name, args)
                self._phase.launches[name] += number
                self._phase.num_launches += number
                if name in PRODUCTS and any(tensor.dtype == torch.float32 for tensor in tensors):
                    self._phase.wide_products[f"{name} {frames(1)[0][1]}"] += 1
            elif not is_on_device:
                self._computes_on_host(func, name, results)
        return result

    def _read(self, tensor: torch.Tensor) -> float | int | bool:
        """`.item()`: a wait, if the tensor is the device's, and the value that the host knows, or one of no meaning."""
        if _kind_of(tensor) == "cuda":
            self.wait("item")
        known = self.values_of(tensor)
        if known is not None:
            with _disable_current_modes():
                return known.item()
        return unknown(tensor.dtype)

    def _values(
        self, func: Any, name: str, args: Sequence[Any], results: Sequence[torch.Tensor], known: torch.Tensor | None
    ) -> None:
        """Keeps what the host knows of a tensor, or forgets it when something else is written there."""
        if name == "copy_":
            known = self.values_of(args[1]) if isinstance(args[1], torch.Tensor) else None
            target = args[0]
            storage = self._storages.get(target.untyped_storage()._cdata)
            if storage is not None and storage.values is not None and known is not None:
                with _disable_current_modes():
                    view = storage.values.as_strided(target.shape, target.stride(), target.storage_offset())
                    view.copy_(known)
                return
            if storage is not None:
                storage.values = None
            self._remember(target, known)
            return
        if name in ("full", "new_full") and results[0].numel() == 1:
            with _disable_current_modes():
                known = torch.full((1,), args[-1])
            self._remember(results[0], known)
            return
        if name in KEEPS_VALUES:
            if (
                results
                and known is not None
                and results[0].untyped_storage()._cdata
                not in {value.untyped_storage()._cdata for value in args if isinstance(value, torch.Tensor)}
            ):
                self._remember(results[0], known)
            return
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                storage = self._storages.get(value.untyped_storage()._cdata)
                if storage is not None:
                    storage.values = None

    def _waits(self, name: str, args: Sequence[Any]) -> None:
        """Notes operators that the host waits in."""
        if name in WAITING:
            self.wait(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [value for value in args[1] if value is not None and value.dtype in (torch.bool, torch.uint8)]
            # A number that is put in by a mask alone is filled in, without a look at the mask.
            is_filled = name != "index" and args[2].numel() == 1 and _kind_of(args[2]) == "cpu"
            if masks and not (is_filled and len(masks) == sum(value is not None for value in args[1])):
                self.wait(f"{name} by a mask")
        elif name == "repeat_interleave" and len(args) < 2:
            self.wait(name)

    def _copies(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: torch.Tensor) -> None:
        """Notes copies between host and device that the host waits for."""
        source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
        if not isinstance(source, torch.Tensor) or _kind_of(source) == _kind_of(target):
            return
        is_asynchronous = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
        of_host = source if _kind_of(source) == "cpu" else target
        if name == "_to_copy" and of_host is target and is_asynchronous:
            self.pin(target)  # torch takes page-locked memory for it
        way = f"{_kind_of(source)} to {_kind_of(target)}"
        if not is_asynchronous:
            self.wait(f"copy {way}")
        elif not self.is_pinned(of_host):
            self.wait(f"copy {way}, memory not page-locked")

    def _communicates(self, name: str, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
        """Notes a message, and whether its tensors are where its backend takes them."""
        found = frames()
        site = found[0][0]
        message, group = message_of(name, args)
        # A pipeline's neighbours write to each other over the default group.
        group_name = "pipeline" if name in ("send", "recv_") else self.group_of(group)
        key = (name, group_name, site)
        self._phase.messages[key] = self._phase.messages.get(key, Message()) + message
        wanted = "cpu" if group_name == "control" else "cuda"
        for tensor in tensors if name != "barrier" else ():
            if _kind_of(tensor) != wanted:
                self._phase.misplaced[f"{name} over {group_name} of a tensor on {_kind_of(tensor)}: {found[0][1]}"] += 1
        if name == "barrier" and group_name != "control":
            self.wait("barrier")

    def _computes_on_host(self, func: Any, name: str, results: Sequence[torch.Tensor]) -> None:
        """Notes a large result of the host's own arithmetic."""
        if is_free(func, name) or name in ("_to_copy", "clone", "copy_"):
            return
        for tensor in results:
            if tensor.numel() * tensor.element_size() >= HOST_BYTES:
                self._phase.host_results[f"{name} {frames(1)[0][0]}"] += tensor.numel() * tensor.element_size()


def unknown(dtype: torch.dtype) -> float | int | bool:
    """What is read of a tensor whose value nobody knows."""
    if dtype.is_floating_point:
        return 1.0
    return False if dtype == torch.bool else 0
