"""Decisions of the guard: skip, lower the rate, roll back, give up; they are the same after a checkpoint."""

import json
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.config import GuardConfig
from mlra_scale.stability.guard import Action, Guard
from mlra_scale.stability.watcher import Step

BATCH = 8
SETTINGS: dict[str, Any] = {
    "enabled": True, "window": 32, "min_window": 8, "sigmas": 6.0, "calm_steps": 5, "max_skips": 2, "rate_factor": 0.5,
    "rate_steps": 10, "max_lowerings": 1, "divergence": None, "skip_before": 2, "max_rollbacks": 2,
}  # fmt: skip


def judge(guard: Guard, number: int, sample: int, loss: float, norm: float) -> tuple[bool, list[Action]]:
    """Lets the guard see a step; returns whether its update was approved, and the decisions after it."""
    outcome: Any = SimpleNamespace(loss=loss, gradient_norm=norm, overflow=False)
    is_approved = guard.before_update(outcome)
    guard.after_step(Step(number, True, sample), outcome)
    return is_approved, guard.actions


def overflow(guard: Guard, number: int, sample: int) -> list[Action]:
    """Lets the guard see a step whose gradients overflowed; returns its decisions."""
    guard.after_step(Step(number, True, sample), SimpleNamespace(overflow=True))  # type: ignore[arg-type]
    return guard.actions


class Run:
    """Plays a run: one loss per step, checkpoints now and then, and goes back where the guard says so."""

    def __init__(self, every: int = 10, overflow_fault: str | None = None, **changed: Any) -> None:
        self.config = GuardConfig(**{**SETTINGS, **changed})
        self.guard, self.every = Guard(self.config, BATCH, lambda: overflow_fault), every
        self.step, self.sample = 0, 0
        self.applied: list[int] = []
        self.first_samples: list[int] = []
        self.actions: list[Action] = []
        self.checkpoints: dict[int, tuple[int, str]] = {}
        self.save()

    def save(self) -> None:
        self.guard.note_checkpoint(self.step)
        self.checkpoints[self.step] = (self.sample, json.dumps(self.guard.state()))

    def train(self, loss: float, norm: float = 1.0) -> list[Action]:
        step, first_sample = self.step + 1, self.guard.first_sample(self.sample)
        self.first_samples.append(first_sample)
        is_approved, actions = judge(self.guard, step, first_sample, loss, norm)
        if is_approved:
            self.applied.append(step)
        self.actions += actions
        self.step, self.sample = step, first_sample + BATCH
        if actions and actions[-1].kind == "rollback":
            assert actions[-1].to_step is not None
            self.roll_back(actions[-1])
        elif self.step % self.every == 0:
            self.save()
        return actions

    def roll_back(self, action: Action) -> None:
        assert action.to_step is not None
        self.step = action.to_step
        self.sample, state = self.checkpoints[action.to_step]
        self.guard.load_state(json.loads(state))
        self.guard.note_rollback(action)

    def calm(self, steps: int, seed: int = 0) -> None:
        for value in np.random.default_rng(seed).normal(0.0, 0.01, steps):
            assert self.train(3.0 + value, 1.0 + value) == []

    @property
    def kinds(self) -> list[str]:
        return [action.kind for action in self.actions]


def test_a_bad_update_is_skipped() -> None:
    run = Run(max_skips=5)
    run.calm(20)
    (action,) = run.train(9.0)
    assert action.kind == "skip" and action.reason.startswith("loss 9 above 3.")
    (action,) = run.train(3.0, 50.0)
    assert action.kind == "skip" and action.reason.startswith("gradient norm 50 above 1.")
    (action,) = run.train(math.nan)
    assert action.kind == "skip" and action.reason == "loss nan"
    assert run.train(3.0) == []
    assert run.applied == [*range(1, 21), 24]


def test_nothing_is_judged_before_there_is_a_usual_and_a_low_value_is_never_bad() -> None:
    run = Run()
    for value in (3.0, 90.0, 3.0, 3.0, 700.0):
        assert run.train(value) == []
    assert run.train(math.inf) != [], "but for what is no number"
    run = Run()
    run.calm(20)
    assert run.train(0.1, 0.001) == []


def test_after_skips_the_rate_is_lowered_for_a_while() -> None:
    run = Run()
    run.calm(20)
    run.train(9.0)
    run.train(9.0)
    actions = run.train(9.0)
    assert [action.kind for action in actions] == ["skip", "lower_rate"]
    assert "3 bad updates since step 21" in actions[1].reason
    factors = [run.guard.rate_factor(step) for step in (23, 24, 29, 34, 99)]
    assert factors[1:] == [0.5, 0.75, 1.0, 1.0]


