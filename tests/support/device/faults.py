"""Faults that are put into a traced rank on purpose: each must make the trace fail, or the trace would see nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _changed_output(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Has every feed-forward layer's output go through a function."""
    from mlra_scale.model.block import FeedForward

    forward = FeedForward.forward
    FeedForward.forward = lambda self, hidden_BSD: change(forward(self, hidden_BSD))  # type: ignore[method-assign]


def reads_a_value() -> None:
    """Every block asks for a number of the device, as a look at the largest activation would."""

    def watched(output_BSD: torch.Tensor) -> torch.Tensor:
        assert output_BSD.detach().amax().item() < float("inf")
        return output_BSD

    _changed_output(watched)


def waits_if_behind() -> None:
    """Every block waits for what it has just started, unless that is already done."""

    def watched(output_BSD: torch.Tensor) -> torch.Tensor:
        done = torch.cuda.Event()
        done.record()
        if not done.query():
            done.synchronize()
        return output_BSD

    _changed_output(watched)


def gathers_from_all() -> None:
    """Every feed-forward layer's output is summed over all ranks, in no group of the mesh."""
    import torch.distributed as dist

    def summed(output_BSD: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(output_BSD.detach().clone())
        return output_BSD

    _changed_output(summed)


def mixes_devices() -> None:
    """Every block adds a tensor that was left on the host."""
    _changed_output(lambda output_BSD: output_BSD + torch.zeros(output_BSD.size(-1), dtype=output_BSD.dtype))


def copies_from_host() -> None:
    """Every block brings a tensor of the host to the device each time."""
    _changed_output(lambda output_BSD: output_BSD + torch.zeros(output_BSD.shape[1:]).to(output_BSD))


def leaves_a_buffer() -> None:
    """The embedding's padding bias goes back to the host after the engine is built."""
    from mlra_scale.parallel.engine import Engine

    install = Engine._install

    def install_and_leave(self: Any, *arguments: Any, **options: Any) -> None:
        install(self, *arguments, **options)
        for module in self.module.modules():
            if getattr(module, "padding_bias_V", None) is not None:
                module.register_buffer("left_behind", module.padding_bias_V.cpu(), persistent=False)

    Engine._install = install_and_leave  # type: ignore[method-assign]


def keeps_a_chunk() -> None:
    """The head's last chunk of logits lives until the next one is there."""
    from mlra_scale.model.loss import _Head

    losses = _Head.losses
    kept: list[Any] = []

    def keeping(self: Any, *arguments: Any) -> Any:
        found = losses(self, *arguments)
        kept[:] = [found]
        return found

    _Head.losses = keeping  # type: ignore[assignment, method-assign]


def multiplies_in_fp32() -> None:
    """Every block has a matrix product in fp32."""
    _changed_output(lambda output_BSD: (output_BSD.float() @ torch.eye(output_BSD.size(-1)).cuda()).to(output_BSD))


def sends_twice() -> None:
    """The sum over tensor-parallel ranks is taken once too often in every feed-forward layer."""
    import torch.distributed as dist

    from mlra_scale.parallel.topology import Topology

    groups: list[Any] = []
    made = Topology.__init__

    def noted(self: Topology, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        groups.append(self.tensor_group)

    Topology.__init__ = noted  # type: ignore[method-assign]

    def summed(output_BSD: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(output_BSD.detach().clone(), group=groups[0])
        return output_BSD

    _changed_output(summed)


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        reads_a_value,
        waits_if_behind,
        gathers_from_all,
        mixes_devices,
        copies_from_host,
        leaves_a_buffer,
        keeps_a_chunk,
        multiplies_in_fp32,
        sends_twice,
    )
}
