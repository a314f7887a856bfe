"""The base of all sections of the schema, and the sections about stability.

The models are frozen and strict: an integer field takes no text and no fraction, a key that is not here is an error.
Tuples are declared with strict=False, because YAML and JSON know lists only; their items stay strict.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Quantile = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Text = Annotated[str, Field(min_length=1)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]


class Section(BaseModel):
    """Base of all sections: immutable, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TevConfig(Section):
    """Token embedding variability: how often and what of its distribution."""

    every: int = Field(10, ge=0, description="Steps between measurements; 0: off.")
    quantiles: tuple[Quantile, ...] = Field(
        (0.05, 0.25, 0.5, 0.75, 0.95), strict=False, description="Quantiles of the distribution over tokens to record."
    )
    extremes: int = Field(0, ge=0, description="How many of the highest and of the lowest tokens to record.")


class GradientsConfig(Section):
    """Statistics of gradients, updates and weights, per layer and kind."""

    every: int = Field(0, ge=0, description="Steps between measurements; 0: off.")
    noise_every: int = Field(
        0,
        ge=0,
        description="Steps between estimates of the gradient noise scale; each costs one more forward and backward "
        "pass over a global batch; 0: off.",
    )
    spectral_iterations: int = Field(
        0,
        ge=0,
        description="Lanczos iterations (each costs what a power iteration does) per measurement for the largest "
        "singular values of the attention products, q k^T and o v of each head; 0: they are not measured.",
    )


class ActivationsConfig(Section):
    """What a probe batch shows of the activations, outside the hot path."""

    every: int = Field(0, ge=0, description="Steps between probes; 0: off.")
    samples: int = Field(4, ge=1, description="The first so many samples of the validation data are the probe batch.")
    saturation: float = Field(
        0.99, gt=0.0, lt=1.0, description="A row of attention weights whose largest is above this is saturated."
    )


class QkClipConfig(Section):
    """QK-clip: heads whose attention logits grow too large get smaller query and key weights, after an update."""

    threshold: float | None = Field(
        None,
        gt=0.0,
        description="A head whose largest attention logit is above this is scaled down to it (Kimi K2: 100); null: "
        "off.",
    )
    every: int = Field(
        1, ge=1, description="Steps between clips; each costs a forward pass over the samples that are looked at."
    )
    samples: int | None = Field(
        None, ge=1, description="The first so many samples of the step's global batch are looked at; null: all."
    )


class GuardConfig(Section):
    """What is done about instability; off, a run computes exactly what it would compute without."""

    enabled: bool = Field(False, description="Skip bad updates, then lower the rate, then go back to a checkpoint.")
    window: int = Field(128, ge=8, description="Steps whose loss and gradient norm say what is usual.")
    min_window: int = Field(64, ge=4, description="Steps before anything is judged; at most window.")
    sigmas: float = Field(
        6.0, gt=0.0, description="An update is bad if its loss or gradient norm is so many deviations above the mean."
    )
    calm_steps: int = Field(
        50, ge=1, description="An episode is over after so many steps in a row without a bad update."
    )
    max_skips: int = Field(
        3, ge=0, description="Bad updates left out in one episode before the learning rate is lowered."
    )
    rate_factor: float = Field(0.5, gt=0.0, lt=1.0, description="What the learning rate is lowered by.")
    rate_steps: int = Field(
        200, ge=1, description="Steps over which it comes back to the schedule, in a straight line."
    )
    max_lowerings: int = Field(
        1, ge=0, description="Lowerings in one episode; after so many and max_skips bad updates more the run goes back."
    )
    divergence: float | None = Field(
        1.0,
        gt=0.0,
        description="The run goes back if the mean loss of the last divergence_steps steps is so much (nats) above the "
        "lowest such mean; null: never for that.",
    )
    divergence_steps: int = Field(32, ge=2, description="Steps of the mean above.")
    skip_before: int = Field(
        50, ge=0, description="Steps before the trouble whose data are skipped too after the run went back."
    )
    max_rollbacks: int = Field(3, ge=0, description="Times that the run goes back; once more, and it stops.")