def test_then_the_run_rolls_back_and_skips_the_data() -> None:
    run = Run()
    run.calm(25)  # checkpoints at 0, 10, 20; trouble from step 26 on
    while "rollback" not in run.kinds:
        run.train(9.0)
    assert run.kinds == ["skip"] * 3 + ["lower_rate"] + ["skip"] * 3 + ["rollback"]
    action = run.actions[-1]
    # Trouble began at sample 25 * 8; two steps before it go too. It was given up at step 31.
    assert (action.step, action.to_step, action.skipped) == (31, 20, (23 * BATCH, 31 * BATCH))
    assert run.step == 20 and len(run.guard.rollbacks) == 1 and run.guard.rate_factor(21) == 1.0
    run.first_samples.clear()
    run.calm(5)
    assert run.first_samples == [160, 168, 176, 31 * BATCH, 32 * BATCH], "three steps as before, then past the window"


def test_no_rollback_leads_to_a_checkpoint_of_an_episode() -> None:
    run = Run(every=1)
    run.calm(20)
    run.train(9.0)
    assert run.guard.good_step == 20
    run.calm(5)
    assert run.guard.good_step == 20, "the episode is not over yet"
    run.calm(1)
    assert run.guard.good_step == 27


def test_an_episode_ends_and_a_new_one_begins_with_all_its_skips() -> None:
    run = Run()
    run.calm(20)
    for _ in range(4):
        run.train(9.0)
        run.train(9.0)
        run.calm(7)
    assert set(run.kinds) == {"skip"}


def test_it_gives_up() -> None:
    run = Run()
    run.calm(25)
    while "give_up" not in run.kinds:
        run.train(9.0)
        assert len(run.actions) < 200
    assert run.kinds.count("rollback") == 2
    assert "the run went back 2 time(s) already" in run.actions[-1].reason


def test_a_run_without_a_checkpoint_gives_up() -> None:
    guard = Guard(GuardConfig(**SETTINGS | {"max_skips": 0, "max_lowerings": 0}), BATCH)
    guard.load_state(None)  # of a checkpoint from before there was a guard
    assert [action.kind for action in judge(guard, 1, 0, math.nan, 1.0)[1]] == ["skip", "give_up"]


def test_a_loss_that_diverges_slowly_leads_to_a_rollback() -> None:
    run = Run(divergence=0.5, divergence_steps=8)
    run.calm(40)
    for step in range(100):
        loss = 3.0 + 0.02 * step
        if run.train(loss, 1.0):
            break
    assert run.kinds == ["rollback"] and "0.5 above the lowest such mean" in run.actions[0].reason
    assert run.actions[0].step > 60 and run.actions[0].to_step == 50, "not 60, where the loss was on its way up"


def test_values_that_rise_for_good_become_usual() -> None:
    run = Run(max_skips=30)
    run.calm(40)
    for number, value in enumerate(np.random.default_rng(3).normal(2.0, 0.01, 40)):
        run.train(3.0, value)
        assert number < 25 or run.step in run.applied, "the norm has doubled, and that is all"


def test_only_a_long_row_of_overflows_leads_to_a_rollback() -> None:
    run = Run(every=5)
    run.calm(20)
    guard = run.guard
    for step in range(21, 30):
        assert overflow(guard, step, (step - 1) * BATCH) == []
    guard.note_checkpoint(25)
    assert guard.good_step == 20, "nobody knows yet whether that is a good one"
    stored, guard = json.dumps(guard.state()), Guard(run.config, BATCH, lambda: "10 in a row")
    guard.load_state(json.loads(stored))
    (action,) = overflow(guard, 30, 29 * BATCH)
    assert (action.kind, action.to_step, action.reason) == ("rollback", 20, "10 in a row")
    assert action.skipped == (18 * BATCH, 30 * BATCH), "from two steps before the first of them"
    run.calm(5)
    assert run.guard.good_step == 25, "a row that has ended is forgotten"


def test_overflows_end_a_run_that_cannot_go_back() -> None:
    run = Run(max_rollbacks=0, overflow_fault="10 in a row")
    run.calm(20)
    assert [action.kind for action in overflow(run.guard, 21, 160)] == ["give_up"]


def at_another_level(run: Run, steps: int) -> list[str]:
    """What is done about a loss and a norm that are higher for good, as another blend and a smaller batch make them."""
    before = len(run.actions)
    for loss, norm in np.random.default_rng(5).normal((4.5, 2.0), 0.01, (steps, 2)):
        run.train(loss, norm)
    return run.kinds[before:]


def test_what_was_changed_on_purpose_is_no_instability() -> None:
    changed, unaware = (Run(divergence=1.0, divergence_steps=8) for _ in range(2))
    for run in (changed, unaware):
        run.calm(40)
    changed.guard.reset_statistics(40)
    assert at_another_level(changed, 60) == [] and changed.guard.good_step == 100
    assert "rollback" in at_another_level(unaware, 12)


