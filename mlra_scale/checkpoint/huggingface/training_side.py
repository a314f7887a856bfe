"""The logits of the trained model, computed by the training's own layers from a store, one layer in memory at a time.

An export is compared with these logits. The code shares neither names nor merging nor model with the export.

Shape suffixes: N sequences, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from mlra_scale.model.context import ModelContext
from mlra_scale.model.embedding import TokenEmbedding
from mlra_scale.model.gpt import model_layers
from mlra_scale.model.spectral import load_vectors, spectral_norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlra_scale.checkpoint.reader import Store


POSITIONS_AT_ONCE = 64
"""Logits are computed for this many positions at a time; those of a whole sequence can be larger than the model."""


class _Context(ModelContext):
    """A context whose layers are built without values: their memory is never touched."""

    def initialize(self, name: str) -> Callable[[torch.Tensor], None]:
        """Returns a function that leaves a new weight as it is: that of a store takes its place."""
        return lambda tensor: None

    @cached_property
    def megatron(self) -> Any:
        """Megatron's configuration of the layers."""
        return replace(super().megatron, perform_initialization=False)


@contextlib.contextmanager
def distributed_of_one() -> Iterator[None]:
    """Initializes torch.distributed, which Megatron's layers require, where it is not initialized yet."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class TrainingSide:
    """The forward pass of a stored model over a few sequences, with weights and computation in one type."""

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        self._store = store
        self._dtype = dtype
        self._vectors = store.buffers()
        # A group of one without means to communicate: any attempt would fail.
        self._context = _Context(store.model, seed=0, tensor_group=dist.ProcessGroup(dist.HashStore(), 0, 1))

    @torch.no_grad()
    def logits(self, tokens_NS: torch.Tensor) -> Iterator[torch.Tensor]:
        """Computes the logits of every position of token ids [N, S]; to be called within `distributed_of_one`.

        All sequences pass a layer together, so that each layer is read once. A token sees all earlier ones of its
        sequence, whatever the documents are.

        Yields:
            Logits [S, V] in fp32 of at most POSITIONS_AT_ONCE positions of one sequence, in order, without the columns
            that pad the vocabulary.
        """
        positions_NS = torch.arange(tokens_NS.shape[1]).expand_as(tokens_NS)
        nothing = torch.zeros_like(tokens_NS)
        stream = (tokens_NS, positions_NS, nothing, nothing[:, 0])
        layers = model_layers(self._context)
        for layer in layers:
            module = layer.build()
            self._fill(module, layer.name)
            stream = module.eval()(stream)
            del module
        assert isinstance(stream, torch.Tensor)
        head = layers[0].build()
        assert isinstance(head, TokenEmbedding)
        self._fill(head, layers[0].name)
        for hidden_SD in stream:
            for part_SD in hidden_SD.split(POSITIONS_AT_ONCE):
                yield head.logits(part_SD)[:, : self._store.model.vocab_size].float()

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Sets the weights of a layer; in fp32 those that lie in one piece stay in the mapped file."""
        for name, parameter in module.named_parameters():
            weight = self._store.tensor(f"{prefix}.{name}")
            assert weight.shape == parameter.shape, (prefix, name)
            parameter.data = weight.to(self._dtype)
        load_vectors(spectral_norms(module), self._vectors)
