"""What is a spike or a divergence, and what is not."""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.studies.predict.events import Event, Protocol, divergence_step, first_event
from tests.unit.study.synthetic import make_losses

PROTOCOL = Protocol()
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "studies" / "predict" / "README.md"


def event_of(losses: np.ndarray, is_stopped: bool = False) -> Event | None:
    return first_event(losses, is_stopped, PROTOCOL)


def losses_of(seed: int = 0, event: int | None = None) -> np.ndarray:
    return make_losses(np.random.default_rng(seed), event)


def test_the_numbers_are_those_of_the_document() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([0-9.]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: float(value) for name, value in rows} == {
        field.name: float(getattr(PROTOCOL, field.name)) for field in fields(Protocol)
    }


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_a_calm_run_has_no_event(seed: int) -> None:
    assert event_of(losses_of(seed)) is None


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 148))
def test_a_lasting_rise_is_a_spike_at_its_first_step(seed: int, step: int) -> None:
    assert event_of(losses_of(seed, step)) == Event("spike", step)


@settings(deadline=None)
@given(st.integers(40, 120), st.integers(1, 10))
def test_a_spike_may_come_back_after_three_steps_and_not_before(step: int, length: int) -> None:
    losses = losses_of()
    losses[step - 1 : step - 1 + length] += 3.0
    assert event_of(losses) == (Event("spike", step) if length >= 3 else None)


def test_a_rise_needs_half_a_nat_and_four_deviations() -> None:
    calm = 5.0 + 0.01 * np.tile([1.0, -1.0], 50)
    # Deviations are 0.01 there, so that nats decide, and here 0.4.
    wild = 5.0 + 0.4 * np.tile([1.0, -1.0], 50)
    for losses, rise, expected in ((calm, 0.45, False), (calm, 0.55, True), (wild, 1.1, False), (wild, 2.1, True)):
        raised = losses.copy()
        raised[60:70] = 5.0 + rise
        assert (event_of(raised) == Event("spike", 61)) == expected


def test_a_slow_rise_is_a_divergence_dated_back_to_its_beginning() -> None:
    steps = np.arange(1, 201)
    # The loss is 5 up to step 100, half a nat higher at step 120, and the mean of 32 is a nat higher at step 156.
    losses = 5.0 + 0.025 * np.maximum(0, steps - 100)
    event = event_of(losses)
    assert event is not None and event.kind == "divergence"
    assert event.step == 121
    assert divergence_step(losses[:155], PROTOCOL) is None and divergence_step(losses[:156], PROTOCOL) == 121


def test_a_fall_and_a_high_plateau_are_no_divergence() -> None:
    assert divergence_step(np.linspace(9.0, 3.0, 200), PROTOCOL) is None
    assert divergence_step(np.full(200, 9.0), PROTOCOL) is None
    assert divergence_step(np.full(20, 9.0), PROTOCOL) is None


def test_a_loss_that_is_no_number_is_an_event_at_its_step() -> None:
    losses = losses_of()
    assert event_of(losses[:80], is_stopped=True) == Event("non-finite", 81)
    # A rise just before it is where it began, be it of one step.
    losses[79] += 3.0
    assert event_of(losses[:80], is_stopped=True) == Event("spike", 80)
    assert event_of(losses[:80]) is None
    assert event_of(np.empty(0), is_stopped=True) == Event("non-finite", 1)
    assert event_of(np.empty(0)) is None


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 148), st.floats(-4.0, 100.0))
def test_the_height_of_the_loss_does_not_matter(seed: int, step: int, height: float) -> None:
    losses = losses_of(seed, step)
    assert event_of(losses + height) == event_of(losses)


@pytest.mark.parametrize("step", [2, 10, 16])
def test_before_there_is_a_trailing_window_the_first_loss_is_the_measure(step: int) -> None:
    losses = np.full(100, 6.0)
    losses[step - 1 :] = 6.6
    assert event_of(losses) == Event("spike", step)
    losses[step - 1 :] = 6.4
    assert event_of(losses) is None
