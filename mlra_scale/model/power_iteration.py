"""Power iteration: the largest singular value of a linear map, which sigmaReparam divides by (see spectral.py).

A map is W = W_U W_D; of a dense one, one of the two is the identity. A vector between the two carries over from one
iteration to the next: tensor parallelism splits the output of W_U or the input of W_D, but never this vector.

Shape suffixes: O outputs, I inputs of a map, R between its factors; where O or I are split, a rank has its part.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from mlra_scale.config import ModelConfig
from mlra_scale.model.initialization import fill_initial_values
from mlra_scale.model.parameters import LinearMap, ParameterTable
from mlra_scale.model.randomness import keyed_generator

_FIRST_ITERATIONS = 16
"""Of the initial weights: sigma of a normal matrix is then some 3 % too small (D = 768), and soon exact."""


class PowerIteration:
    """One iteration on W = up down, from a unit vector between the two: first the input's side, then the output's.

    Args:
        vector: The unit vector.
        input_group: Group over which the input is split; None: it is whole.
        output_group: Likewise of the output.

    Attributes:
        right_I: v, the singular vector at the input.
        image_R: W_D v.
        left_O: u, the singular vector at the output.
        sigma: The estimate of the largest singular value, one number.
        pullback_R: W_U^T u.
        next_vector: Where the next iteration begins.
    """

    left_O: torch.Tensor
    sigma: torch.Tensor
    pullback_R: torch.Tensor
    next_vector: torch.Tensor

    def __init__(self, vector: torch.Tensor, input_group: Any = None, output_group: Any = None) -> None:
        self.right_I = self.image_R = vector
        self._input_group, self._output_group = input_group, output_group

    @torch.no_grad()
    def through_down(self, weight_RI: torch.Tensor) -> None:
        """Finds v and W_D v. Not called where W_D is the identity."""
        pulled_I = weight_RI.T @ self.image_R
        self.right_I = pulled_I / _norm(pulled_I, self._input_group)
        self.image_R = _sum(weight_RI @ self.right_I, self._input_group)

    @torch.no_grad()
    def through_up(self, weight_OR: torch.Tensor | None, has_down: bool) -> None:
        """Finds u, sigma and W_U^T u; without a weight, W_U is the identity."""
        if weight_OR is None:
            self.sigma = self.image_R.norm()
            self.left_O = self.pullback_R = self.next_vector = self.image_R / self.sigma
            return
        mapped_O = weight_OR @ self.image_R
        self.sigma = _norm(mapped_O, self._output_group)
        self.left_O = mapped_O / self.sigma
        self.pullback_R = _sum(weight_OR.T @ self.left_O, self._output_group)
        self.next_vector = self.pullback_R / self.pullback_R.norm()
        if not has_down:
            # The vector is the input's own: v is renewed like u.
            self.sigma = self.pullback_R.norm()
            self.right_I = self.image_R = self.next_vector


def _norm(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Euclidean norm of a vector that is split over a group."""
    return _sum(part.square().sum(), group).sqrt()


def _sum(part: torch.Tensor, group: Any) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(part, group=group)
    return part


def iterated(vector: torch.Tensor, up_OR: torch.Tensor | None, down_RI: torch.Tensor | None) -> PowerIteration:
    """Returns one power iteration on whole matrices; None stands for the identity.

    Args:
        vector: Unit vector between the factors, of their type.
        up_OR: Factor at the output.
        down_RI: Factor at the input.
    """
    iteration = PowerIteration(vector)
    if down_RI is not None:
        iteration.through_down(down_RI)
    iteration.through_up(up_OR, has_down=down_RI is not None)
    return iteration


def initial_vector(model: ModelConfig, seed: int, table: ParameterTable, linear_map: LinearMap) -> torch.Tensor:
    """Returns a map's vector before the first step, fp32 on the CPU: a pure function of (seed, name) in every layout.

    Args:
        model: The model's configuration.
        seed: The run's seed.
        table: The model's parameters.
        linear_map: The map.
    """

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
