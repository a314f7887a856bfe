"""The optimizers and the parameter rules as text, for dry runs, model cards and reports. Imports no torch."""

from __future__ import annotations

from collections import Counter

from mlra_scale.config import ModelConfig, OptimConfig, ParameterRule
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.update_rules import update_rules

_WORDS = {"factor": ("factor", "factors"), "matrix": ("matrix", "matrices")}


def optimizer_text(model: ModelConfig, optim: OptimConfig) -> str:
    """Returns which optimizer updates what, with its settings, in one line; rules come beside it.

    Raises:
        ConfigError: As of `update_rules`.
    """
    first, second = optim.betas
    in_blocks = f", in blocks times {model.base_depth}/{model.num_layers}" if model.depth_rule == "completep" else ""
    adamw = f"AdamW (betas {first:g}, {second:g}; epsilon {optim.eps:g}{in_blocks})"
    table, counts = ParameterTable(model), dict[str, Counter[str]]()
    for name, rule in update_rules(model, optim).items():
        if not rule.is_adamw:
            counts.setdefault(rule.optimizer, Counter())[table[name].kind] += 1
    if not counts:
        return adamw
    shares = [
        f"{name} for " + " and ".join(f"{number} {_WORDS[kind][number != 1]}" for kind, number in of.items())
        for name, of in counts.items()
    ]
    momentum = "Nesterov momentum" if optim.nesterov else "momentum"
    scale = "0.2 sqrt(max(m, n))" if optim.matrix_scale == "match_rms_adamw" else "1"
    return (
        f"{', '.join(shares)}, {adamw} for all else; {' and '.join(counts)}: {momentum} {optim.momentum:g}, "
        f"{optim.newton_schulz_steps} Newton-Schulz steps, updates times {scale}"
    )


def rule_text(rule: ParameterRule) -> str:
    """Returns a rule as "parameters: what is different"."""
    changes = {
        "learning rate times {:g}": rule.lr_factor,
        "weight decay {:g}": rule.weight_decay,
        "optimizer {}": rule.optimizer,
    }
    selected = f"kind {rule.kind}" if rule.kind is not None else rule.names
    return f"{selected}: " + ", ".join(text.format(value) for text, value in changes.items() if value is not None)
