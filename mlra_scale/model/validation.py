"""The check of a whole configuration. Imports no torch."""

from __future__ import annotations

from mlra_scale.config import Config, ConfigError, config_problems
from mlra_scale.model.update_rules import rule_problems


def validate(config: Config, world_size: int, device: str | None = None) -> None:
    """Checks all fields together, and the parameter rules against the parameters of the model.

    Args:
        config: The configuration, with its layout.
        world_size: Number of ranks that run it (or, for a dry run, would run it).
        device: "cpu" or "cuda" where train.device "auto" has been resolved; None takes train.device as it stands.

    Raises:
        ConfigError: With every problem found.
    """
    problems = config_problems(config, world_size, device) + rule_problems(config.model, config.optim)
    if problems:
        raise ConfigError(problems)
