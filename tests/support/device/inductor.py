"""A block's forward and backward pass through inductor and Triton, compiled for a GPU that is not there.

Runs in a process of its own. Inductor asks Triton's driver for a device to run on and to tune with; here it learns that
there is an NVIDIA GPU of compute capability 9.0, and kernels are compiled to machine code and not loaded.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

MARK = "compiled: "
CAPABILITY = 90
NUM_SAMPLES, LENGTH = 4, 1024


def main(overrides: list[str]) -> None:
    """Compiles a block of gpt2-mlra-72l and prints, as JSON, its kernels and what it calls beside them."""
    from tests.support.device import cuda_stubs

    cuda_stubs.install(0, lambda _: None)
    import torch

    _install_device()
    with torch._subclasses.FakeTensorMode():
        graph, inputs = _joint_graph(overrides)
    kernels: list[dict[str, Any]] = []
    with _compiled_kernels(kernels), _written_code() as written:
        from torch._inductor.compile_fx import compile_fx_inner

        compile_fx_inner(graph, inputs)
    (code,) = written
    report = {
        "kernels": kernels,
        "launches": len(re.findall(r"triton_\w+\.run\(", code)),
        "products": len(re.findall(r"extern_kernels\.(?:mm|addmm|bmm)\(", code)),
        "attention": re.findall(r"aten\.(_scaled_dot\w+)", code),
    }
    print(MARK + json.dumps(report), flush=True)


def _install_device() -> None:
    """Makes the device known to Triton and inductor."""
    import torch
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as inductor
    import torch._inductor.runtime.triton_helpers as helpers
    import torch.utils._triton as available

    from tests.support.device.cuda_stubs import PROPERTIES

    triton_driver: Any = importlib.import_module("triton.runtime").driver
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", CAPABILITY, 32)
    triton_driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            set_current_device=lambda device: None,
            get_device_interface=lambda: torch.cuda,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            map_python_to_cpp_type=lambda kind: kind,
        )
    )

    cuda: Any = interfaces.CudaInterface

    class Interface(cuda):
        """What inductor asks of CUDA."""

        class Worker(cuda.Worker):
            get_device_properties = staticmethod(lambda device=None: PROPERTIES)
            current_device = staticmethod(lambda: 0)
            set_device = staticmethod(lambda device: None)

        is_available = staticmethod(lambda: True)
        get_device_properties = staticmethod(lambda device=None: PROPERTIES)
        get_compute_capability = staticmethod(lambda device=None: CAPABILITY)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)
        synchronize = staticmethod(lambda device=None: None)
        device_count = staticmethod(lambda: 1)
        get_raw_stream = staticmethod(lambda device=0: 0)
        exchange_device = maybe_exchange_device = staticmethod(lambda device: 0)

    interfaces.get_registered_device_interfaces()
    for name in ("cuda", "cuda:0"):
        interfaces.register_interface_for_device(name, Interface)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda._is_compiled = lambda: True
    available.has_triton = lambda *_: True  # type: ignore[assignment]
    helpers.set_driver_to_gpu = lambda: None
    for name, value in (
        ("fx_graph_cache", False),
        ("compile_threads", 1),
        ("use_static_triton_launcher", False),
        ("use_static_cuda_launcher", False),
    ):
        if hasattr(inductor, name):  # one of the last two, by torch's version
            setattr(inductor, name, value)


def _joint_graph(overrides: list[str]) -> tuple[Any, list[Any]]:
    """The graph of a block's forward and backward pass, and its inputs."""
    import torch
    import torch.distributed as dist
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    from mlra_scale.config.loading import load_named_config
    from mlra_scale.model.block import Block
    from mlra_scale.model.context import ModelContext

    config, _ = load_named_config("gpt2-mlra-72l", None, None, overrides)
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # has no means to communicate
    block = Block(ModelContext(config.model, 1, group), 0).to(torch.device("cuda"), torch.bfloat16)
    names, weights = zip(*block.named_parameters(), strict=True)
    shape = (NUM_SAMPLES, LENGTH, config.model.hidden_size)
    hidden_BSD = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    norms = [norm for norm in (block.attention_norm, block.mlp_norm) if norm.factor is not None]

    def step(hidden_BSD: Any, gradient_BSD: Any, *rest: Any) -> list[Any]:
        factors, weights = rest[: len(norms)], rest[len(norms) :]
        for norm, factor in zip(norms, factors, strict=True):
            norm.factor = factor
        output = torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (hidden_BSD,))
        return [output, *torch.autograd.grad(output, [hidden_BSD, *weights], gradient_BSD)]

    with _flash_attention():
        inputs = [hidden_BSD, torch.empty_like(hidden_BSD), *(norm.factor for norm in norms), *weights]
        graph = make_fx(step, decomposition_table=select_decomp_table())(*inputs)
    graph.graph.eliminate_dead_code()
    return graph, [tensor.detach() for tensor in inputs]


@contextmanager
def _flash_attention() -> Iterator[None]:
    """scaled_dot_product_attention's choice on a GPU, which a build for CPUs does not make."""
    import torch
    from torch.nn import functional

    def attend(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False) -> Any:
        assert attn_mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        yield


@contextmanager
def _compiled_kernels(found: list[dict[str, Any]]) -> Iterator[None]:
    """Compiles Triton's kernels without loading them, and notes each."""
    import torch._inductor.runtime.triton_heuristics as heuristics

    precompile = heuristics.CachingAutotuner.precompile

    def compile_only(self: Any, *_: Any, **__: Any) -> None:
        precompile(self, warm_cache_only=True)
        for result in self.compile_results:
            binary = result.kernel.asm.get("cubin", b"")
            found.append({"name": self.fn.__name__, "bytes": len(binary), "shared": result.kernel.metadata.shared})

    with mock.patch.object(heuristics.CachingAutotuner, "precompile", compile_only):
        yield


@contextmanager
def _written_code() -> Iterator[list[str]]:
    """The Python code that inductor writes."""
    from torch._inductor.graph import GraphLowering

    codegen, written = GraphLowering.codegen, list[str]()

    def noted(self: Any) -> Any:
        result = codegen(self)
        written.append(getattr(result[0], "value", str(result[0])))
        return result

    with mock.patch.object(GraphLowering, "codegen", noted):
        yield written


if __name__ == "__main__":
    from tests.support.device import fake_cuda

    fake_cuda.load()  # before torch is imported
    main(sys.argv[1:])
