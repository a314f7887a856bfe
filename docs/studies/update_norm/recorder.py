"""Watches the updates of an engine of one process from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from docs.studies.update_norm.report import LARGEST_C
from mlra_scale.model.update_rules import other_factor
from mlra_scale.parallel import StepResult
from mlra_scale.parallel.engine import Engine
from mlra_scale.parallel.factor_norms import FactorNorms

_UP = ".up.weight"


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """Records every update of this process's engine in the list that it yields, until the end of the block."""
    train_batch, advance = Engine.train_batch, FactorNorms.advance
    records: list[dict[str, Any]] = []
    estimates: dict[str, float] = {}

    def advance_and_tell(norms: FactorNorms, masters: Mapping[str, Any]) -> None:
        advance(norms, masters)
        estimates.update({name: float(value) for name, value in norms.estimates().items()})

    def train_and_record(engine: Engine, batches: Sequence[Any], learning_rate: float, *more: Any) -> StepResult:
        estimates.clear()
        before = factors_of(engine)
        result = train_batch(engine, batches, learning_rate, *more)
        records.append({"step": len(records) + 1, **measured(engine, before, learning_rate, estimates)})
        return result

    with (
        mock.patch.object(FactorNorms, "advance", advance_and_tell),
        mock.patch.object(Engine, "train_batch", train_and_record),
    ):
        yield records


def factors_of(engine: Engine) -> dict[str, Tensor]:
    """Returns the fp32 masters of all factors in fp64, by name."""
    assert engine.topology.world_size == 1
    return {
        part.name: part.values.detach().double().view(engine.table[part.name].shape)
        for part in engine.owned_fragments()
        if engine.table[part.name].kind == "factor"
    }


def measured(
    engine: Engine, before: Mapping[str, Tensor], learning_rate: float, estimates: Mapping[str, float]
) -> dict[str, Any]:
    """Returns what an update did to the products W = U D, largest values over all of them.

    Args:
        engine: After the update.
        before: `factors_of` before it.
        learning_rate: Of the schedule.
        estimates: The s of every factor that Spectron used; empty for other optimizers.

    Returns:
        update: |dW|, the spectral norm of the change U* D* - U D, where a star stands for a factor after the update
        without its weight decay; median_update: its median over the products. eta: 0.2 sqrt(max(m, n)) times the rate.
        sigma: |W| after the update, with decay. For Spectron also c: the largest singular value of an orthogonalised
        momentum, from the factors' own moves; bound_share: |dW| over C rho (sigma_U + sigma_D) + C^2 rho^2 with
        C = LARGEST_C; estimate_share: the smallest s / sigma; rho: the largest.
    """
    after = factors_of(engine)
    ups = [name for name in after if name.endswith(_UP)]
    old_U, new_U = (_stacked(of, ups) for of in (before, after))
    old_D, new_D = (_stacked(of, [other_factor(name) for name in ups]) for of in (before, after))
    # W' = (1 - rate decay) W - move of each factor, for every optimizer here.
    kept = 1.0 - learning_rate * engine.rules[ups[0]].weight_decay
    move_U, move_D = kept * old_U - new_U, kept * old_D - new_D
    updates = _norms((old_U - move_U) @ (old_D - move_D) - old_U @ old_D)
    size = max(new_U.shape[-2], new_D.shape[-1])
    eta = 0.2 * size**0.5 * learning_rate
    found = {
        "learning_rate": learning_rate,
        "update": float(updates.max()),
        "median_update": float(updates.median()),
        "eta": eta,
        "sigma": float(_norms(new_U @ new_D).max()),
    }
    if not estimates:
        return found
    s_U, s_D = (torch.tensor([estimates[of(name)] for name in ups]).double() for of in (str, other_factor))
    rho = eta / (s_U + s_D + 1.0)
    sigma_U, sigma_D = _norms(old_U), _norms(old_D)
    # The move is rho times the orthogonalised momentum. With their own c any two moves keep the bound.
    c = torch.maximum(_norms(move_U), _norms(move_D)) / rho
    bound = LARGEST_C * rho * (sigma_U + sigma_D) + (LARGEST_C * rho).square()
    return found | {
        "bound_share": float((updates / bound).max()),
        "c": float(c.max()),
        "estimate_share": float(torch.cat([s_U / sigma_U, s_D / sigma_D]).min()),
        "rho": float(rho.max()),
    }


def _stacked(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.stack([tensors[name] for name in names])


def _norms(matrices: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrices)[:, 0]
