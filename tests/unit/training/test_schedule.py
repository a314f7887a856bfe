from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_scale.config import OptimConfig
from mlra_scale.training.schedule import WSD_DECAY_SHARE, learning_rate

PEAK = 3e-4


def optim(**fields: Any) -> OptimConfig:
    return OptimConfig(lr=PEAK, **fields)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    """Any valid pair of settings and number of steps."""
    total = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, total))
    schedule = draw(st.sampled_from(["cosine", "wsd", "constant"]))
    longest = total - warmup if schedule == "wsd" else 2 * total
    decay = None
    if schedule != "constant" and longest >= 1:
        decay = draw(st.none() | st.integers(1, longest))
    floor = draw(st.floats(0.0, 1.0))
    return optim(schedule=schedule, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=floor), total


@given(schedules())
def test_the_rate_rises_in_warmup_and_never_after_without_jumps_between_floor_and_peak(
    case: tuple[OptimConfig, int],
) -> None:
    settings, total = case
    rates = [learning_rate(step, settings, total) for step in range(1, total + 1)]
    for step, rate in enumerate(rates, start=1):
        assert 0.0 <= rate <= PEAK
        if step >= settings.warmup_steps:
            assert rate >= PEAK * settings.min_lr_ratio * (1 - 1e-12)
        if step < total:
            assert (rates[step] > rate) if step < settings.warmup_steps else (rates[step] <= rate)
    if settings.schedule == "constant":
        longest_decay = total
    elif settings.decay_steps is not None:
        longest_decay = settings.decay_steps
    elif settings.schedule == "cosine":
        longest_decay = max(1, total - settings.warmup_steps)
    else:
        # The decay of wsd is what is left of its length behind the warm-up.
        longest_decay = max(1, min(max(1, round(WSD_DECAY_SHARE * total)), total - settings.warmup_steps))
    # Warm-up rises by peak / warmup; a cosine falls by at most pi / 2 of the straight line.
    largest = PEAK * max(1.0 / max(1, settings.warmup_steps), 1.6 / longest_decay)
    for before, after in pairwise(rates):
        assert abs(after - before) <= largest * (1 + 1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_peak_is_at_the_end_of_the_warmup_and_the_minimum_on_the_last_step(schedule: str) -> None:
    settings = optim(schedule=schedule, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(1, settings, 100) == pytest.approx(PEAK / 10)
    assert learning_rate(10, settings, 100) == pytest.approx(PEAK)
    assert learning_rate(100, settings, 100) == pytest.approx(PEAK if schedule == "constant" else 0.1 * PEAK)


def test_cosine_halfway_and_beyond_its_length() -> None:
    settings = optim(schedule="cosine", warmup_steps=10, decay_steps=40, min_lr_ratio=0.2)
    assert learning_rate(30, settings, 1000) == pytest.approx(PEAK * (0.2 + 0.8 * 0.5))
    assert learning_rate(50, settings, 1000) == pytest.approx(0.2 * PEAK)
    assert learning_rate(700, settings, 1000) == pytest.approx(0.2 * PEAK)


def test_wsd_is_flat_until_its_decay() -> None:
    settings = optim(schedule="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.0)
    assert {learning_rate(step, settings, 100) for step in range(10, 81)} == {PEAK}
    assert learning_rate(90, settings, 100) == pytest.approx(PEAK / 2)
    assert learning_rate(100, settings, 100) == 0.0
    # By default the decay is a fifth of all steps.
    settings = optim(schedule="wsd", warmup_steps=0)
    assert learning_rate(80, settings, 100) == PEAK
    assert learning_rate(81, settings, 100) < PEAK
