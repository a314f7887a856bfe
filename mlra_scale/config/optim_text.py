"""The optimizer and its parameter rules as text, for dry runs, model cards and reports."""

from __future__ import annotations

from mlra_scale.config.model_config import ModelConfig
from mlra_scale.config.optim_config import OptimConfig, ParameterRule


def optimizer_text(model: ModelConfig, optim: OptimConfig) -> str:
    """Returns which optimizer updates what, with its settings, in one line; rules come beside it."""
    first, second = optim.betas
    in_blocks = f", in blocks times {model.base_depth}/{model.num_layers}" if model.depth_rule == "completep" else ""
    adamw = f"AdamW (betas {first:g}, {second:g}; epsilon {optim.eps:g}{in_blocks})"
    text = adamw if optim.name == "adamw" else f"{optim.name} for matrices of blocks, {adamw} for all else"
    used = dict.fromkeys(name for name in (optim.name, *(rule.optimizer for rule in optim.rules)) if name is not None)
    if orthogonalised := " and ".join(name for name in used if name != "adamw"):
        kind = "Nesterov momentum" if optim.nesterov else "momentum"
        text += f"; {orthogonalised}: {kind} {optim.momentum:g}, {optim.newton_schulz_steps} Newton-Schulz steps"
    return text


def rule_text(rule: ParameterRule) -> str:
    """Returns a rule as "parameters: what is different"."""
    changes = {
        "learning rate times {:g}": rule.lr_factor,
        "weight decay {:g}": rule.weight_decay,
        "optimizer {}": rule.optimizer,
    }
    selected = f"kind {rule.kind}" if rule.kind is not None else rule.names
    return f"{selected}: " + ", ".join(text.format(value) for text, value in changes.items() if value is not None)
