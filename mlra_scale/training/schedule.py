"""Learning-rate schedules: pure functions of the step, so that nothing needs saving and any step can be asked for."""

from __future__ import annotations

import math

from mlra_scale.config import OptimConfig

WSD_DECAY_SHARE = 0.2
"""Share of all steps that the final decay of warmup-stable-decay takes when decay_steps is not given."""


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

    Returns:
        The rate, between 0 and `optim.lr`.
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
        progress = _progress(step - optim.warmup_steps, length)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    length = optim.decay_steps if optim.decay_steps is not None else max(1, round(WSD_DECAY_SHARE * total_steps))
    start = max(optim.warmup_steps, total_steps - length)
    progress = _progress(step - start, total_steps - start)
    return floor + (1.0 - floor) * (1.0 - progress)


def _progress(steps: int, length: int) -> float:
    """Returns how much of a decay of `length` steps is over after `steps` of them, from 0 to 1."""
    if steps <= 0:
        return 0.0
    return min(1.0, steps / length) if length > 0 else 1.0
