"""What README.md fixes before any run: arms, rates, depths, seeds, and what is expected of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ARMS = (
    "dense",
    "control",
    "mlra",
    "mlra-undecayed",
    "dense-muon",
    "control-muon",
    "mlra-muon",
    "mlra-spectron",
)
"""The arms of the second and third sweep."""
SEEDS = (11, 12, 13, 14, 15)
"""The screening has seed 1."""
RATES = (1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
RATES_DEPTH = 48
"""Rates and depth of the second sweep."""
DEPTHS = (12, 96)
"""Of the third sweep, in which each arm has the best rate of the screening."""
MARGIN = 0.02
"""Nats per token: a difference whose interval lies within it is called none."""

Quantity = Literal["best loss", "sensitivity", "largest logit", "largest singular value", "TEV", "loss at depth"]
Sign = Literal["lower", "higher", "none"]


@dataclass(frozen=True)
class Hypothesis:
    """What is expected of one arm minus another.

    Attributes:
        name: Its number in README.md.
        quantity: What is compared (`analysis.values_of`).
        first, second: The arms; the second is subtracted.
        sign: Whether the first is expected to be lower or higher; none: no difference beyond MARGIN.
        depth: Of a loss at depth.
    """

    name: str
    quantity: Quantity
    first: str
    second: str
    sign: Sign
    depth: int = RATES_DEPTH


HYPOTHESES = (
    Hypothesis("H1", "best loss", "dense-muon", "dense", "lower"),
    Hypothesis("H2", "best loss", "mlra-muon", "mlra", "lower"),
    Hypothesis("H3", "best loss", "mlra-spectron", "mlra-muon", "none"),
    Hypothesis("H4", "best loss", "mlra", "control", "none"),
    Hypothesis("H5", "best loss", "mlra-muon", "control-muon", "none"),
    Hypothesis("H6", "sensitivity", "mlra", "dense", "higher"),
    Hypothesis("H7", "sensitivity", "mlra-muon", "mlra", "lower"),
    Hypothesis("H8", "sensitivity", "mlra-spectron", "mlra-muon", "lower"),
    Hypothesis("H9", "largest logit", "mlra", "dense", "higher"),
    Hypothesis("H10", "largest logit", "mlra-spectron", "dense-muon", "lower"),
    Hypothesis("H11", "largest singular value", "mlra-spectron", "mlra-muon", "lower"),
    Hypothesis("H12", "TEV", "mlra-undecayed", "mlra", "higher"),
    Hypothesis("H13", "best loss", "mlra-undecayed", "mlra", "none"),
    Hypothesis("H14", "sensitivity", "mlra-undecayed", "mlra", "none"),
    Hypothesis("H15", "loss at depth", "mlra-spectron", "mlra", "lower", depth=12),
    Hypothesis("H16", "loss at depth", "mlra-spectron", "mlra", "lower", depth=96),
)
