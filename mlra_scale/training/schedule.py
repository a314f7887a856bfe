"""The position of a run, and the learning rate as a pure function of the step: it needs no state of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlra_scale.config import BatchPlan, OptimConfig

WSD_DECAY_SHARE = 0.2
"""Share of all steps that the final decay of warmup-stable-decay takes when decay_steps is not given."""


@dataclass(frozen=True)
class Progress:
    """The counters of a run: the only owner of the step count and of the position in the data.

    Attributes:
        step: Steps done; skipped updates count, since their data are used up.
        consumed_samples: Samples used up over all ranks, those that the guard skips included: where the next step
            reads.
        consumed_tokens: Tokens trained on, over all ranks.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, plan: BatchPlan, first_sample: int | None = None) -> Progress:
        """Returns the counters after a step that read its samples from `first_sample` (None: `consumed_samples`)."""
        first = self.consumed_samples if first_sample is None else first_sample
        return Progress(self.step + 1, first + plan.global_batch_size, self.consumed_tokens + plan.tokens_per_step)


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Returns the learning rate of one update.

    The rate rises linearly over the warm-up and reaches `optim.lr` on step `warmup_steps`. Then it follows
    - `cosine`: half a cosine over `decay_steps` down to `lr * min_lr_ratio`, and stays there;
    - `wsd` (warmup-stable-decay): `lr` until `decay_steps` before the end, then a straight line down to the minimum;
    - `constant`: `lr`.

    Args:
        step: Number of the update, counted from 1.
        optim: The schedule's settings.
        total_steps: Number of updates of the whole run.
    """
    assert step >= 1, step
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    return optim.lr * _decay(step, optim, total_steps)


def _decay(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Returns the factor on the peak rate after the warm-up, from 1 down to `min_lr_ratio`."""
    floor = optim.min_lr_ratio
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        length = optim.decay_steps if optim.decay_steps is not None else total_steps - optim.warmup_steps
        share = _share(step - optim.warmup_steps, length)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share))
    length = optim.decay_steps if optim.decay_steps is not None else max(1, round(WSD_DECAY_SHARE * total_steps))
    start = max(optim.warmup_steps, total_steps - length)
    return floor + (1.0 - floor) * (1.0 - _share(step - start, total_steps - start))


def _share(steps: int, length: int) -> float:
    """Returns the share of a decay of `length` steps that is over after `steps` of them."""
    if steps <= 0:
        return 0.0
    return min(1.0, steps / length) if length > 0 else 1.0
