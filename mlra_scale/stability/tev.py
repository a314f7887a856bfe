"""Token embedding variability: the spread of each token's embedding over its coordinates, from any sharding.

TEV_i is the population standard deviation (ddof 0) of row i of the embedding over its D coordinates; its mean and its
standard deviation over the real tokens are the two numbers to watch (Chung et al. 2024, arXiv 2409.07787). Padded rows
are left out.

One algorithm serves every layout: a rank measures the runs of elements that it owns, wherever they are cut, and the
matrix itself never moves. Element `start` of the flattened rows of tensor rank tau is element tau (V' / t) D + start of
the whole matrix, with V' padded rows over t tensor ranks. Under ZeRO 3 data rank r of R holds elements r s to (r + 1) s
of the n = V' D / t of its tensor rank, s = ceil(n / R), so that a row may be cut. Three messages are exchanged: the
longest length (maximum); four numbers per rank and four per piece of a cut row (all-gather); D column sums and, for
quantiles and extremes, one value per token (sum).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mlra_scale.stability.moments import (
    Moments,
    merge_all,
    row_moments,
    row_moments_and_column_sums,
    split_at_rows,
)
from mlra_scale.stability.watcher import Step, Watcher, is_due

if TYPE_CHECKING:  # the plain function and mlra-scale tev do without the libraries behind these
    from mlra_scale.config import Config, TevConfig
    from mlra_scale.model.parameters import ParameterTable
    from mlra_scale.parallel import Engine, StepResult
    from mlra_scale.parallel.fragments import Fragment
    from mlra_scale.parallel.topology import Topology

DEFAULT_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class TevStatistics:
    """The distribution of TEV over the tokens, and two more numbers of the embedding.

    Attributes:
        mean: Mean TEV over the tokens.
        std: Population standard deviation of TEV over the tokens.
        quantiles: Probability -> TEV, interpolated linearly.
        mean_embedding_norm: Euclidean norm of the mean of all embeddings.
        mean_row_rms: Mean over the tokens of the root mean square of the embedding.
        num_tokens: Number of tokens.
        highest: (token, TEV) of the tokens with the highest TEV, the highest first.
        lowest: The same of the lowest, the lowest first.
    """

    mean: float
    std: float
    quantiles: dict[float, float]
    mean_embedding_norm: float
    mean_row_rms: float
    num_tokens: int
    highest: list[tuple[int, float]]
    lowest: list[tuple[int, float]]


@dataclass(frozen=True)
class TevRequest:
    """The size of the matrix, without padding, and which numbers of the distribution to compute."""

    num_tokens: int
    hidden_size: int
    quantiles: Sequence[float] = DEFAULT_QUANTILES
    extremes: int = 0

    @property
    def needs_values(self) -> bool:
        """Whether TEV of each token is needed, and not only its mean and spread."""
        return bool(self.quantiles) or self.extremes > 0


# Sent by each rank as float64: number, mean and standard deviation of TEV over its whole rows, and their mean RMS; then
# for each piece of a row (row, count, mean, standard deviation).
HEADER = 4
PIECE = 4


def report(request: TevRequest, parts: Iterable[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Measures what one rank owns of the matrix, chunk by chunk where the values are.

    Args:
        request: What to measure.
        parts: Flat offset in the matrix and 1-D values of each run of elements.
        device: Of the result.

    Returns:
        To be gathered from all ranks: header and pieces of rows.
        To be summed over all ranks: column sums [D], then, if the request needs the values, TEV of each token whose row
        is whole on this rank and zero elsewhere [V] (a sum that is exact).
    """
    num_tokens, width = request.num_tokens, request.hidden_size
    whole: list[tuple[int, Tensor, Tensor]] = []
    """First row, means and TEV of runs of whole rows."""
    cut_rows: list[tuple[int, int]] = []
    """Row and length of each piece of a row."""
    pieces = [torch.zeros(0, 2, dtype=torch.float64, device=device)]
    column_sum_D = torch.zeros(width, dtype=torch.float64, device=device)
    for offset, values in parts:
        values = values.detach()[: max(0, num_tokens * width - offset)]
        for start, stop in split_at_rows(offset, offset + values.numel(), width):
            span = values[start - offset : stop - offset]
            row, column = divmod(start, width)
            if span.numel() % width:
                column_sum_D[column : column + span.numel()] += span.to(device)
                cut_rows.append((row, span.numel()))
                pieces.append(torch.stack(row_moments(span[None]), dim=1).to(device))
            else:
                mean, tev, sums = row_moments_and_column_sums(span.view(-1, width))
                column_sum_D += sums.to(device)
                whole.append((row, mean.to(device), tev.to(device)))
    header = column_sum_D.new_zeros(HEADER)
    if whole:
        mean, tev = torch.cat([mean for _, mean, _ in whole]), torch.cat([tev for _, _, tev in whole])
        header[0].fill_(tev.numel())  # an assignment would copy from the host, and wait
        header[1], header[2] = row_moments(tev[None])
        header[3] = torch.hypot(mean, tev).mean()
    rows_and_counts = torch.tensor(cut_rows, dtype=header.dtype, device=device).view(-1, 2)
    gathered = torch.cat([header, torch.cat([rows_and_counts, torch.cat(pieces)], dim=1).flatten()])
    if not request.needs_values:
        return gathered, column_sum_D
    tev_V = column_sum_D.new_zeros(num_tokens)
    for row, _, tev in whole:
        tev_V[row : row + tev.numel()] = tev
    return gathered, torch.cat([column_sum_D, tev_V])


