"""Muon and Spectron for the matrices of blocks, in every layout; AdamW of the same engine updates all other parameters.

Muon (Jordan et al. 2024; scaled as in Moonlight, arXiv 2502.16982): with gradient G (clipped), momentum
B <- mu B + (1 - mu) G, by Nesterov's method U = mu B + (1 - mu) G, and O = Newton-Schulz(U),

    W <- (1 - lr wd) W - eta O,        eta = 0.2 sqrt(max(m, n)) lr for W of m x n.

Spectron (Janson et al. 2026, arXiv 2602.12429) for W = W_U W_D: each factor is orthogonalised by itself and takes
rho = eta / (s_U + s_D + 1) in place of eta, with m and n of the product and estimates s of the largest singular values
sigma of the factors. With c the larger one of the largest singular values of the two O, the change of the product is at
most c rho (sigma_U + sigma_D) + c^2 rho^2 in spectral norm, before weight decay.

Momentum is kept where DeepSpeed keeps the master weights, in the same pieces, as `exp_avg` of the optimizer's state.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from mlra_scale.config import Config
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import UpdateRule
from mlra_scale.parallel.factor_norms import FactorNorms
from mlra_scale.parallel.fragments import Fragment
from mlra_scale.parallel.matrix_exchange import MatrixExchange, Round
from mlra_scale.parallel.newton_schulz import orthogonalised
from mlra_scale.parallel.topology import Topology


class MatrixOptimizer:
    """Updates the matrices of a stage in place, and keeps their momentum. Collective over the ranks of the stage.

    Args:
        rules: Of all parameters of the stage.
        held: First element and number of elements that this rank holds of its parameters.
        owns: See FactorNorms.
        is_replicated_over_data: Whether every data rank holds the same.
    """

    def __init__(
        self,
        config: Config,
        table: ParameterTable,
        topology: Topology,
        rules: Mapping[str, UpdateRule],
        held: Mapping[str, tuple[int, int]],
        owns: Callable[[str], bool],
        is_replicated_over_data: bool,
    ) -> None:
        self._optim = config.optim
        self.rules = {name: rule for name, rule in rules.items() if not rule.is_adamw}
        infos = [table[name] for name in self.rules]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.newton_schulz_precision]
        self._exchange = MatrixExchange(infos, held, topology, is_replicated_over_data, dtype)
        factors = [info for info in infos if self.rules[info.name].optimizer == "spectron"]
        self.norms = FactorNorms(factors, topology, owns, config.train.seed) if factors else None

    @torch.no_grad()
    def update(
        self, masters: Mapping[str, Fragment], gradients: Iterable[Fragment], factor: float, learning_rate: float
    ) -> None:
        """Makes one update.

        Args:
            masters: The fp32 fragments that this rank holds, with their momentum as `exp_avg`.
            gradients: The reduced gradient of the same elements; may also have those of other parameters.
            factor: What the gradient is multiplied by: clipping, and one over the loss scale.
            learning_rate: That of the schedule.
        """
        divisors: dict[str, torch.Tensor] = {}
        if self.norms is not None:
            self.norms.advance(masters)
            divisors = self.norms.divisors()
        found = {gradient.name: gradient.values for gradient in gradients if gradient.name in self.rules}
        for turn in self._exchange.rounds:
            names = [each.name for each in turn.transfers if each.name in found]
            fragments = {name: masters[name] for name in names}
            directions = self._directions(fragments, [found[name] for name in names], factor)
            updates = self._exchange.from_owner(turn, self._orthogonalised(turn, directions))
            self._apply(fragments, updates, divisors, learning_rate)
            del updates  # frees the buffer in which they came before the next round

    def _directions(
        self, masters: Mapping[str, Fragment], gradients: list[torch.Tensor], factor: float
    ) -> dict[str, torch.Tensor]:
        """Adds gradients to the momentum; returns what is to be orthogonalised, in fp32."""
        mu = self._optim.momentum
        momenta = [_momentum(master) for master in masters.values()]
        if not momenta:
            return {}
        scaled = list(torch._foreach_mul([gradient.to(torch.float32) for gradient in gradients], factor))
        torch._foreach_lerp_(momenta, scaled, 1.0 - mu)
        if self._optim.nesterov:
            torch._foreach_lerp_(scaled, momenta, mu)
        return dict(zip(masters, scaled if self._optim.nesterov else momenta, strict=True))

    def _orthogonalised(self, turn: Round, directions: dict[str, torch.Tensor]) -> torch.Tensor:
        optim, dtype = self._optim, self._exchange.dtype
        coefficients, steps = optim.newton_schulz_coefficients, optim.newton_schulz_steps
        # No name here for the matrix that came: `orthogonalised` frees it.
        return orthogonalised(self._exchange.to_owner(turn, directions), coefficients, steps, dtype)

    def _apply(
        self,
        masters: Mapping[str, Fragment],
        updates: Mapping[str, torch.Tensor],
        divisors: Mapping[str, torch.Tensor],
        learning_rate: float,
    ) -> None:
        """Moves the weights of a round: decay, then the update."""
        if not masters:
            return
        rules = [self.rules[name] for name in masters]
        rates = [learning_rate * rule.lr_factor for rule in rules]
        weights = [master.values for master in masters.values()]
        moves = [updates[name].to(weight.device, torch.float32) for name, weight in zip(masters, weights, strict=True)]
        of_factors = [(move, divisors[name]) for name, move in zip(masters, moves, strict=True) if name in divisors]
        for move, divisor in of_factors:
            move.div_(divisor)
        torch._foreach_mul_(weights, [1.0 - rate * rule.weight_decay for rate, rule in zip(rates, rules, strict=True)])
        torch._foreach_mul_(moves, [rate * rule.scale for rate, rule in zip(rates, rules, strict=True)])
        torch._foreach_sub_(weights, moves)


def _momentum(master: Fragment) -> torch.Tensor:
    assert master.exp_avg is not None, master.name
    return master.exp_avg
