"""The base of all sections of the schema, and the sections about stability.

The models are frozen and strict: an integer field takes no text and no fraction, a key that is not here is an error.
Tuples are declared with strict=False, because YAML and JSON know lists only; their items stay strict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Quantile = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Text = Annotated[str, Field(min_length=1)]
LicenseName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,}(-[A-Za-z0-9]+)*$")]
HubName = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
Tag = Annotated[str, Field(min_length=1, max_length=64)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys, finite numbers; a docstring describes each field."""

    replaced: ClassVar[Mapping[str, str]] = {}
    """Fields of earlier versions, and what to write instead of each."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TevConfig(Section):
    """Token embedding variability: how often it is measured, and which parts of its distribution are recorded."""

    every: int = Field(10, ge=0)
    """Steps between measurements; 0: off."""
    quantiles: tuple[Quantile, ...] = Field((0.05, 0.25, 0.5, 0.75, 0.95), strict=False)
    """Quantiles of the distribution over tokens to record."""
    extremes: int = Field(0, ge=0)
    """How many of the highest and of the lowest tokens to record."""


class GradientsConfig(Section):
    """Statistics of gradients, updates and weights, per layer and kind."""

    every: int = Field(0, ge=0)
    """Steps between measurements; 0: off."""
    noise_every: int = Field(0, ge=0)
    """Steps between estimates of the gradient noise scale; each costs one more forward and backward pass over a global
    batch; 0: off."""
    spectral_iterations: int = Field(0, ge=0)
    """Lanczos iterations (each costs what a power iteration does) per measurement for the largest singular values of
    the attention products, q k^T and o v of each head; 0: they are not measured."""


class ActivationsConfig(Section):
    """Statistics of the activations of a probe batch, outside the hot path."""

    every: int = Field(0, ge=0)
    """Steps between probes; 0: off."""
    samples: int = Field(4, ge=1)
    """Size of the probe batch, the first samples of the validation data."""
    saturation: float = Field(0.99, gt=0.0, lt=1.0)
    """A row of attention weights whose largest is above this is saturated."""


class QkClipConfig(Section):
    """QK-clip: after an update, query and key weights of heads with too large attention logits are scaled down."""

    threshold: float | None = Field(None, gt=0.0)
    """A head whose largest attention logit is above this is scaled down to it (Kimi K2: 100); null: off."""
    every: int = Field(1, ge=1)
    """Steps between clips; each costs a forward pass over `samples` samples."""
    samples: int | None = Field(None, ge=1)
    """How many of the first samples of the step's global batch are examined; null: all."""


class GuardConfig(Section):
    """Reaction to instability; when it is off, it does not change the computation."""

    enabled: bool = False
    """Skip bad updates, then lower the rate, then roll back to a checkpoint."""
    window: int = Field(128, ge=8)
    """Number of last steps for mean and deviation of loss and gradient norm."""
    min_window: int = Field(64, ge=4)
    """Steps in the window before an update is judged; at most window."""
    sigmas: float = Field(6.0, gt=0.0)
    """An update is bad if its loss or gradient norm is this many deviations above the mean."""
    calm_steps: int = Field(50, ge=1)
    """An episode ends after this many steps in a row without a bad update."""
    max_skips: int = Field(3, ge=0)
    """Bad updates left out in one episode before the learning rate is lowered."""
    rate_factor: float = Field(0.5, gt=0.0, lt=1.0)
    """Factor by which the learning rate is lowered."""
    rate_steps: int = Field(200, ge=1)
    """Steps over which it returns to the schedule, in a straight line."""
    max_lowerings: int = Field(1, ge=0)
    """Lowerings in one episode; after them and max_skips more bad updates the run rolls back."""
    divergence: float | None = Field(1.0, gt=0.0)
    """The run rolls back if the mean loss of the last divergence_steps steps is this much (nats) above the lowest such
    mean; null: never for that."""
    divergence_steps: int = Field(32, ge=2)
    """Steps of the mean above."""
    skip_before: int = Field(50, ge=0)
    """Steps before the bad updates whose data are skipped too after a rollback."""
    max_rollbacks: int = Field(3, ge=0)
    """Number of rollbacks; where one more is needed, the run stops. Those for silent data corruption are counted apart,
    from the last step that was found right."""
    replay_every: int = Field(0, ge=0)
    """Steps between steps that are computed again and compared, on the same ranks and with several data ranks on other
    ones too, to find silent data corruption; such a step costs 2 steps, or 3 with several data ranks; 0: off."""
    checksum_every: int = Field(0, ge=0)
    """Steps between steps before and after which a checksum of weights and optimizer state is taken, to find what
    changed in memory between two updates; 0: off."""
