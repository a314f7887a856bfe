"""Selective checkpointing: what is not kept, that it is computed once again, and that nothing of it stays behind."""

import gc
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from mlra_scale.model.recomputation import recomputed


def run(x: torch.Tensor, weights: list[torch.Tensor], compute: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Two linear maps of one GELU, whose output is kept unless `compute` is given."""
    activated = functional.gelu(x)
    if compute is None:
        outputs = [functional.linear(activated, weight) for weight in weights]
    else:
        source = x.detach()
        with recomputed(activated, lambda: compute(source)):
            outputs = [functional.linear(activated, weight) for weight in weights]
    del activated
    torch.autograd.backward([output.square().mean() for output in outputs])


def test_it_is_computed_once_for_all_readers_and_the_gradients_are_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weights = [torch.randn(3, 8, generator=generator, requires_grad=True) for _ in range(2)]
    calls = []

    def compute(source: torch.Tensor) -> torch.Tensor:
        calls.append(source.shape)
        return functional.gelu(source)

    run(x, weights, None)
    expected = [tensor.grad for tensor in (x, *weights)]
    for tensor in (x, *weights):
        tensor.grad = None
    run(x, weights, compute)
    assert len(calls) == 1
    for tensor, gradient in zip((x, *weights), expected, strict=True):
        assert gradient is not None and tensor.grad is not None
        assert torch.equal(tensor.grad, gradient)


def test_the_output_is_not_kept_and_the_graph_is_freed() -> None:
    kept, computed = [], WeakSet[torch.Tensor]()
    for is_recomputed in (False, True):
        x = torch.randn(4, 8, requires_grad=True)
        weight = torch.randn(3, 8, requires_grad=True)
        activated = functional.gelu(x)
        storage = StorageWeakRef(activated.untyped_storage())
        if is_recomputed:
            source = x.detach()

            def compute(source: torch.Tensor = source) -> torch.Tensor:
                again = functional.gelu(source)
                computed.add(again)
                return again

            with recomputed(activated, compute):
                output = functional.linear(activated, weight)
        else:
            output = functional.linear(activated, weight)
        del activated
        kept.append(not storage.expired())
        output.sum().backward()
    del output
    assert kept == [True, False]
    gc.collect()
    assert not computed
