"""The oracle of the optimizers against torch.optim.Muon, against matrix products, and against small cases by hand."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import _muon

from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import update_rules
from tests.support.layouts import Layout, layout_config
from tests.support.optimizers import (
    ReferenceOptimizer,
    newton_schulz_values,
    orthogonalised,
    other_factor_of,
    power_iteration,
    treatments,
)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RULES = (
    {"kind": "embedding", "weight_decay": 0.0},
    {"names": "blocks.*.attention.v.*.weight", "optimizer": "muon"},
    {"names": "blocks.1.*", "lr_factor": 0.5},
    {"names": "*bias", "weight_decay": 0.3},
)


class Parameters(nn.Module):
    """Parameters with canonical names, random, in fp64."""

    def __init__(self, config: Config, seed: int = 5) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        for name, info in ParameterTable(config.model).items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(leaf, nn.Parameter(self.random(info.shape)))

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def set_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = self.random(tuple(parameter.shape))


def small_config(**options: Any) -> Config:
    return layout_config(Layout(), **{"model__num_layers": 2, "model__hidden_size": 16, "optim__lr": 0.1, **options})


def vectors_of(config: Config, parameters: Parameters) -> dict[str, torch.Tensor]:
    table = ParameterTable(config.model)
    names = [name for name, of in treatments(config).items() if of.optimizer == "spectron"]
    return {name: nn.functional.normalize(parameters.random(table[name].shape[1:]), dim=0) for name in names}


def products(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The iterations as they are usually written, by products of matrices."""
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16), (1, 7), (7, 1)])
def test_iterations_of_singular_values_are_those_of_the_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps in (1, 5, 8):
        expected = products(matrix, steps)
        for found in (orthogonalised(matrix, steps, COEFFICIENTS), orthogonalised(matrix.T, steps, COEFFICIENTS).T):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_bounds_of_the_usual_coefficients() -> None:
    """After 5 steps: slope 485 at zero, never above 1.2024, and not below 0.68 from 0.002 on."""
    values = torch.logspace(-8, 0, 200001, dtype=torch.float64)
    after = newton_schulz_values(values, 5, COEFFICIENTS)
    assert math.isclose(float((after / values).max()), COEFFICIENTS[0] ** 5, rel_tol=1e-9)
    assert 1.2023 < float(after.max()) < 1.2024
    assert 0.6818 < float(after[values >= 0.002].min()) < 0.6819
    assert float(after[values < 0.001].max()) < 0.4706


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(nesterov: bool) -> None:
    """Momentum, decay and scale are torch.optim.Muon's, with its Newton-Schulz iterations in fp64 instead of bf16."""
    config = small_config(optim__name="muon", optim__nesterov=nesterov, optim__momentum=0.9, optim__weight_decay=0.2)
    parameters, theirs = Parameters(config), Parameters(config)
    optimizer = ReferenceOptimizer(config, parameters, {})
    matrices = [p for name, p in theirs.named_parameters() if treatments(config)[name].optimizer == "muon"]
    assert len(matrices) == 2 * 9
    muon = torch.optim.Muon(
        matrices, lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )

    def in_fp64(grad: torch.Tensor, coefficients: Any, steps: int, eps: float) -> torch.Tensor:
        return orthogonalised(grad, steps, coefficients)

    with mock.patch.object(_muon, "_zeropower_via_newtonschulz", in_fp64):
        for _ in range(3):
            parameters.set_gradients()
            for ours, their in zip(parameters.parameters(), theirs.parameters(), strict=True):
                their.grad = ours.grad
            optimizer.step()
            muon.step()
    for (name, ours), their in zip(parameters.named_parameters(), theirs.parameters(), strict=True):
        if treatments(config)[name].optimizer == "muon":
            torch.testing.assert_close(ours, their, rtol=1e-12, atol=1e-12, msg=name)
            momentum = optimizer.momenta()[name]
            torch.testing.assert_close(momentum, muon.state[their]["momentum_buffer"], rtol=1e-12, atol=1e-12)