def combine(request: TevRequest, gathered: Sequence[np.ndarray], summed: np.ndarray) -> TevStatistics:
    """Computes the statistics of the matrix from the reports of all ranks.

    Args:
        request: What was measured.
        gathered: The first part of every rank's report, in their order; zeros may follow.
        summed: The sum of the second parts.
    """
    tev = merge_all(Moments.of(part[0], part[1], part[2]) for part in gathered)
    rms = merge_all(Moments.of(part[0], part[3], 0.0) for part in gathered)
    boundary: dict[int, Moments] = {}
    for part in gathered:
        for row, count, mean, std in part[HEADER:].reshape(-1, PIECE):
            if count:
                boundary[int(row)] = boundary.get(int(row), Moments()).merge(Moments.of(count, mean, std))
    for row, moments in sorted(boundary.items()):
        assert moments.count == request.hidden_size, f"row {row} has {moments.count} of {request.hidden_size} elements"
        tev = tev.merge(Moments.of(1, moments.std, 0.0))
        rms = rms.merge(Moments.of(1, math.hypot(moments.mean, moments.std), 0.0))
    assert tev.count == request.num_tokens, f"{tev.count} of {request.num_tokens} rows have an owner"
    mean_embedding_norm = float(np.linalg.norm(summed[: request.hidden_size] / request.num_tokens))
    values = summed[request.hidden_size :].copy()
    if request.needs_values:
        values[list(boundary)] = [moments.std for moments in boundary.values()]
    return TevStatistics(
        mean=tev.mean,
        std=tev.std,
        quantiles={q: float(np.quantile(values, q)) for q in request.quantiles},
        mean_embedding_norm=mean_embedding_norm,
        mean_row_rms=rms.mean,
        num_tokens=request.num_tokens,
        # A token with elements that are not finite has no TEV, and is what one looks for.
        highest=_first(np.where(np.isnan(values), -np.inf, -values), values, request.extremes),
        lowest=_first(values, values, request.extremes),
    )


