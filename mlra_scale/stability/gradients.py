"""Statistics of gradients, weights and updates per kind of weight and per block, and the gradient noise scale.

Each rank measures the runs of elements that it owns, for every engine and ZeRO stage, and only a few numbers per kind
and block are summed over the ranks. Tied and replicated weights have one owner, so they count once; padded rows of the
vocabulary do not count.

Means and variances are float64 without cancellation: each run of elements has its own mean and squared deviations
(stability.moments), and the runs are merged by Chan's formula for many sets at once (Chan, Golub and LeVeque 1979):
first the mean of all, by one all-reduce, then M2 = sum_i M2_i + n_i (mean_i - mean)^2 by another.

An update of AdamW is computed from the moments after it, so no copy of the weights from before it is needed (Loshchilov
and Hutter 2019, arXiv 1711.05101, algorithm 2):
    w = w_before (1 - lr decay) - lr step,  step = m_hat / (sqrt(v_hat) + eps),
so that w - w_before = -lr (step + decay w) / (1 - lr decay). An orthogonalised update (muon, spectron) does not follow
from an element's own momentum: these weights are copied before the update, at measuring steps only. The copy takes as
much as the second moment that they do not have.

Legend of shape suffixes: F runs of elements (fragments, cut into chunks), G groups, P pairs of a run and a group of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlra_scale.stability.moments import CPU_CHUNK, row_moments
from mlra_scale.stability.spectral import AttentionProducts
from mlra_scale.stability.watcher import Step, Watcher, is_due

if TYPE_CHECKING:  # the libraries behind an engine
    from mlra_scale.config import Config
    from mlra_scale.model.parameters import ParameterInfo, ParameterTable
    from mlra_scale.parallel import Engine, StepResult, UpdateProposal
    from mlra_scale.parallel.fragments import Fragment

# A few float64 copies of this many elements are made on an accelerator, while its memory is full.
ACCELERATOR_CHUNK = 1 << 22


def kind_of(info: ParameterInfo) -> str:
    """Returns the kind of a parameter: norm, attention, mlp, or its name outside the blocks."""
    if info.kind == "norm":
        return "norm"
    if not info.name.startswith("blocks."):
        return info.name.split(".")[0]
    return "attention" if ".attention." in info.name else "mlp"


@dataclass(frozen=True)
class Members:
    """Which run belongs to which groups (all, its kind, its block if it has one): run_P[p] belongs to group_P[p]."""

    run_P: Tensor
    group_P: Tensor
    size: int

    def sum(self, values_P: Tensor) -> Tensor:
        """Returns the sum over the runs of each group, [G, ...], of values per pair, [P, ...]."""
        return values_P.new_zeros(self.size, *values_P.shape[1:]).index_add_(0, self.group_P, values_P)

    def sum_of_runs(self, values_F: Tensor) -> Tensor:
        """Returns the sum over the runs of each group, [G, ...], of values per run, [F, ...]."""
        return self.sum(values_F[self.run_P])


class Groups:
    """The sets of parameters with statistics of their own: all, each kind (`kinds` names these), and each block."""

    def __init__(self, table: ParameterTable):
        kinds = {name: kind_of(info) for name, info in table.items()}
        blocks = {name: int(name.split(".")[1]) for name in table if name.startswith("blocks.")}
        self.kinds = ["all", *dict.fromkeys(kinds.values())]
        self.size = len(self.kinds) + len(set(blocks.values()))
        self._members = {name: [0, self.kinds.index(kind)] for name, kind in kinds.items()}
        for name, block in blocks.items():
            self._members[name].append(len(self.kinds) + block)

    def members(self, names: Sequence[str], device: torch.device) -> Members:
        """Returns which run, of the parameter names[f], belongs to which groups."""
        runs = [run for run, name in enumerate(names) for _ in self._members[name]]
        groups = [group for name in names for group in self._members[name]]
        run_P, group_P = torch.tensor([runs, groups], dtype=torch.int64).to(device)
        return Members(run_P, group_P, self.size)

    def report(self, counts: Sequence[float], values: dict[str, list[float | None]]) -> dict[str, Any]:
        """Returns the numbers of elements and the values of all groups in the form of the record."""
        kinds = {
            kind: {"count": int(counts[group])} | {name: numbers[group] for name, numbers in values.items()}
            for group, kind in enumerate(self.kinds)
        }
        return {"kinds": kinds, "layers": {name: numbers[len(self.kinds) :] for name, numbers in values.items()}}


def merged_moments(members: Members, moments_F3: Tensor, extra_G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges runs of elements of all ranks by group; collective, two all-reduces.

    Args:
        members: Which run of this rank belongs to which groups.
        moments_F3: Count, mean and M2 (sum of squared deviations from the mean) of each run, float64.
        extra_G: Further numbers to be summed over the ranks.

    Returns:
        Count, mean and M2 of each group, and the sums of `extra_G`; [G] each, the same on every rank.
    """
    count_P, mean_P, m2_P = moments_F3[members.run_P].unbind(dim=1)
    sums_G2 = members.sum(torch.stack([count_P, count_P * mean_P], dim=1))
    count_G, sum_G, extra_G = _sum_over_ranks(torch.cat([sums_G2, extra_G[:, None]], dim=1)).unbind(dim=1)
    mean_G = sum_G / count_G
    deviations_P = (mean_P - mean_G[members.group_P]).square()
    m2_G = _sum_over_ranks(members.sum(m2_P + count_P * deviations_P))
    return count_G, mean_G, m2_G, extra_G