def test_torchs_bf16_iterations_are_near_those_in_fp64() -> None:
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))  # well conditioned
    theirs = _muon._zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7).double()
    ours = orthogonalised(matrix, 5, COEFFICIENTS)
    assert 1e-3 < float((theirs - ours).norm() / ours.norm()) < 2e-2


def test_spectron_by_hand() -> None:
    """One pair, one step: each number by its definition."""
    config = small_config(optim__name="spectron", optim__weight_decay=0.2, optim__nesterov=False)
    parameters = Parameters(config)
    vectors = vectors_of(config, parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.named_parameters()}
    optimizer = ReferenceOptimizer(config, parameters, vectors)
    parameters.set_gradients()
    optimizer.step()
    up, down = (f"blocks.1.attention.k.{factor}.weight" for factor in ("up", "down"))
    sigmas = []
    for name in (up, down):
        v = vectors[name]
        for _ in range(15):
            v = before[name].T @ before[name] @ v
        u = before[name] @ v
        u = u / u.norm()
        sigmas.append(float((before[name].T @ u).norm()))
        assert sigmas[-1] <= float(torch.linalg.matrix_norm(before[name], 2))
    rho = 0.1 * 0.2 * math.sqrt(16) / (sum(sigmas) + 1)
    after = dict(parameters.named_parameters())
    for name in (up, down):
        gradient = after[name].grad
        assert gradient is not None
        expected = before[name] * (1 - 0.1 * 0.2) - rho * orthogonalised(gradient, 5, COEFFICIENTS)
        torch.testing.assert_close(after[name].detach(), expected, rtol=1e-12, atol=1e-12)
    # A dense matrix is Muon's.
    name = "blocks.0.mlp.fc_in.weight"
    gradient = after[name].grad
    assert gradient is not None
    expected = before[name] * 0.98 - 0.1 * 0.2 * math.sqrt(64) * orthogonalised(gradient, 5, COEFFICIENTS)
    torch.testing.assert_close(after[name].detach(), expected, rtol=1e-12, atol=1e-12)


def test_power_iterations_converge_from_below() -> None:
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vector = torch.ones(20, dtype=torch.float64) / math.sqrt(20)
    true, last = float(torch.linalg.matrix_norm(matrix, 2)), 0.0
    for _ in range(200):
        sigma, vector = power_iteration(matrix, vector)
        assert last - 1e-12 <= float(sigma) <= true + 1e-12
        last = float(sigma)
    assert math.isclose(last, true, rel_tol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "muon", "spectron"])
@pytest.mark.parametrize("depth_rule", ["none", "completep"])
def test_the_projects_rules_are_the_oracles(name: str, depth_rule: str) -> None:
    """Two readings of the same descriptions: mlra_scale/model/update_rules.py and tests/support/optimizers.py."""
    config = small_config(optim__name=name, optim__rules=RULES, model__depth_rule=depth_rule, model__base_depth=6)
    ours, theirs = treatments(config), update_rules(config.model, config.optim)
    assert ours.keys() == theirs.keys()
    for parameter, of in ours.items():
        rule = theirs[parameter]
        assert (of.optimizer, of.lr_factor, of.weight_decay) == (rule.optimizer, rule.lr_factor, rule.weight_decay)
        assert of.eps == pytest.approx(rule.eps, rel=1e-15)
    assert ours["embedding.weight"].weight_decay == 0.0 and ours["positions.weight"].weight_decay == 0.1
    assert ours["blocks.1.mlp.fc_in.bias"].lr_factor == 0.5 and ours["blocks.0.mlp.fc_in.bias"].lr_factor == 1.0
    assert ours["blocks.0.mlp.fc_in.bias"].weight_decay == ours["final_norm.bias"].weight_decay == 0.3
    assert ours["blocks.0.mlp.fc_in.bias"].eps == pytest.approx(3e-8 if depth_rule == "completep" else 1e-8, rel=1e-12)
    assert ours["final_norm.bias"].eps == 1e-8
    assert ours["blocks.0.attention.v.up.weight"].optimizer == "muon"
    assert ours["blocks.0.attention.q.up.weight"].optimizer == name
    assert other_factor_of("blocks.0.attention.v.up.weight") == "blocks.0.attention.v.down.weight"
