"""The largest singular values of low-rank factors, by power iterations over the parts that ranks hold.

A vector per factor carries over from update to update; all ranks of a stage hold it, and compute with their parts of
the factors. Two sums over the ranks of the stage serve all factors together. Power iteration never overestimates (but
for rounding); how far below the true value it stays depends on how fast the factor changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional

from mlra_scale.model.parameters import ParameterInfo
from mlra_scale.model.randomness import keyed_generator
from mlra_scale.model.update_rules import VECTOR_PREFIX
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.topology import Topology

_FIRST_ITERATIONS = 16
"""Before the first update, from random vectors."""


@dataclass(frozen=True)
class _Window:
    """Where a fragment of a matrix [M, N] lies in it: rows and columns of the rectangle that it is a part of."""

    rows: slice
    columns: slice
    skipped: int  # elements of the first row before the fragment
    num_rows: int
    num_columns: int


def _window(info: ParameterInfo, fragment: Fragment, topology: Topology) -> _Window:
    rows, columns = info.local_shape(topology.tensor)
    first_row = rows * topology.tensor_rank if info.shard_dim == 0 else 0
    first_column = columns * topology.tensor_rank if info.shard_dim == 1 else 0
    row, skipped = divmod(fragment.start, columns)
    num_rows = math.ceil((skipped + fragment.values.numel()) / columns)
    start = first_row + row
    return _Window(
        slice(start, start + num_rows), slice(first_column, first_column + columns), skipped, num_rows, columns
    )


def _rectangle(values: torch.Tensor, window: _Window) -> torch.Tensor:
    """The fragment as a matrix of whole rows; elements of its first and last row that others hold are zero."""
    numel = window.num_rows * window.num_columns
    if values.numel() < numel:
        padding = (window.skipped, numel - window.skipped - values.numel())
        values = functional.pad(values, padding)
    return values.view(window.num_rows, window.num_columns)


class FactorNorms:
    """Estimates of the largest singular values of the factors of a stage. Collective over its ranks.

    Args:
        infos: The factors of the stage, the same on all its ranks.
        owns: Whether this rank, of all that hold the same elements of a parameter, is the one that counts them.
    """

    def __init__(
        self, infos: Sequence[ParameterInfo], topology: Topology, owns: Callable[[str], bool], seed: int
    ) -> None:
        self._infos = {info.name: info for info in infos}
        self._topology = topology
        self._owns = owns
        self._seed = seed
        self._vectors: dict[str, torch.Tensor] = {}

    def advance(self, masters: Mapping[str, Fragment]) -> dict[str, torch.Tensor]:
        """Does one iteration, or several before the first update.

        Args:
            masters: The fp32 fragments of the factors that this rank holds, by name.

        Returns:
            The estimate of every factor, a tensor of one number on the device, equal on all ranks of the stage.
        """
        num_iterations = 1
        if not self._vectors:
            self._vectors = {name: self._initial_vector(info) for name, info in self._infos.items()}
            num_iterations = _FIRST_ITERATIONS
        parts = []
        for name, fragment in masters.items():
            if name in self._infos and self._owns(name):
                window = _window(self._infos[name], fragment, self._topology)
                parts.append((name, window, fragment.values))
        norms: dict[str, torch.Tensor] = {}
        for _ in range(num_iterations):
            norms = self._iterate(parts)
        return norms

    def _iterate(self, parts: Sequence[tuple[str, _Window, torch.Tensor]]) -> dict[str, torch.Tensor]:
        device = self._topology.device
        images = self._sums({name: info.shape[0] for name, info in self._infos.items()})
        for name, window, values in parts:
            rectangle = _rectangle(values.to(device), window)
            images.of[name][window.rows].add_(rectangle @ self._vectors[name][window.columns])
        images.add_up()
        lefts = {name: functional.normalize(image, dim=0) for name, image in images.of.items()}
        pullbacks = self._sums({name: info.shape[1] for name, info in self._infos.items()})
        for name, window, values in parts:
            rectangle = _rectangle(values.to(device), window)
            pullbacks.of[name][window.columns].add_(rectangle.T @ lefts[name][window.rows])
        pullbacks.add_up()
        self._vectors = {name: functional.normalize(pulled, dim=0) for name, pulled in pullbacks.of.items()}
        return {name: pulled.norm() for name, pulled in pullbacks.of.items()}

    def _sums(self, sizes: Mapping[str, int]) -> "_Sums":
        return _Sums(sizes, self._topology)

    def _initial_vector(self, info: ParameterInfo) -> torch.Tensor:
        vector = torch.randn(info.shape[1], generator=keyed_generator(self._seed, f"{VECTOR_PREFIX}{info.name}"))
        return functional.normalize(vector, dim=0).to(self._topology.device)

    def stored_vectors(self) -> dict[str, torch.Tensor]:
        """Returns what a checkpoint keeps, in host memory; empty before the first update."""
        return {VECTOR_PREFIX + name: vector.to("cpu", copy=True) for name, vector in self._vectors.items()}

    def load_vectors(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Takes the vectors of this stage from a checkpoint; without them the next update begins anew."""
        names = [name for name in self._infos if VECTOR_PREFIX + name in stored]
        self._vectors = {}
        if len(names) == len(self._infos):
            device = self._topology.device
            self._vectors = {name: stored[VECTOR_PREFIX + name].to(device, torch.float32, copy=True) for name in names}


class _Sums:
    """A vector per factor, all in one buffer that is summed over the ranks of a stage."""

    def __init__(self, sizes: Mapping[str, int], topology: Topology) -> None:
        self._buffer = torch.zeros(sum(sizes.values()), device=topology.device)
        self._group = topology.stage_group
        self.of = dict(zip(sizes, self._buffer.split(list(sizes.values())), strict=True))

    def add_up(self) -> None:
        dist.all_reduce(self._buffer, group=self._group)
