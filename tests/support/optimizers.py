"""Muon and Spectron on whole matrices in fp64, and who updates what: the oracle of the optimizers.

Written from the papers and independent of mlra_scale/parallel and mlra_scale/model/update_rules.py:

- Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): B <- mu B + G; what is orthogonalised is G + mu B with
  Nesterov's momentum, else B. Orthogonalising does not see a scale, so B may as well be the mean (1 - mu) B.
- The scale 0.2 sqrt(max(m, n)), and decoupled decay by the same rate: Liu et al. 2025 (arXiv 2502.16982), section 2.2.
- Spectron (Janson et al. 2026, arXiv 2602.12429), algorithms 1 and 3, as an implementation by others quotes them:
  both factors of W = U D move by rho = eta / (s_U + s_D + 1), where s comes of one power iteration on each factor
  before its update. eta has the scale of W here, and none (eta = lr) with `optim.matrix_scale` none.

A Newton-Schulz iteration X <- a X + b X X^T X + c X X^T X X^T X changes singular values only, each on its own: here it
is applied to them, between the singular vectors of torch's SVD, and no matrix is multiplied by itself.

Legend of shape suffixes: M rows, N columns of a matrix, R their minimum.
"""

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterInfo, ParameterTable

SMALLEST_NORM = 1e-7
"""A matrix whose Frobenius norm is smaller is divided by this instead (torch.optim.Muon's default)."""

FIRST_ITERATIONS = 16
"""Power iterations of Spectron's first update; later ones do one."""


@dataclass(frozen=True)
class Treatment:
    """How a parameter is updated."""

    optimizer: str
    lr_factor: float
    weight_decay: float
    eps: float


def treatments(config: Config) -> dict[str, Treatment]:
    """The treatment of every parameter, by what the configuration's descriptions of its fields say."""
    optim, model = config.optim, config.model
    found = {}
    for name, info in ParameterTable(model).items():
        of_block = name.startswith("blocks.") and model.depth_rule == "completep"
        treatment = Treatment(
            optim.name if info.kind in ("factor", "matrix") else "adamw",
            1.0,
            0.0 if info.kind in ("bias", "norm") else optim.weight_decay,
            optim.eps * model.base_depth / model.num_layers if of_block else optim.eps,
        )
        for rule in optim.rules:
            if is_meant(info, rule.kind, rule.names):
                given = {field: getattr(rule, field) for field in ("optimizer", "lr_factor", "weight_decay")}
                treatment = replace(treatment, **{field: value for field, value in given.items() if value is not None})
        if treatment.optimizer == "spectron" and info.kind != "factor":
            treatment = replace(treatment, optimizer="muon")
        found[name] = treatment
    return found


def is_meant(info: ParameterInfo, kind: str | None, names: str | None) -> bool:
    """Whether a rule is for a parameter: by its kind, or by a pattern of the shell."""
    if names is None:
        return info.kind == kind
    return re.fullmatch(fnmatch.translate(names), info.name) is not None


def other_factor_of(name: str) -> str:
    """Canonical name of the factor that a factor is multiplied with."""
    return name.replace(".up.", ".down.") if ".up." in name else name.replace(".down.", ".up.")


def newton_schulz_values(values: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """What the iterations make of singular values."""
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


def orthogonalised(matrix_MN: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """The result of the iterations from a matrix over its Frobenius norm, in fp64."""
    left_MR, values_R, right_RN = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    values_R = values_R / max(float(values_R.square().sum().sqrt()), SMALLEST_NORM)
    return left_MR * newton_schulz_values(values_R, steps, coefficients) @ right_RN


def power_iteration(weight_MN: Tensor, vector_N: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration from a right vector: the estimate u^T W v of the largest singular value, and the new v."""
    left_M = weight_MN @ vector_N
    left_M = left_M / left_M.norm()
    right_N = weight_MN.T @ left_M
    right_N = right_N / right_N.norm()
    return left_M @ weight_MN @ right_N, right_N


class ReferenceOptimizer:
    """AdamW (torch's), Muon and Spectron on the whole parameters of a model in fp64.

    Attributes:
        sums: B of each matrix that Muon or Spectron updates.
        vectors: Right vector [N] of the power iteration of each factor that Spectron updates.
        sigmas: The last estimate of each factor's largest singular value.
    """

    def __init__(self, config: Config, model: nn.Module, vectors: Mapping[str, Tensor]) -> None:
        """Begins anew; `vectors`: where the power iterations begin, unit vectors by name of the factor."""
        self._optim = config.optim
        self._table = ParameterTable(config.model)
        self._parameters = dict(model.named_parameters())
        self.treatments = treatments(config)
        matrices = [name for name, treatment in self.treatments.items() if treatment.optimizer != "adamw"]
        self.sums = {name: torch.zeros_like(self._parameters[name]) for name in matrices}
        factors = [name for name, treatment in self.treatments.items() if treatment.optimizer == "spectron"]
        self.vectors = {name: vectors[name].double() for name in factors}
        self.sigmas: dict[str, float] = {}
        self._adamw = torch.optim.AdamW(list(self._adamw_groups()), betas=self._optim.betas)

    def _adamw_groups(self) -> Iterator[dict[str, object]]:
        groups: dict[Treatment, list[nn.Parameter]] = {}
        for name, treatment in self.treatments.items():
            if treatment.optimizer == "adamw":
                groups.setdefault(treatment, []).append(self._parameters[name])
        for of, parameters in groups.items():
            rate = self._optim.lr * of.lr_factor
            yield {"params": parameters, "lr": rate, "weight_decay": of.weight_decay, "eps": of.eps}

    def momenta(self) -> dict[str, Tensor]:
        """The momentum of each matrix as a mean of its gradients: (1 - mu) B."""
        return {name: (1 - self._optim.momentum) * total for name, total in self.sums.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters once, by their gradients (clipped, where they are)."""
        self._estimate_sigmas()
        for name, total in self.sums.items():
            parameter, treatment = self._parameters[name], self.treatments[name]
            assert parameter.grad is not None
            total.mul_(self._optim.momentum).add_(parameter.grad)
            direction = parameter.grad + self._optim.momentum * total if self._optim.nesterov else total
            rate = self._optim.lr * treatment.lr_factor
            update = self._step_size(name, rate) * self.orthogonalised(direction)
            parameter.mul_(1 - rate * treatment.weight_decay).sub_(update)
        self._adamw.step()

    def orthogonalised(self, direction: Tensor) -> Tensor:
        """The same with the configuration's iterations."""
        return orthogonalised(direction, self._optim.newton_schulz_steps, self._optim.newton_schulz_coefficients)

    def _estimate_sigmas(self) -> None:
        for _ in range(1 if self.sigmas else FIRST_ITERATIONS):
            for name in self.vectors:
                sigma, self.vectors[name] = power_iteration(self._parameters[name], self.vectors[name])
                self.sigmas[name] = float(sigma)

    def _step_size(self, name: str, rate: float) -> float:
        if self.treatments[name].optimizer == "muon":
            return rate * self._scale(max(self._table[name].shape))
        other = other_factor_of(name)
        up, down = (name, other) if ".up." in name else (other, name)
        size = max(self._table[up].shape[0], self._table[down].shape[1])  # of W = U D
        return rate * self._scale(size) / (self.sigmas[name] + self.sigmas[other] + 1)

    def _scale(self, size: int) -> float:
        return 1.0 if self._optim.matrix_scale == "none" else 0.2 * math.sqrt(size)
