"""sigmaReparam: each linear map of a block is W_hat = gamma W / sigma(W) (Zhai et al. 2023, arXiv 2303.06296).

gamma is a learned gain, 1 at the start, and sigma(W) the largest singular value, which one power iteration per training
step follows: its vector carries over from step to step. A factorised map is normalised as the product that it is, so
that gamma is the largest singular value of what the map does, dense or low-rank; with factors normalised one by one a
low-rank map would start 27 % smaller (at R = D/2) than the dense one that it is compared with.

The vector z lies where tensor parallelism splits nothing: between the factors of W = B A^T, or at the input or output
of a dense map. What it enters there is a side, [N, R] with N split like the weight: A = W_D^T and B = W_U, or of a
dense map A = W or W^T alone, as if B were the identity. One iteration, |a| = |b| = 1:

    A z ~ a,   p = A^T a,   B p = sigma b,   q = B^T b,   and the next z is q / |q|

With these vectors held fixed sigma = b^T B A^T a has the gradients a q^T in A and b p^T in B. They belong to a step,
not to a pass through the model: every micro-batch, recomputation and rank computes with the same ones. A validation
between two steps computes with those that the next step will find.

Shape suffixes: O outputs, I inputs of a map, R entries of the vector, N the other dimension of a side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from mlra_scale.config import ModelConfig
from mlra_scale.model.initialization import fill_initial_values
from mlra_scale.model.parameters import LinearMap
from mlra_scale.model.randomness import keyed_generator

if TYPE_CHECKING:  # it loads Megatron, and exporting and evaluating do without
    from mlra_scale.model.context import ModelContext

_FIRST_ITERATIONS = 16
"""Of the initial weights: sigma of a normal matrix is then some 3 % too small (D = 768), and soon exact."""


class Iteration(NamedTuple):
    """The result of one power iteration."""

    sigma: torch.Tensor  # the estimate of the largest singular value, one number
    next_vector: torch.Tensor  # the unit vector with which the next iteration begins
    gradients: list[tuple[torch.Tensor, torch.Tensor]]  # of sigma in each weight: its outer product of two vectors


@torch.no_grad()
def iterate(entry: LinearMap, vector_R: torch.Tensor, weights: Sequence[torch.Tensor], group: Any = None) -> Iteration:
    """Does one power iteration from a unit vector of the weights' type.

    `weights`: the matrix, or down and up factor, whole or this rank's parts of them; `group`: the ranks with the parts.
    """
    groups = [None if info.shard_dim is None else group for info in entry.weights]
    is_transposed = entry.weights[0].shard_dim != 0  # a dense map with its vector at the output, or a down factor
    first_NR = weights[0].T if is_transposed else weights[0]
    _, a_N, p_R = _there_and_back(first_NR, vector_R, groups[0])
    if len(weights) == 1:
        sigma = p_R.norm()
        q_R = p_R / sigma
        return Iteration(sigma, q_R, [(q_R, a_N) if is_transposed else (a_N, q_R)])
    sigma, b_O, q_R = _there_and_back(weights[1], p_R, groups[1])
    return Iteration(sigma, q_R / q_R.norm(), [(q_R, a_N), (b_O, p_R)])


def _there_and_back(
    side_NR: torch.Tensor, vector_R: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the norm of the vector's image, the unit vector along it, and what the transposed side makes of that."""
    image_N = side_NR @ vector_R
    norm = _sum(image_N.square().sum(), group).sqrt()
    unit_N = image_N / norm
    return norm, unit_N, _sum(side_NR.T @ unit_N, group)


def _sum(part: torch.Tensor, group: Any) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(part, group=group)
    return part


def initial_vector(model: ModelConfig, seed: int, entry: LinearMap) -> torch.Tensor:
    """Returns a map's vector before the first step, fp32 on the CPU: a function of (seed, name) in every layout."""
    weights = [torch.empty(info.shape) for info in entry.weights]
    for weight, info in zip(weights, entry.weights, strict=True):
        fill_initial_values(weight, model, info, seed)
    generator = keyed_generator(seed, f"{entry.name}/power_iteration")
    vector = functional.normalize(torch.randn(entry.vector_size, generator=generator), dim=0)
    for _ in range(_FIRST_ITERATIONS):
        vector = iterate(entry, vector, weights).next_vector
    return vector