@pytest.mark.parametrize("is_requeued", [False, True])
def test_a_checkpoint_from_before_a_change_knows_nothing_of_what_is_usual_after_it(is_requeued: bool) -> None:
    run = Run(every=40, max_skips=0, max_lowerings=0)
    run.calm(40)
    run.guard.reset_statistics(40)
    assert at_another_level(run, 20) == []
    if is_requeued:
        stored, run.guard = json.dumps(run.guard.state()), Guard(run.config, BATCH)
        run.guard.load_state(json.loads(stored))
    assert [action.kind for action in run.train(90.0)] == ["skip", "rollback"] and run.step == 40
    assert at_another_level(run, 20) == []


def test_switched_off_and_on_again_it_begins_anew() -> None:
    run = Run()
    run.calm(40)
    run.guard.reset_statistics(40)
    assert run.guard.good_step == 40
    off = Guard(GuardConfig(), BATCH)
    off.load_state(json.loads(json.dumps(run.guard.state())))
    off.reset_statistics(60)
    assert off.good_step is None, "no checkpoint is kept for a guard that is off"


def test_a_loss_that_has_risen_and_stays_is_good_in_the_end() -> None:
    run = Run(divergence=1.0, divergence_steps=8, sigmas=1e9)
    run.calm(20)
    for _ in range(8 * 32):
        run.train(3.5)
    assert run.guard.good_step == 20, "it may still be on its way up"
    for _ in range(20):
        run.train(3.5)
    assert run.kinds == [] and run.guard.good_step in (290, 280)


def test_disabled_it_does_nothing() -> None:
    guard = Guard(GuardConfig(), BATCH, lambda: "50 in a row")
    assert judge(guard, 1, 0, math.nan, math.inf) == (True, [])
    guard.note_checkpoint(5)
    assert overflow(guard, 6, 40) == []
    assert guard.good_step is None and guard.first_sample(7) == 7 and guard.rate_factor(3) == 1.0


def rolled_back(number: int) -> Run:
    """A run that has rolled back so often."""
    run = Run(max_rollbacks=3)
    run.calm(25)
    while run.kinds.count("rollback") < number:
        run.train(9.0)
    return run


def restarted(run: Run, step: int) -> Guard:
    """The guard of a start from a checkpoint, which was saved before the rollbacks that guard.json holds."""
    again = Guard(run.config, BATCH)
    again.load_state(json.loads(run.checkpoints[step][1]))
    again.adopt_rollbacks(json.loads(json.dumps([*run.guard.rollbacks])), step)
    return again


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_return_lowers_the_rate_further_and_a_restart_alike(number: int) -> None:
    """Also killed after guard.json was written, before the next checkpoint."""
    run = rolled_back(number)
    assert [action.to_step for action in run.actions if action.kind == "rollback"] == [20] * number
    assert run.guard.rate_factor(21) == 0.5 ** (number - 1)
    again = restarted(run, 20)
    assert again.state() == run.guard.state()
    assert all(0.0 < again.rate_factor(step) <= 1.0 for step in range(1, 200))
    again.adopt_rollbacks([], 20)
    assert len(again.rollbacks) == number, "an older record takes nothing away"


def test_from_an_earlier_checkpoint_only_the_data_stay_skipped() -> None:
    """The one that the run went back to was found to be damaged, or somebody names another one."""
    again = restarted(rolled_back(2), 10)
    assert again.good_step == 10 and len(again.rollbacks) == 2
    assert {again.rate_factor(step) for step in range(1, 100)} == {1.0}
    assert again.first_sample(24 * BATCH) > 24 * BATCH
    again.begin_at(7)
    assert again.good_step == 7


def test_the_checkpoint_that_a_run_began_from_has_no_episode_after_a_rollback() -> None:
    """Though the checkpoint was saved in the middle of it."""
    run = Run(every=1)
    run.calm(20)
    run.train(9.0)
    run.guard.begin_at(21)
    while "rollback" not in run.kinds:
        run.train(9.0)
    assert run.step == 21
    before = len(run.actions)
    run.train(9.0)
    assert run.kinds[before:] == ["skip"]
    assert run.guard.state()["episode"]["first_step"] == 22


@pytest.mark.parametrize(
    ("sample", "expected"), [(0, 0), (8, 8), (16, 40), (20, 40), (32, 40), (33, 40), (40, 40), (90, 130), (200, 200)]
)
def test_where_the_next_batch_is_read(sample: int, expected: int) -> None:
    guard = Guard(GuardConfig(**SETTINGS), BATCH)
    windows = [(96, 130), (90, 99), (20, 40)]
    guard.adopt_rollbacks([{"to_step": 0, "skipped_from": start, "skipped_to": stop} for start, stop in windows], 0)
    assert guard.first_sample(sample) == expected


