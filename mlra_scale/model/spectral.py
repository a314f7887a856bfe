"""sigmaReparam: each linear map of a block is W_hat = gamma W / sigma(W) (Zhai et al. 2023, arXiv 2303.06296).

gamma is a learned gain, 1 at the start, and sigma(W) the largest singular value, which one power iteration per training
step follows: its vector carries over from step to step. A factorised map is normalised as the product that it is, so
that gamma is the largest singular value of what the map does, dense or low-rank; with factors normalised one by one a
low-rank map would start 27 % smaller (at R = D/2) than the dense one that it is compared with.

sigma = u^T W v with u and v held fixed, so its gradient in W is u v^T; for W = W_U W_D it is u (W_D v)^T in W_U and
(W_U^T u) v^T in W_D. The vectors belong to a step, not to a pass through the model: every micro-batch, recomputation
and rank computes with the same ones. A validation between two steps computes with those that the next step will find.

Shape suffixes: O outputs, I inputs of a map, R rank; where tensor parallelism splits O or I, a rank has its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mlra_scale.model.context import ModelContext
from mlra_scale.model.parameters import linear_map, vector_name
from mlra_scale.model.power_iteration import Iteration, initial_vector, through_down, through_up
from mlra_scale.model.tensor_parallel import copy_to_tensor_parallel


class SpectralNorm:
    """sigma(W) of one map in training; the modules that hold the factors of a map share it.

    A pass through a factorised map calls `take_down_factor` and then `scale`, one through a dense map `scale` alone.
    """

    def __init__(self, context: ModelContext, name: str) -> None:
        self.name = name
        self._context = context
        self._map = linear_map(context.model, name)
        parts = (self._map.down, self._map.up)
        down_dim, up_dim = (None if part is None else context.table[part].shard_dim for part in parts)
        group = context.tensor_group if context.tensor_parallel > 1 else None
        self._input_group = group if down_dim == 1 else None
        self._output_group = group if up_dim == 0 else None
        is_split = group is not None and (down_dim if self._map.up is None else up_dim) is not None
        self._is_seen_in_part = is_split or context.has_sequence_parallel
        self._vector: torch.Tensor | None = None
        self._right_and_image: tuple[torch.Tensor, torch.Tensor] | None = None
        self._iteration: Iteration | None = None
        self._image_R: torch.Tensor | None = None

    @classmethod
    def of(cls, context: ModelContext, name: str) -> SpectralNorm | None:
        """Returns that of a map of the model; None without `model.sigma_reparam`."""
        return cls(context, name) if context.model.sigma_reparam else None

    @property
    def vector(self) -> torch.Tensor:
        """The unit vector that carries over from step to step, the same on every rank."""
        if self._vector is None:
            context = self._context
            self._vector = initial_vector(context.model, context.seed, context.table, self._map)
        return self._vector

    @vector.setter
    def vector(self, value: torch.Tensor) -> None:
        self._vector = value
        self.forget()

    def forget(self) -> None:
        """Drops what was found for weights that have changed or may have."""
        self._right_and_image = self._iteration = None

    def advance(self) -> None:
        """Ends a training step: the next one begins with the vector that this one has found."""
        assert self._iteration is not None
        self.vector = self._iteration.next_vector

    def take_down_factor(self, weight_RI: torch.Tensor) -> None:
        """Takes v through W_D: `scale` needs W_D v, and through it W_D receives its gradient of sigma.

        Where the input is split, this is the rank's summand of W_D v: `scale` uses its gradient, not its value.
        """
        if self._right_and_image is None:
            self._right_and_image = through_down(self._start(weight_RI), _accurate(weight_RI), self._input_group)
        self._image_R = weight_RI @ self._right_and_image[0].to(weight_RI.dtype)

    def scale(self, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns gamma / sigma(W), [1] in fp32 or fp64, with its gradient in the gain gamma [1] and all factors.

        `weight` is the dense matrix or the up factor.
        """
        if self._iteration is None:
            self._iteration = self._iterate(weight)
        found, image_R = self._iteration, self._image_R
        self._image_R = None
        right = found.right_I if image_R is None else found.image_R
        first_order = found.left_O.to(weight.dtype) @ (weight @ right.to(weight.dtype))
        if image_R is not None:
            first_order = first_order + found.pullback_R.to(image_R.dtype) @ image_R
        # The value of sigma is known, the same in all passes of a step: only its gradient is taken from here.
        sigma = found.sigma + (first_order - first_order.detach())
        scale = gain.to(sigma.dtype) / sigma
        # A rank multiplies its part of the matrix or of the sequence only: it sees a part of this number's gradient.
        return copy_to_tensor_parallel(self._context, scale)[0] if self._is_seen_in_part else scale

    def _start(self, weight: torch.Tensor) -> torch.Tensor:
        return self.vector.to(device=weight.device, dtype=_accurate_type(weight))

    def _iterate(self, weight: torch.Tensor) -> Iteration:
        matrix = _accurate(weight)
        if self._map.up is None:
            return through_up(*through_down(self._start(weight), matrix, self._input_group), None)
        if self._map.down is None:
            return through_up(None, self._start(weight), matrix, self._output_group)
        assert self._right_and_image is not None, "the down factor comes first"
        return through_up(*self._right_and_image, matrix, self._output_group)


def _accurate_type(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _accurate(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(_accurate_type(weight))


def spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    """Returns those of a pipeline stage or a whole model, each once."""
    norms = (getattr(child, "spectral_norm", None) for child in module.modules())
    return list({norm.name: norm for norm in norms if norm is not None}.values())


def stored_vectors(norms: Iterable[SpectralNorm]) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint keeps of them, by name, in host memory."""
    return {vector_name(norm.name): norm.vector.detach().to("cpu", torch.float32, copy=True) for norm in norms}


def load_vectors(norms: Iterable[SpectralNorm], stored: Mapping[str, torch.Tensor]) -> None:
    """Sets the vectors to those of a checkpoint, which has them for all stages."""
    for norm in norms:
        norm.vector = stored[vector_name(norm.name)].clone()


class _ScaledLinear(torch.autograd.Function):
    """y = x (s W)^T. Between the passes it keeps x and W like any linear map, and no scaled copy of W."""

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


def scaled_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns x (s W)^T for a scale [1] of at least fp32."""
    y: torch.Tensor = _ScaledLinear.apply(x, weight, scale)
    return y