@dataclass(frozen=True)
class AdamWUpdate:
    """The last update of AdamW; `step` is the number of updates so far, this one included."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    step: int

    def of(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight_decay: float) -> Tensor:
        """Returns the change of some weights in float64, from their values and moments after the update."""
        mean = exp_avg.double() / (1.0 - self.betas[0] ** self.step)
        square = exp_avg_sq.double() / (1.0 - self.betas[1] ** self.step)
        step = mean / (square.sqrt_() + self.eps)
        rate = self.learning_rate
        return (step + weight_decay * weight.double()) * (-rate / (1.0 - rate * weight_decay))


def noise_scale(small_batch: int, large_batch: int, small_square: float, large_square: float) -> dict[str, Any]:
    """Estimates the gradient noise scale from squared gradient norms at two batch sizes, at the same weights.

    The squared norm of a mean over B samples is |G|^2 + tr(Sigma) / B on average: two of them give unbiased estimates
    of |G|^2 and tr(Sigma), though not of their quotient (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

    Args:
        small_batch: Samples in the smaller batch.
        large_batch: Samples in the larger batch.
        small_square: Squared norm of the gradient of the smaller batch's mean loss.
        large_square: The same of the larger batch.

    Returns:
        The arguments, "signal" (|G|^2), "trace" (tr(Sigma)) and "scale" (their quotient in samples; None where noise
        makes the estimate of the signal not positive).
    """
    signal = (large_batch * large_square - small_batch * small_square) / (large_batch - small_batch)
    trace = (small_square - large_square) / (1.0 / small_batch - 1.0 / large_batch)
    return {
        "small_batch": small_batch,
        "large_batch": large_batch,
        "small_square": small_square,
        "large_square": large_square,
        "trace": trace,
        "signal": signal,
        "scale": trace / signal if signal > 0.0 else None,
    }


@dataclass(frozen=True)
class _Gradients:
    """Measured before the update, by group."""

    count_G: Tensor
    mean_G: Tensor
    m2_G: Tensor
    weight_square_G: Tensor
    spectral: dict[str, list[float]]


class GradientStatistics(Watcher):
    """Measures gradients, weights, updates and the noise scale at chosen steps, whatever the layout.

    Args:
        engine: The model that trains.
        config: `gradients` says how often and what; what is on is also measured at the last step.
        hear_stop: Called on all ranks before every micro-batch of the pass for the noise scale; may raise on all ranks.
    """

    name, is_timed = "gradients", True

    def __init__(self, engine: Engine, config: Config, hear_stop: Callable[[], None] | None = None) -> None:
        self.engine, self.config, self._hear_stop = engine, config, hear_stop
        self.groups = Groups(engine.table)
        self._is_due = False
        self._gradients: _Gradients | None = None
        self._small_square: float | None = None
        self._before: dict[tuple[str, int], Tensor] = {}

    def before_step(self, step: Step) -> None:
        """Makes one more pass, without an update, where the noise scale is due.

        Its small batch is the first micro-batch of every data rank, repeated to as many micro-batches as the engine
        accumulates over. That does not change the mean gradient: dropout masks belong to samples.
        """
        gradients, last = self.config.gradients, self.config.train.steps
        self._is_due = gradients.every > 0 and is_due(step.number, gradients.every, last)
        self._gradients, self._small_square = None, None
        if gradients.noise_every > 0 and is_due(step.number, gradients.noise_every, last):
            norm = self.engine.gradient_norm([step.batches[0]] * len(step.batches), self._hear_stop)
            self._small_square = norm**2 if math.isfinite(norm) else None

    @torch.no_grad()
    def before_update(self, proposal: UpdateProposal) -> bool:
        """Measures gradients, if they are finite, and the weights before the update."""
        if not self._is_due or not proposal.is_finite:
            return True

        def moments(name: str, values: Tensor) -> Tensor:
            mean, std = row_moments(values[None])
            count = std.new_full((1,), values.numel())  # a copy from the host would wait for the device
            return torch.cat([count, mean, count * std.square()])

        def square(name: str, values: Tensor) -> Tensor:
            return torch.linalg.vector_norm(values, dtype=torch.float64).square()[None]

        members, moments_F3 = self._measure(self.engine.owned_gradients(), ["values"], moments, 3)
        weights = self.engine.owned_fragments()
        weight_members, weight_squares_F1 = self._measure(weights, ["values"], square, 1)
        weight_square_G = weight_members.sum_of_runs(weight_squares_F1[:, 0])
        merged = merged_moments(members, moments_F3, weight_square_G)
        self._gradients = _Gradients(*merged, self._spectral_norms(weights))
        for fragment in weights:
            if not self.engine.rules[fragment.name].is_adamw:
                self._before[fragment.name, fragment.start] = fragment.values.detach().clone()
        return True

    def after_step(self, step: Step, result: StepResult) -> Mapping[str, Any]:
        """Measures the update; returns `gradients` and `noise`, each where it was due and could be measured."""
        values: dict[str, Any] = {}
        if self._gradients is not None:
            update_square_G = self._update_squares(result.applied, step.learning_rate)
            values["gradients"] = self._report(self._gradients, update_square_G)
        if self._small_square is not None and math.isfinite(result.gradient_norm):
            train = self.config.train
            small_batch = self.engine.topology.data * train.micro_batch_size
            large_square = result.gradient_norm**2
            values["noise"] = noise_scale(small_batch, train.global_batch_size, self._small_square, large_square)
        self._is_due, self._gradients, self._small_square = False, None, None
        self._before.clear()
        return values

    def _spectral_norms(self, weights: Iterable[Fragment]) -> dict[str, list[float]]:
        iterations = self.config.gradients.spectral_iterations
        if iterations == 0:
            return {}
        products = AttentionProducts(self.config.model, self.engine.table, self.engine.topology)
        norms = products.spectral_norms(weights, iterations)
        return {f"{name}_spectral_norm": values for name, values in norms.items()}

    @torch.no_grad()
    def _update_squares(self, was_applied: bool, learning_rate: float) -> Tensor:
        """Returns the squared norm of the update of each group, [G]."""
        if not was_applied:
            return torch.zeros(self.groups.size, dtype=torch.float64, device=self.engine.topology.device)
        optim, rules = self.config.optim, self.engine.rules
        state = self.engine.training_state()
        num_updates, begun_at = state["optimizer_step"], state["adam_begun_at"]

        def square(name: str, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
            rule = rules[name]
            num_of_adam = num_updates - begun_at.get(name, 0)
            update = AdamWUpdate(learning_rate * rule.lr_factor, optim.betas, rule.eps, num_of_adam)
            change = update.of(weight, exp_avg, exp_avg_sq, rule.weight_decay)
            return torch.linalg.vector_norm(change).square()[None]

        def square_of_change(name: str, change: Tensor) -> Tensor:
            return torch.linalg.vector_norm(change, dtype=torch.float64).square()[None]

        fragments = self.engine.owned_fragments(with_moments=True)
        of_adam = [fragment for fragment in fragments if rules[fragment.name].is_adamw]
        members, squares_F1 = self._measure(of_adam, ["values", "exp_avg", "exp_avg_sq"], square, 1)
        square_G = members.sum_of_runs(squares_F1[:, 0])
        if self._before:
            members, squares_F1 = self._measure(self._changes(fragments), ["values"], square_of_change, 1)
            square_G += members.sum_of_runs(squares_F1[:, 0])
        return _sum_over_ranks(square_G)

    def _changes(self, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
        """Yields the change of every fragment that was copied before the update, written over its copy."""
        for fragment in fragments:
            before = self._before.pop((fragment.name, fragment.start), None)
            if before is not None:
                yield replace(fragment, values=torch.sub(fragment.values.detach(), before, out=before))

    def _report(self, found: _Gradients, update_square_G: Tensor) -> dict[str, Any]:
        square_G = found.m2_G + found.count_G * found.mean_G.square()
        ratio_G = (update_square_G / found.weight_square_G).sqrt()
        variance_G, weight_norm_G = found.m2_G / found.count_G, found.weight_square_G.sqrt()
        packed_6G = torch.stack([found.count_G, square_G.sqrt(), found.mean_G, variance_G, weight_norm_G, ratio_G])
        counts, norms, means, variances, weight_norms, ratios = packed_6G.tolist()  # one read of the device
        values: dict[str, list[float | None]] = {
            "gradient_norm": norms,
            "gradient_mean": means,
            "gradient_variance": variances,
            "weight_norm": weight_norms,
            # None where all weights are zero.
            "update_ratio": [ratio if math.isfinite(ratio) else None for ratio in ratios],
        }
        report = self.groups.report(counts, values)
        report["layers"] |= found.spectral
        return report

    def _measure(
        self, fragments: Iterable[Fragment], parts: Sequence[str], measure: Callable[..., Tensor], num_columns: int
    ) -> tuple[Members, Tensor]:
        """Measures this rank's fragments chunk by chunk, so that float64 copies are small, without padded rows.

        `measure` maps a parameter's name and the named parts of a chunk to a float64 vector of length num_columns.

        Returns:
            Which chunk belongs to which groups, and the vectors [F, num_columns].
        """
        device = self.engine.topology.device
        names, rows = [], [torch.zeros(0, num_columns, dtype=torch.float64, device=device)]
        for fragment in fragments:
            num_real = max(0, self._num_real(fragment.name) - fragment.start)
            tensors = [getattr(fragment, part).detach()[:num_real] for part in parts]
            chunk = CPU_CHUNK if tensors[0].device.type == "cpu" else ACCELERATOR_CHUNK
            for start in range(0, tensors[0].numel(), chunk):
                names.append(fragment.name)
                row = measure(fragment.name, *(tensor[start : start + chunk] for tensor in tensors))
                rows.append(row[None].to(device))
            del fragment, tensors  # before the next fragment is converted
        return self.groups.members(names, device), torch.cat(rows)

    def _num_real(self, name: str) -> int:
        """Returns the number of elements of this tensor rank's shard before padded rows, which come last."""
        info, topology = self.engine.table[name], self.engine.topology
        num_rows, *rest = info.local_shape(topology.tensor)
        if info.kind == "embedding":
            num_rows = min(num_rows, max(0, self.engine.table.vocab_size - topology.tensor_rank * num_rows))
        return num_rows * math.prod(rest)


def _sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
