"""The largest singular values of low-rank factors, by power iterations over the parts that ranks hold.

A vector per factor carries over from update to update; all ranks of a stage hold it, and compute with their parts of
the factors. Two sums over the ranks of the stage serve all factors together. Power iteration never overestimates (but
for rounding); how far below the true value it stays depends on how fast the factor changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch.nn import functional

from mlra_scale.model.parameters import ParameterInfo
from mlra_scale.model.randomness import keyed_generator
from mlra_scale.model.update_rules import VECTOR_PREFIX, other_factor
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.topology import Topology

_SMALLEST_NORM = 1e-12
"""A vector whose norm is smaller is divided by this instead."""

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
        # The factors of one shape lie side by side, so that their vectors can be normalised at once.
        self._infos = {info.name: info for info in sorted(infos, key=lambda info: info.shape)}
        position = {name: index for index, name in enumerate(self._infos)}
        others = [position[other_factor(name)] for name in position]
        self._others = torch.tensor(others, device=topology.device)
        self._topology = topology
        self._owns = owns
        self._seed = seed
        self._vectors: dict[str, torch.Tensor] = {}
        self._norms = torch.ones(len(others), device=topology.device)

    def advance(self, masters: Mapping[str, Fragment]) -> None:
        """Does one iteration, or several before the first update.

        Args:
            masters: The fp32 fragments of the factors that this rank holds, by name.
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
        for _ in range(num_iterations):
            self._iterate(parts)

    def estimates(self) -> dict[str, torch.Tensor]:
        """Returns those of the last iteration, tensors of one number on the device, equal on all ranks of the stage."""
        return dict(zip(self._infos, self._norms.unbind(), strict=True))

    def divisors(self) -> dict[str, torch.Tensor]:
        """Returns, by factor, 1 and the estimates of it and of the other factor of its map, added up."""
        return dict(zip(self._infos, (self._norms + self._norms[self._others] + 1.0).unbind(), strict=True))

    def _iterate(self, parts: Sequence[tuple[str, _Window, torch.Tensor]]) -> None:
        device = self._topology.device
        images = self._sums(dim=0)
        for name, window, values in parts:
            images.of[name][window.rows].addmv_(
                _rectangle(values.to(device), window), self._vectors[name][window.columns]
            )
        images.normalise()
        pullbacks = self._sums(dim=1)
        for name, window, values in parts:
            rectangle = _rectangle(values.to(device), window)
            pullbacks.of[name][window.columns].addmv_(rectangle.T, images.of[name][window.rows])
        self._norms = pullbacks.normalise()
        self._vectors = pullbacks.of

    def _sums(self, dim: int) -> "_Sums":
        return _Sums({name: info.shape[dim] for name, info in self._infos.items()}, self._topology)

    def _initial_vector(self, info: ParameterInfo) -> torch.Tensor:
        vector = torch.randn(info.shape[1], generator=keyed_generator(self._seed, f"{VECTOR_PREFIX}{info.name}"))
        return functional.normalize(vector, dim=0).to(self._topology.device)

    def stored_vectors(self) -> dict[str, torch.Tensor]:
        """Returns what a checkpoint keeps, in host memory; empty before the first update."""
        if not self._vectors:
            return {}
        packed = torch.cat(list(self._vectors.values())).cpu()
        parts = packed.split([vector.numel() for vector in self._vectors.values()])
        return {VECTOR_PREFIX + name: part.clone() for name, part in zip(self._vectors, parts, strict=True)}

    def load_vectors(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Takes the vectors of this stage, of all factors or none; without them the next update begins anew."""
        names, device = [name for name in self._infos if VECTOR_PREFIX + name in stored], self._topology.device
        self._vectors = {name: stored[VECTOR_PREFIX + name].to(device, torch.float32, copy=True) for name in names}


class _Sums:
    """A vector per factor, all in one buffer that is summed over the ranks of a stage."""

    def __init__(self, sizes: Mapping[str, int], topology: Topology) -> None:
        self._buffer = torch.zeros(sum(sizes.values()), device=topology.device)
        self._group = topology.stage_group
        self._lengths = [(length, len(list(same))) for length, same in groupby(sizes.values())]
        self.of = dict(zip(sizes, self._buffer.split(list(sizes.values())), strict=True))

    def add_up(self) -> None:
        dist.all_reduce(self._buffer, group=self._group)

    def normalise(self) -> torch.Tensor:
        """Adds up over the ranks, divides each vector by its norm, and returns the norms."""
        self.add_up()
        found: list[torch.Tensor] = []
        for vectors in self._buffer.split([length * count for length, count in self._lengths]):
            length, count = self._lengths[len(found)]
            rows = vectors.view(count, length)
            norms = torch.linalg.vector_norm(rows, dim=1)
            rows.div_(norms.clamp(min=_SMALLEST_NORM)[:, None])
            # Of a factor that is zero; the iteration continues from here when it no longer is.
            rows.masked_fill_((norms == 0.0)[:, None], length**-0.5)
            found.append(norms)
        return torch.cat(found)
