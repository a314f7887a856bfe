"""How each parameter is updated: its optimizer, learning rate, weight decay and epsilon. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from mlra_scale.config import ConfigError, ModelConfig, OptimConfig, OptimizerName, ParameterRule, Problem
from mlra_scale.model.parameters import ParameterInfo, ParameterTable

RMS_OF_ADAM = 0.2
"""Root mean square of the elements of an AdamW update as Moonlight saw it (0.2 to 0.4, arXiv 2502.16982, section 2.2).
Orthogonalised updates are scaled to it, so that they take AdamW's learning rate and weight decay."""

VECTOR_PREFIX = "optimizer_vector/"
"""Before the name of a factor: the name of the vector of its power iteration in a checkpoint."""


@dataclass(frozen=True)
class UpdateRule:
    """How one parameter is updated.

    Attributes:
        optimizer: "spectron" for factors of low-rank maps only, whose other factor is then updated by it too.
        lr_factor: Its learning rate as a multiple of the schedule's.
        weight_decay: Its decoupled weight decay.
        eps: Adam's epsilon.
        scale: muon, spectron: what an orthogonalised update is multiplied by beside the rate, 0.2 sqrt(max(m, n)) for a
            global matrix of m x n, for a factor updated by spectron that of the product; 1 with matrix_scale none.
    """

    optimizer: OptimizerName
    lr_factor: float
    weight_decay: float
    eps: float
    scale: float = 1.0

    @property
    def is_adamw(self) -> bool:
        """Whether AdamW updates it; the other optimizers orthogonalise."""
        return self.optimizer == "adamw"


def other_factor(name: str) -> str:
    """Returns the canonical name of the other factor of a low-rank map."""
    prefix, factor, _ = name.rsplit(".", 2)
    return f"{prefix}.{'down' if factor == 'up' else 'up'}.weight"


def matches(rule: ParameterRule, table: Mapping[str, ParameterInfo]) -> list[str]:
    """Returns the parameters that a rule is for, in the order of the table."""
    if rule.kind is not None:
        return [name for name, info in table.items() if info.kind == rule.kind]
    assert rule.names is not None
    return [name for name in table if fnmatchcase(name, rule.names)]


def update_rules(model: ModelConfig, optim: OptimConfig) -> dict[str, UpdateRule]:
    """Returns the rule of every parameter of a model, by canonical name.

    Raises:
        ConfigError: A rule matches nothing, or gives an optimizer to parameters that it is not for.
    """
    found, problems = _resolved(model, optim)
    if problems:
        raise ConfigError(list(problems))
    return dict(found)


def rule_problems(model: ModelConfig, optim: OptimConfig) -> list[Problem]:
    """Returns what `update_rules` would raise. Without rules that is nothing, and no table of a deep model is made."""
    return list(_resolved(model, optim)[1]) if optim.rules else []


@lru_cache(maxsize=16)  # the planner asks for each of its layouts
def _resolved(model: ModelConfig, optim: OptimConfig) -> tuple[dict[str, UpdateRule], tuple[Problem, ...]]:
    table = ParameterTable(model)
    found = {name: _default(info, model, optim) for name, info in table.items()}
    problems: list[Problem] = []
    for index, rule in enumerate(optim.rules):
        field, names = f"optim.rules.{index}", matches(rule, table)
        if not names:
            problems.append(Problem(field, _shown(rule), _remedy_of_no_match(rule, table)))
        given = {key: value for key in _GIVEN if (value := getattr(rule, key)) is not None}
        for name in names:
            if given.get("optimizer", "adamw") != "adamw" and table[name].kind not in ("factor", "matrix"):
                remedy = f"{name} is of kind {table[name].kind}, and {rule.optimizer} is for kinds factor and matrix"
                problems.append(Problem(field, _shown(rule), f"{remedy}; use a narrower pattern"))
                break
            found[name] = replace(found[name], **given)
    for name, of in found.items():
        if of.optimizer == "spectron" and table[name].kind == "factor":
            if found[other_factor(name)].optimizer != "spectron":
                remedy = f"spectron updates both factors of a map: give {other_factor(name)} the same optimizer"
                problems.append(Problem("optim.rules", [_shown(rule) for rule in optim.rules], remedy))
                break
        elif of.optimizer == "spectron":
            found[name] = replace(of, optimizer="muon")
    if problems:
        return {}, tuple(problems)
    return {name: replace(of, scale=_scale(table, name, of, optim)) for name, of in found.items()}, ()


def vector_lengths(rules: Mapping[str, UpdateRule], table: Mapping[str, ParameterInfo]) -> dict[str, int]:
    """Returns the vectors of spectron's power iterations by the names that checkpoints have: their lengths."""
    factors = [name for name, rule in rules.items() if rule.optimizer == "spectron"]
    return {VECTOR_PREFIX + name: table[name].shape[1] for name in factors}


_GIVEN = ("lr_factor", "weight_decay", "optimizer")


def _default(info: ParameterInfo, model: ModelConfig, optim: OptimConfig) -> UpdateRule:
    """Matrices of blocks have the named optimizer, all others AdamW; biases and norms do not decay."""
    is_matrix = info.kind in ("factor", "matrix")
    return UpdateRule(
        optimizer=optim.name if is_matrix else "adamw",
        lr_factor=1.0,
        weight_decay=0.0 if info.kind in ("bias", "norm") else optim.weight_decay,
        eps=optim.eps * (model.branch_factor if info.name.startswith("blocks.") else 1.0),
    )


def _scale(table: Mapping[str, ParameterInfo], name: str, rule: UpdateRule, optim: OptimConfig) -> float:
    """See UpdateRule.scale."""
    if rule.is_adamw or optim.matrix_scale == "none":
        return 1.0
    sizes = table[name].shape
    if rule.optimizer == "spectron":
        up, down = sorted((name, other_factor(name)), key=lambda factor: ".down." in factor)
        sizes = (table[up].shape[0], table[down].shape[1])
    return RMS_OF_ADAM * math.sqrt(max(sizes))


def _shown(rule: ParameterRule) -> dict[str, Any]:
    return rule.model_dump(exclude_none=True)


def _remedy_of_no_match(rule: ParameterRule, table: Mapping[str, ParameterInfo]) -> str:
    if rule.kind is not None:
        kinds = ", ".join(dict.fromkeys(info.kind for info in table.values()))
        return f"the model has no parameter of this kind; its kinds are {kinds}"
    names = ", ".join(name for name in table if not name.startswith("blocks.") or name.startswith("blocks.0."))
    return f"matches no parameter; of the first block, and outside the blocks, there are {names}"
