"""Statistics of gradients, weights and updates per kind of weight and per block, and the gradient noise scale.

Everything is computed where the values are: a rank measures the runs of elements that it owns, whatever the engine and
the ZeRO stage, and only a few numbers per kind and block are summed over the ranks. Tied and replicated weights have
one owner, so they count once; padded rows of the vocabulary do not count.

Means and variances are float64 and lose no digits to cancellation: each run of elements has its own mean and squared
deviations (stability.moments), and the sets are merged by Chan's formula for many of them at once (Chan, Golub and
LeVeque 1979): first the mean of all, by one all-reduce, then M2 = sum_i M2_i + n_i (mean_i - mean)^2 by another. That
is one small all-reduce more than for sums of squares, and the memory does not grow with the number of ranks.

An update is not measured by a copy of the weights from before it. Adam's moments after an update say what the update
was (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2):
    w = w_before (1 - lr decay) - lr step,  step = m_hat / (sqrt(v_hat) + eps),
so that w - w_before = -lr (step + decay w) / (1 - lr decay).

Legend of shape suffixes: F runs of elements (fragments, cut into chunks), G groups.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlra_scale.stability.moments import CPU_CHUNK, row_moments
from mlra_scale.stability.spectral import AttentionProducts

if TYPE_CHECKING:  # the libraries behind an engine
    from mlra_scale.config import Config
    from mlra_scale.model.parameters import ParameterInfo, ParameterTable
    from mlra_scale.parallel.fragments import Fragment
    from mlra_scale.parallel.interface import Engine, MicroBatch, StepResult, UpdateProposal

# A handful of float64 copies of this many elements are made on an accelerator, at a time when its memory is full.
ACCELERATOR_CHUNK = 1 << 22


def kind_of(info: "ParameterInfo") -> str:
    """Returns the kind that a parameter counts in: norm, attention, mlp, or what it is outside the blocks."""
    if info.kind == "norm":
        return "norm"
    if not info.name.startswith("blocks."):
        return info.name.split(".")[0]
    return "attention" if ".attention." in info.name else "mlp"


class Groups:
    """The sets of parameters that statistics are taken over: all, those of each kind, and those of each block.

    Attributes:
        kinds: names of the first groups; the blocks follow.
        size: number of groups.
    """

    def __init__(self, table: "ParameterTable"):
        kinds = {name: kind_of(info) for name, info in table.items()}
        blocks = {name: int(name.split(".")[1]) for name in table if name.startswith("blocks.")}
        self.kinds = ["all", *dict.fromkeys(kinds.values())]
        self.size = len(self.kinds) + len(set(blocks.values()))
        self._members = {name: [0, self.kinds.index(kind)] for name, kind in kinds.items()}
        for name, block in blocks.items():
            self._members[name].append(len(self.kinds) + block)

    def membership(self, names: Sequence[str], device: torch.device) -> Tensor:
        """[G, F] float64: 1 where run f, of the parameter names[f], is of group g."""
        pairs = [(group, run) for run, name in enumerate(names) for group in self._members[name]]
        membership_GF = torch.zeros(self.size, len(names), dtype=torch.float64)
        if pairs:
            membership_GF[tuple(torch.tensor(pairs).T)] = 1.0
        return membership_GF.to(device)

    def report(self, counts: Sequence[float], values: dict[str, list[float | None]]) -> dict[str, Any]:
        """The record's form of each group's number of elements and values."""
        kinds = {
            kind: {"count": int(counts[group])} | {name: numbers[group] for name, numbers in values.items()}
            for group, kind in enumerate(self.kinds)
        }
        return {"kinds": kinds, "layers": {name: numbers[len(self.kinds) :] for name, numbers in values.items()}}


def merged_moments(membership_GF: Tensor, moments_F3: Tensor, extra_G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges runs of elements of all ranks by group; collective, two all-reduces.

    Args:
        membership_GF: which run of this rank is of which group.
        moments_F3: count, mean and M2 (sum of squared deviations from the mean) of each run, float64.
        extra_G: numbers to be summed over the ranks along with them.

    Returns:
        count, mean and M2 of each group, and the sums of `extra_G`; [G] each, the same on every rank.
    """
    count_F, mean_F, m2_F = moments_F3.unbind(dim=1)
    sums_G2 = membership_GF @ torch.stack([count_F, count_F * mean_F], dim=1)
    count_G, sum_G, extra_G = _sum_over_ranks(torch.cat([sums_G2, extra_G[:, None]], dim=1)).unbind(dim=1)
    mean_G = sum_G / count_G
    deviations_GF = membership_GF * (mean_F - mean_G[:, None]).square()
    m2_G = _sum_over_ranks(membership_GF @ m2_F + deviations_GF @ count_F)
    return count_G, mean_G, m2_G, extra_G