def _first(keys: np.ndarray, values: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Returns (token, value) of the smallest keys; the lower token first where they are equal."""
    order: Iterable[Any] = np.argsort(keys, kind="stable")[:count] if count else ()
    return [(int(token), float(values[token])) for token in order]


def tev_of_matrix(
    matrix: Any, num_rows: int | None = None, quantiles: Sequence[float] = DEFAULT_QUANTILES, extremes: int = 0
) -> TevStatistics:
    """Returns TEV of a whole matrix.

    Args:
        matrix: [rows, D], numpy or torch, of any floating type.
        num_rows: Number of real tokens; the rows after them are padding. None: all rows.
        quantiles: Probabilities in [0, 1].
        extremes: How many of the highest and of the lowest tokens to list.

    Raises:
        ValueError: It is no matrix of real numbers, or an argument is out of its range.
    """
    if not isinstance(matrix, Tensor):
        matrix = np.asarray(matrix)
        if matrix.dtype.kind not in "biuf":
            raise ValueError(f"it is no model and no matrix of real numbers, but {matrix.dtype} {list(matrix.shape)}")
        if matrix.dtype.kind == "f":  # of any order of bytes and elements, and of any precision
            matrix = matrix.astype(np.float64 if matrix.itemsize > 8 else matrix.dtype.newbyteorder("="), order="C")
        matrix = torch.from_numpy(matrix)
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(f"an embedding is a matrix of real numbers, not {matrix.dtype} {list(matrix.shape)}")
    request = checked_request(tuple(matrix.shape), num_rows, quantiles, extremes)
    return measure(request, [(0, matrix.reshape(-1))], matrix.device, ())


def checked_request(
    shape: tuple[int, ...], num_rows: int | None, quantiles: Sequence[float], extremes: int
) -> TevRequest:
    """Returns the request for a matrix [rows, D], whose rows from `num_rows` on are padding.

    Raises:
        ValueError: It has no elements, or an argument is out of its range.
    """
    rows, hidden_size = shape
    if not rows or not hidden_size:
        raise ValueError(f"the matrix has no elements: its shape is {list(shape)}")
    num_rows = rows if num_rows is None else num_rows
    if not isinstance(num_rows, Integral) or not 0 < num_rows <= rows:
        raise ValueError(f"the number of real tokens is {num_rows!r}; use 1 to {rows}, the rows of the matrix")
    if not all(0.0 <= quantile <= 1.0 for quantile in quantiles):
        raise ValueError(f"quantiles is {list(quantiles)}; use probabilities from 0 to 1")
    if not isinstance(extremes, Integral) or extremes < 0:
        raise ValueError(f"extremes is {extremes!r}; use the number of tokens to list, 0 or more")
    return TevRequest(num_rows, hidden_size, quantiles, extremes)


def measure(
    request: TevRequest,
    parts: Iterable[tuple[int, Tensor]],
    device: torch.device,
    groups: Sequence[dist.ProcessGroup | None],
) -> TevStatistics:
    """Measures TEV of a matrix whose elements are spread over the ranks of some groups; collective.

    Args:
        request: What to measure.
        parts: See `report`. Every element has one owner among the ranks that the groups reach.
        device: Of what is exchanged.
        groups: Of the ranks that exchange, one group after another: one (None: all ranks), or one for each dimension of
            a mesh of ranks along which the matrix is cut. Empty: this process holds the whole matrix.

    Returns:
        The same numbers on every rank.
    """
    gathered, summed = report(request, parts, device)
    gathered_of_all = _all_gather(gathered, groups)
    for group in groups:
        dist.all_reduce(summed, group=group)
    return combine(request, gathered_of_all, summed.cpu().numpy())


class TevHook:
    """Measures TEV of the token embedding of a sharded model, whatever the layout.

    The rows from `vocab_size` on are padding.
    """

    def __init__(self, table: ParameterTable, topology: Topology, config: TevConfig, vocab_size: int):
        (embedding,) = (info for info in table.values() if info.kind == "embedding")
        assert embedding.shard_dim == 0, "fragments of a matrix sharded by columns are not runs of the whole matrix"
        rows_local, hidden_size = embedding.local_shape(topology.tensor)
        self.name = embedding.name
        self.first = topology.tensor_rank * rows_local * hidden_size
        self.device = topology.device
        self.request = TevRequest(vocab_size, hidden_size, config.quantiles, config.extremes)

    def measure(self, fragments: Iterable[Fragment]) -> TevStatistics:
        """Measures TEV; collective.

        Args:
            fragments: The fp32 master weights that this rank owns. Every element of the embedding has one owner.
        """
        mine = ((self.first + fragment.start, fragment.values) for fragment in fragments if fragment.name == self.name)
        return measure(self.request, mine, self.device, (None,) if dist.is_initialized() else ())


def _all_gather(mine: Tensor, groups: Sequence[dist.ProcessGroup | None]) -> list[np.ndarray]:
    """Gathers vectors whose lengths differ between ranks, padded with zeros."""
    if not groups:
        return [mine.cpu().numpy()]
    longest = torch.full((1,), mine.numel(), device=mine.device)
    for group in groups:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    length = int(longest)
    collected = torch.zeros(length, dtype=mine.dtype, device=mine.device)
    collected[: mine.numel()] = mine
    for group in groups:
        padded, collected = collected, collected.new_zeros(dist.get_world_size(group) * collected.numel())
        dist.all_gather_into_tensor(collected, padded, group=group)
    return list(collected.cpu().numpy().reshape(-1, length))


class TevWatcher(Watcher):
    """Records TEV before the first step of a run, every `tev.every` steps and at the last one."""

    name, is_timed = "tev", True

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine, self._every, self._last = engine, config.tev.every, config.train.steps
        self._hook = TevHook(engine.table, engine.topology, config.tev, config.model.vocab_size)

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        return self.measure(step.number)

    def measure(self, step: int) -> dict[str, Any]:
        """Measures TEV, if it is due at a step (0: before the first one); returns values for the record."""
        if self._every == 0 or not is_due(step, self._every, self._last):
            return {}
        return tev_values(self._hook.measure(self._engine.owned_fragments()))


def tev_values(statistics: TevStatistics) -> dict[str, Any]:
    """Returns the values of a TEV measurement in the form of the record."""
    values: dict[str, Any] = {
        "tev_mean": statistics.mean,
        "tev_std": statistics.std,
        "tev_quantiles": {f"{quantile:g}": value for quantile, value in statistics.quantiles.items()},
        "mean_embedding_norm": statistics.mean_embedding_norm,
        "mean_row_rms": statistics.mean_row_rms,
    }
    if statistics.highest:
        values |= {"tev_highest": statistics.highest, "tev_lowest": statistics.lowest}
    return values
