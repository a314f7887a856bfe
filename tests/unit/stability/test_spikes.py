"""Spike scores and divergence, against the definitions written out with numpy."""

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.stability.spikes import OLMO2, OLMO_CORE, Divergence, SpikeRule, SpikeScore, SpikeScores
from mlra_scale.stability.watcher import Step

values = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf, 1.0]), max_size=60)


def written_out(rule: SpikeRule, curve: list[float]) -> list[bool]:
    """The definition, without anything streaming."""
    flags = []
    for number, value in enumerate(curve):
        before = [other for other in curve[:number] if math.isfinite(other)][-rule.window :]
        if not math.isfinite(value):
            flags.append(True)
        elif len(before) < rule.min_window:
            flags.append(False)
        else:
            away = value - np.mean(before)
            away = abs(away) if rule.is_downward_too else away
            flags.append(bool(away > 0 and away >= rule.sigmas * np.std(before)))
    return flags


@settings(max_examples=200, deadline=None)
@given(values, st.booleans(), st.sampled_from([None, 5, 20]), st.integers(1, 8), st.integers(0, 60))
def test_a_score_is_its_definition_and_survives_a_checkpoint(
    curve: list[float], is_downward_too: bool, horizon: int | None, window: int, cut: int
) -> None:
    rule = SpikeRule(window, 1 + window // 2, 2.0, is_downward_too, horizon)
    score, flags = SpikeScore(rule), []
    for number, value in enumerate(curve):
        if number == cut:
            stored = json.loads(json.dumps(score.state()))
            score = SpikeScore(rule)
            score.load_state(stored)
        flags.append(score.update(value))
    assert flags == written_out(rule, curve)
    counted = flags if horizon is None else flags[-horizon:]
    assert score.score == (sum(counted) / len(counted) if counted else 0.0)


def update(scores: SpikeScores, loss: float, norm: float, is_overflow: bool = False) -> dict[str, float]:
    """Lets the scores see a logged step; returns what is recorded."""
    result: Any = SimpleNamespace(loss=loss, gradient_norm=norm, overflow=is_overflow)
    recorded: dict[str, float] = scores.after_step(Step(1, True, 0), result)["spike_scores"]
    return recorded


def test_the_two_scores_are_those_of_their_sources() -> None:
    assert (OLMO2.window, OLMO2.sigmas, OLMO2.is_downward_too, OLMO2.horizon) == (1000, 7.0, True, None)
    core = (OLMO_CORE.window, OLMO_CORE.sigmas, OLMO_CORE.is_downward_too, OLMO_CORE.horizon)
    assert core == (128, 6.0, False, 10_000)
    scores, random = SpikeScores(), np.random.default_rng(0)
    for _ in range(200):
        found = update(scores, 3.0 + 0.01 * random.standard_normal(), 1.0 + 0.01 * random.standard_normal())
    assert set(found.values()) == {0.0}
    assert update(scores, math.inf, math.nan, is_overflow=True) == found, "an overflow is no spike"
    assert update(scores, 3.5, 0.5) == {  # the loss jumps up, the norm down
        "loss_olmo2": 1 / 201, "loss_olmo_core": 1 / 201, "gradient_olmo2": 1 / 201, "gradient_olmo_core": 0.0,
    }  # fmt: skip
    # An older checkpoint has some of the scores.
    scores = SpikeScores()
    update(scores, math.nan, 1.0)
    again = SpikeScores()
    again.load_state(json.loads(json.dumps({name: scores.state()[name] for name in ("loss_olmo2",)})))
    found = update(again, 3.0, 1.0)
    assert found["loss_olmo2"] == 0.5 and found["loss_olmo_core"] == 0.0


def test_a_constant_curve_has_no_spikes() -> None:
    score = SpikeScore(OLMO_CORE)
    assert not any(score.update(2.0) for _ in range(300))
    assert score.update(2.0 + 1e-9)


def time_to_divergence(losses: list[float], margin: float = 1.0, steps: int = 32) -> int | None:
    """The number, from 1, of the first loss at which a run had diverged."""
    watch = Divergence(margin, steps)
    return next((number for number, loss in enumerate(losses, start=1) if watch.update(loss)), None)


def test_divergence_is_a_mean_that_has_left() -> None:
    losses = [5.0 - 0.01 * step for step in range(200)] + [3.0 + 0.1 * step for step in range(60)]
    number = time_to_divergence(losses, margin=1.0, steps=16)
    assert number is not None
    means = np.convolve(losses, np.ones(16) / 16, mode="valid")
    lowest = np.minimum.accumulate(means)
    assert number == int(np.argmax(means > lowest + 1.0)) + 16
    assert time_to_divergence(losses[:200]) is None
    assert time_to_divergence([3.0] * 5 + [math.nan]) == 6
    one_spike = [3.0] * 100 + [9.0] + [3.0] * 100
    assert time_to_divergence(one_spike, margin=1.0, steps=16) is None, "a spike that comes back is no divergence"


def test_divergence_survives_a_checkpoint() -> None:
    losses = list(np.random.default_rng(1).normal(4.0, 0.3, 100)) + [8.0] * 40
    whole = [Divergence.update(watch, loss) for watch in [Divergence(1.0, 20)] for loss in losses]
    for cut in (0, 10, 19, 50, 110):
        first, second = Divergence(1.0, 20), Divergence(1.0, 20)
        flags = [first.update(loss) for loss in losses[:cut]]
        second.load_state(json.loads(json.dumps(first.state())))
        assert flags + [second.update(loss) for loss in losses[cut:]] == whole
    assert any(whole) and whole.index(True) == pytest.approx(107, abs=3)