@dataclass(frozen=True)
class AdamWUpdate:
    """The last update of AdamW.

    Attributes:
        learning_rate: Of that update.
        betas: Decay rates of the moments.
        eps: Epsilon.
        step: Number of updates so far, this one included.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    step: int

    def of(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight_decay: float) -> Tensor:
        """The change of some weights in float64, from what they and their moments are after it."""
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
        large_square: Squared norm of the gradient of the larger batch's mean loss.

    Returns:
        The arguments, "signal" (|G|^2), "trace" (tr(Sigma)) and "scale" (their quotient in samples; None where the
        signal is drowned and its estimate not positive).
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
class _InGate:
    """What is known before the update, by group."""

    count_G: Tensor
    mean_G: Tensor
    m2_G: Tensor
    weight_square_G: Tensor
    spectral: dict[str, list[float]]


class GradientStatistics:
    """Measures at chosen steps, whatever the layout; at all other steps it does nothing.

    A step calls `before_step`, then `in_gate` from inside the engine's `before_update`, then `after_update`; each is
    collective when something is due.

    Args:
        engine: the model that trains.
        config: `gradients` says how often and what, `train.steps` which step is the last (where what is on is due too).
    """

    def __init__(self, engine: "Engine", config: "Config"):
        self.engine = engine
        self.config = config
        self.groups = Groups(engine.table)
        self._is_due = False
        self._in_gate: _InGate | None = None
        self._small_square: float | None = None

    def before_step(
        self, step: int, batches: Sequence["MicroBatch"], between: Callable[[], None] | None = None
    ) -> None:
        """Begins a step. Where the noise scale is due, one more pass over a batch, without an update.

        The small batch is the first micro-batch of every data rank. It is repeated to as many micro-batches as the
        engine accumulates over, which leaves the mean gradient what it is: dropout masks belong to samples.

        Args:
            step: Number of the step, from 1.
            batches: This data rank's micro-batches.
            between: See Engine.gradient_norm.
        """
        gradients = self.config.gradients
        self._is_due = self._comes(step, gradients.every)
        self._in_gate, self._small_square = None, None
        if self._comes(step, gradients.noise_every):
            norm = self.engine.gradient_norm([batches[0]] * len(batches), between)
            self._small_square = norm**2 if math.isfinite(norm) else None

    def _comes(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    @torch.no_grad()
    def in_gate(self, proposal: "UpdateProposal") -> None:
        """Measures gradients, and the weights before the update; from inside `before_update` only.

        Args:
            proposal: Not finite: nothing is measured.
        """
        if not self._is_due or not proposal.is_finite:
            return

        def moments(name: str, values: Tensor) -> Tensor:
            mean, std = row_moments(values[None])
            count = std.new_full((1,), values.numel())  # written by the device: a copy would wait for it
            return torch.cat([count, mean, count * std.square()])

        def square(name: str, values: Tensor) -> Tensor:
            return torch.linalg.vector_norm(values, dtype=torch.float64).square()[None]

        membership_GF, moments_F3 = self._measure(self.engine.owned_gradients(), ["values"], moments, 3)
        weights = self.engine.owned_fragments()
        weight_membership_GF, weight_squares_F1 = self._measure(weights, ["values"], square, 1)
        weight_square_G = weight_membership_GF @ weight_squares_F1[:, 0]
        self._in_gate = _InGate(
            *merged_moments(membership_GF, moments_F3, weight_square_G), self._spectral_norms(weights)
        )

    def _spectral_norms(self, weights: Iterable["Fragment"]) -> dict[str, list[float]]:
        iterations = self.config.gradients.spectral_iterations
        if iterations == 0:
            return {}
        products = AttentionProducts(self.config.model, self.engine.table, self.engine.topology)
        norms = products.spectral_norms(weights, iterations)
        return {f"{name}_spectral_norm": values for name, values in norms.items()}

    def after_update(self, result: "StepResult", learning_rate: float) -> dict[str, Any]:
        """Returns what is recorded of this step: `gradients` and `noise`, each where it was due and could be measured.

        Args:
            result: What the engine reported.
            learning_rate: That the engine was given.
        """
        values: dict[str, Any] = {}
        if self._in_gate is not None:
            values["gradients"] = self._report(self._in_gate, self._update_squares(result.applied, learning_rate))
        if self._small_square is not None and math.isfinite(result.gradient_norm):
            train = self.config.train
            small_batch = self.engine.topology.data * train.micro_batch_size
            large_square = result.gradient_norm**2
            values["noise"] = noise_scale(small_batch, train.global_batch_size, self._small_square, large_square)
        self._is_due, self._in_gate, self._small_square = False, None, None
        return values

    @torch.no_grad()
    def _update_squares(self, was_applied: bool, learning_rate: float) -> Tensor:
        """Squared norm of the update of each group, [G]."""
        if not was_applied:
            return torch.zeros(self.groups.size, dtype=torch.float64, device=self.engine.topology.device)
        optim = self.config.optim
        update = AdamWUpdate(learning_rate, optim.betas, optim.eps, self.engine.training_state()["optimizer_step"])

        def square(name: str, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
            change = update.of(weight, exp_avg, exp_avg_sq, self.engine.weight_decay(name))
            return torch.linalg.vector_norm(change).square()[None]

        fragments = self.engine.owned_fragments(with_moments=True)
        membership_GF, squares_F1 = self._measure(fragments, ["values", "exp_avg", "exp_avg_sq"], square, 1)
        return _sum_over_ranks(membership_GF @ squares_F1[:, 0])

    def _report(self, found: _InGate, update_square_G: Tensor) -> dict[str, Any]:
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
            # Weights that are all zero have no such ratio.
            "update_ratio": [ratio if math.isfinite(ratio) else None for ratio in ratios],
        }
        report = self.groups.report(counts, values)
        report["layers"] |= found.spectral
        return report

    def _measure(
        self, fragments: Iterable["Fragment"], parts: Sequence[str], measure: Callable[..., Tensor], num_columns: int
    ) -> tuple[Tensor, Tensor]:
        """Measures fragments chunk by chunk, so that float64 copies are small; padded rows are left out.

        Args:
            fragments: What this rank owns.
            parts: Which tensors of a fragment are measured.
            measure: Maps a parameter's name and those tensors of a chunk to a float64 vector.
            num_columns: Length of that vector.

        Returns:
            Which chunk is of which group [G, F], and the vectors [F, num_columns].
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
        return self.groups.membership(names, device), torch.cat(rows)

    def _num_real(self, name: str) -> int:
        """Number of elements of this tensor rank's shard before padded rows of the vocabulary, which come last."""
        info, topology = self.engine.table[name], self.engine.topology
        num_rows, *rest = info.local_shape(topology.tensor)
        if info.kind == "embedding":
            num_rows = min(num_rows, max(0, self.engine.table.vocab_size - topology.tensor_rank * num_rows))
        return num_rows * math.prod(rest)


def _sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
