"""Power iteration: the largest singular value of a linear map, which sigmaReparam divides by (see spectral.py).

A map is W = W_U W_D; of a dense one, one of the two is the identity. A vector between the two carries over from one
iteration to the next: tensor parallelism splits the output of W_U or the input of W_D, but never this vector.

Shape suffixes: O outputs, I inputs of a map, R between its factors; where O or I are split, a rank has its part.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional

from mlra_scale.config import ModelConfig
from mlra_scale.model.initialization import fill_initial_values
from mlra_scale.model.parameters import LinearMap, ParameterTable
from mlra_scale.model.randomness import keyed_generator

_FIRST_ITERATIONS = 16
"""Of the initial weights: sigma of a normal matrix is then some 3 % too small (D = 768), and soon exact."""


class Iteration(NamedTuple):
    """The result of one power iteration."""

    right_I: torch.Tensor  # v, the singular vector at the input
    image_R: torch.Tensor  # W_D v
    left_O: torch.Tensor  # u, the singular vector at the output
    pullback_R: torch.Tensor  # W_U^T u
    sigma: torch.Tensor  # the estimate of the largest singular value, one number
    next_vector: torch.Tensor  # the unit vector with which the next iteration begins


@torch.no_grad()
def through_down(vector_R: torch.Tensor, down_RI: torch.Tensor, group: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns v and W_D v; `group`: over which the input is split."""
    pulled_I = down_RI.T @ vector_R
    right_I = pulled_I / _norm(pulled_I, group)
    return right_I, _sum(down_RI @ right_I, group)


@torch.no_grad()
def through_up(
    right_I: torch.Tensor | None, image_R: torch.Tensor, up_OR: torch.Tensor | None, group: Any = None
) -> Iteration:
    """Completes an iteration.

    Args:
        right_I: v; None where W_D is the identity.
        image_R: W_D v; where W_D is the identity, the vector that carries over.
        up_OR: W_U; None where it is the identity.
        group: Over which the output is split.
    """
    if up_OR is None:
        assert right_I is not None
        sigma = image_R.norm()
        left_O = image_R / sigma
        return Iteration(right_I, image_R, left_O, left_O, sigma, left_O)
    mapped_O = up_OR @ image_R
    sigma = _norm(mapped_O, group)
    left_O = mapped_O / sigma
    pullback_R = _sum(up_OR.T @ left_O, group)
    next_vector = pullback_R / pullback_R.norm()
    if right_I is None:  # the vector that carries over is the input's: v is renewed like u
        return Iteration(next_vector, next_vector, left_O, pullback_R, pullback_R.norm(), next_vector)
    return Iteration(right_I, image_R, left_O, pullback_R, sigma, next_vector)


def iterated(vector_R: torch.Tensor, up_OR: torch.Tensor | None, down_RI: torch.Tensor | None) -> Iteration:
    """Returns one power iteration on whole matrices, from a unit vector of their type; None stands for the identity."""
    right_I, image_R = (None, vector_R) if down_RI is None else through_down(vector_R, down_RI)
    return through_up(right_I, image_R, up_OR)


def _norm(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Euclidean norm of a vector that is split over a group."""
    return _sum(part.square().sum(), group).sqrt()


def _sum(part: torch.Tensor, group: Any) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(part, group=group)
    return part


def initial_vector(model: ModelConfig, seed: int, table: ParameterTable, linear_map: LinearMap) -> torch.Tensor:
    """Returns a map's vector before the first step, fp32 on the CPU: a function of (seed, name) in every layout."""

    def initial(name: str | None) -> torch.Tensor | None:
        if name is None:
            return None
        values = torch.empty(table[name].shape)
        fill_initial_values(values, model, table[name], seed)
        return values

    up, down = initial(linear_map.up), initial(linear_map.down)
    generator = keyed_generator(seed, f"{linear_map.name}/power_iteration")
    vector = functional.normalize(torch.randn(linear_map.size, generator=generator), dim=0)
    for _ in range(_FIRST_ITERATIONS):
        vector = iterated(vector, up, down).next_vector
    return vector