losses = st.lists(st.sampled_from([3.0, 3.01, 2.99, 9.0, math.nan, 3.5]), min_size=20, max_size=80)


def decisions(values: Iterable[float], cut: int | None) -> tuple[list[Action], list[int]]:
    run = Run(divergence=1.5, divergence_steps=6)
    for number, value in enumerate(values):
        if number == cut:
            # A requeue: the run continues from a checkpoint of this very step.
            stored = json.loads(json.dumps(run.guard.state()))
            run.guard = Guard(run.config, BATCH)
            run.guard.load_state(stored)
        if run.kinds[-1:] == ["give_up"]:
            break
        run.train(value)
    return run.actions, run.first_samples


@settings(max_examples=150, deadline=None)
@given(losses, st.integers(0, 79))
def test_decisions_do_not_depend_on_a_resume(values: list[float], cut: int) -> None:
    assert decisions(values, cut) == decisions(values, None)


class Checked(Run):
    """A run that is checked for corruption at every fifth step."""

    def __init__(self, **changed: Any) -> None:
        super().__init__(replay_every=5, **changed)
        self.guard.begin_at(0)
        self.save()
        self.wrong: set[int] = set()

    def train(self, loss: float, norm: float = 1.0) -> list[Action]:
        actions = super().train(loss, norm)
        if self.step % 5:
            return actions
        if self.step in self.wrong:
            self.wrong.discard(self.step)
            self.guard.go_back(self.step, "rank 1 on n1 is wrong", {1: "n1"})
            self.actions += self.guard.actions
            self.roll_back(self.guard.actions[-1])
        else:
            self.guard.note_clean_check(self.step)
        return actions


def test_corruption_leads_back_to_a_checkpoint_that_a_later_check_has_confirmed_and_skips_no_data() -> None:
    run = Checked(every=7)
    run.wrong = {15}
    run.calm(15)
    assert run.step == 7, "step 14 was saved after the last clean check, that of step 10"
    assert run.guard.good_step == 7
    before = len(run.first_samples)
    run.calm(8)
    assert run.first_samples[before:] == [(7 + i) * BATCH for i in range(8)], "its data are read again"
    assert run.guard.rate_factor(9) == 1.0
    run.wrong = {25}
    run.calm(10)
    assert [(action.kind, action.to_step, action.nodes) for action in run.actions] == [
        ("rollback", 7, {1: "n1"}),
        ("rollback", 14, {1: "n1"}),
    ]


def test_corruption_uses_up_no_rollback_of_the_data_and_lowers_no_rate() -> None:
    run = Checked(max_rollbacks=1, max_skips=0, max_lowerings=0, every=100)
    for step in (5, 10, 15):
        run.wrong = {step}
        run.calm(step)
        assert run.step == 0 and run.guard.rate_factor(1) == 1.0
    run.calm(4)
    assert run.train(math.nan)[-1].skipped != (0, 0), "the one rollback that is allowed"
    assert not any(action.ends_run for action in run.actions), "it got further each time"


def test_a_step_that_stays_wrong_ends_the_run_at_the_good_checkpoint() -> None:
    run = Checked(max_rollbacks=2, every=100)
    for _ in range(3):
        run.wrong = {10}
        run.calm(10)
    assert [(action.to_step, action.ends_run) for action in run.actions] == [(0, False), (0, False), (0, True)]


def test_the_unconfirmed_checkpoint_outlives_a_resume_and_not_one_that_is_saved_in_trouble() -> None:
    run = Checked(every=4)
    run.calm(4)
    resumed = Guard(run.config, BATCH)
    resumed.load_state(json.loads(run.checkpoints[4][1]))
    assert resumed.good_step == 0
    resumed.note_clean_check(5)
    assert resumed.good_step == 4
    run.guard._episode = object()  # type: ignore[assignment]
    run.guard.note_checkpoint(8)
    run.guard.note_clean_check(10)
    assert run.guard.good_step == 0, "its predecessor may have been removed when it was saved"


def test_a_checkpoint_that_waits_for_its_check_is_forgotten_where_the_checks_are_switched_off() -> None:
    """Switched on again, a check would confirm one that retention has removed meanwhile."""
    run = Checked(every=4)
    run.calm(4)
    without = Guard(run.config.model_copy(update={"replay_every": 0, "checksum_every": 0}), BATCH)
    without.load_state(json.loads(run.checkpoints[4][1]))
    without.note_checkpoint(50)
    resumed = Guard(run.config, BATCH)
    resumed.load_state(json.loads(json.dumps(without.state())))
    resumed.note_clean_check(55)
    assert resumed.good_step == 50