@dataclass(eq=False, repr=False)
class SpectralNorm:
    """sigma(W) of one map in training, held by the module with its gain: that of the dense matrix or the up factor."""

    context: ModelContext
    entry: LinearMap
    gain: nn.Parameter
    weights: tuple[nn.Parameter, ...]  # as in the entry
    found: Iteration | None = None  # the iteration of this step; None until its first pass with these weights

    @classmethod
    def of(cls, context: ModelContext, name: str, module: nn.Module, *weights: nn.Parameter) -> SpectralNorm | None:
        """Adds the gain to the module of a dense matrix or an up factor; else, or without the option, returns None."""
        entry = context.table.normalised.get(f"{name}.weight")
        if entry is None:
            return None
        gain = nn.Parameter(torch.ones(1))
        module.register_parameter("gain", gain)
        return cls(context, entry, gain, weights)

    @cached_property
    def vector(self) -> torch.Tensor:
        """The unit vector that carries over from step to step, the same on every rank."""
        return initial_vector(self.context.model, self.context.seed, self.entry)

    def advance(self) -> None:
        """Ends a training step: the next one begins with the vector that this one has found."""
        assert self.found is not None
        self.vector, self.found = self.found.next_vector, None

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns x (gamma / sigma(W) weight)^T, where `weight` is the dense matrix or the up factor.

        The gain and both factors receive their gradients through sigma, too.
        """
        if self.found is None:
            accurate = torch.promote_types(weight.dtype, torch.float32)
            matrices = [each.detach().to(accurate) for each in self.weights]
            group = self.context.tensor_group if self.context.tensor_parallel > 1 else None
            self.found = iterate(self.entry, self.vector.to(matrices[0]), matrices, group)
        # The value of sigma is known, the same in all passes of a step: only its gradient is taken from here.
        sigma = self.found.sigma
        for each, (left_O, right_I) in zip(self.weights, self.found.gradients, strict=True):
            first_order = left_O.to(each.dtype) @ (each @ right_I.to(each.dtype))
            sigma = sigma + (first_order - first_order.detach())
        scale = self.gain.to(sigma.dtype) / sigma
        # A rank multiplies its part of the matrix or of the sequence only: it sees a part of this number's gradient.
        if self.entry.weights[-1].shard_dim is not None or self.context.has_sequence_parallel:
            from mlra_scale.model.tensor_parallel import copy_to_tensor_parallel  # it loads Megatron

            (scale,) = copy_to_tensor_parallel(self.context, scale)
        y: torch.Tensor = ScaledLinear.apply(x, weight, scale)
        return y


def spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    """Returns those of a pipeline stage or a whole model."""
    norms = (getattr(child, "spectral_norm", None) for child in module.modules())
    return [norm for norm in norms if norm is not None]


def stored_vectors(norms: Iterable[SpectralNorm]) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint keeps of them, by name, in host memory."""
    return {norm.entry.vector: norm.vector.detach().to("cpu", torch.float32, copy=True) for norm in norms}


def load_vectors(norms: Iterable[SpectralNorm], stored: Mapping[str, torch.Tensor]) -> None:
    """Sets the vectors to those of a checkpoint, which has them for all stages."""
    for norm in norms:
        norm.vector, norm.found = stored[norm.entry.vector].clone(), None


class ScaledLinear(torch.autograd.Function):
    """y = x (s W)^T, s [1]. Between the passes it keeps x and W like any linear map, and no scaled copy of W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, scale)
        return functional.linear(x, (weight * scale).to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight, scale = ctx.saved_tensors
        (dy,) = gradients
        dx = dy @ (weight * scale).to(weight.dtype)
        dscaled = dy.flatten(0, -2).T @ x.flatten(0, -2)
        dscale = (dscaled * weight.to(scale.dtype)).sum().view(1)
        return dx, (dscaled * scale).to(weight.dtype), dscale
