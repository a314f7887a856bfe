"""Watchers are called in their order; all see every proposal, and each has its own state and time."""

from types import SimpleNamespace
from typing import Any

import pytest

from mlra_scale.stability.watcher import Step, Watcher, Watchers, is_due

PROPOSAL: Any = SimpleNamespace(loss=1.0, gradient_norm=1.0)
RESULT: Any = SimpleNamespace(loss=1.0)


class Recorder(Watcher):
    """Notes its calls in a common list; measures something, refuses updates, and has a state."""

    def __init__(self, name: str, calls: list[str], values: dict[str, Any], approves: bool = True) -> None:
        self.name, self.is_timed = name, True  # type: ignore[misc]
        self._calls, self._values, self._approves = calls, values, approves
        self.loaded: Any = None

    def before_step(self, step: Step) -> None:
        self._calls.append(f"{self.name} before {step.number}")

    def before_update(self, proposal: Any) -> bool:
        self._calls.append(f"{self.name} proposal")
        return self._approves

    def after_step(self, step: Step, result: Any) -> dict[str, Any]:
        self._calls.append(f"{self.name} after {step.number}")
        return self._values

    def state(self) -> Any:
        return {"of": self.name}

    def load_state(self, state: Any) -> None:
        self.loaded = state["of"]


def test_watchers_are_called_in_order_and_all_see_what_one_refuses() -> None:
    calls: list[str] = []
    watchers = Watchers(Recorder("a", calls, {"x": 1}, approves=False), Watcher(), Recorder("b", calls, {}))
    step = Step(3, True, 0)
    watchers.before_step(step)
    assert not watchers.before_update(PROPOSAL)
    assert watchers.after_step(step, RESULT) == {"x": 1}
    assert calls == ["a before 3", "b before 3", "a proposal", "b proposal", "a after 3", "b after 3"]
    assert list(step.measuring_seconds) == ["a"], "b has measured nothing"
    assert Watchers(Watcher()).before_update(PROPOSAL)


def test_time_is_that_of_one_step_and_of_the_noise_scale_under_its_own_name() -> None:
    watchers = Watchers(Recorder("gradients", [], {"gradients": 1, "noise": 2}))
    for number in (1, 2):
        step = Step(number, True, 0)
        watchers.before_step(step)
        watchers.after_step(step, RESULT)
        assert list(step.measuring_seconds) == ["noise"] and 0.0 < step.measuring_seconds["noise"] < 1.0


def test_states_are_stored_by_name_and_an_older_checkpoint_lacks_some() -> None:
    first, second = Recorder("a", [], {}), Recorder("b", [], {})
    watchers = Watchers(first, Watcher(), second)
    assert watchers.state() == {"a": {"of": "a"}, "b": {"of": "b"}}
    watchers.load_state({"b": {"of": "b"}, "of a later version": 1})
    assert (first.loaded, second.loaded) == (None, "b")
    with pytest.raises(ValueError, match=r"^`a` cannot be read \(KeyError: 'of'\)"):
        watchers.load_state({"a": {}})


@pytest.mark.parametrize(("every", "due"), [(0, [6]), (2, [2, 4, 6]), (4, [4, 6]), (1, [1, 2, 3, 4, 5, 6])])
def test_what_is_on_is_due_at_its_steps_and_at_the_last(every: int, due: list[int]) -> None:
    assert [step for step in range(1, 7) if is_due(step, every, 6)] == due
