"""The history of changes in a checkpoint: through resumes, rollbacks and old checkpoints."""

from typing import Any

import pytest

from mlra_scale.training.history import History
from mlra_scale.training.resume import Change

LR, BATCH = Change("optim.lr", 1e-3, 3e-4), Change("train.global_batch_size", 8, 16)


def test_changes_follow_each_other_and_survive_a_checkpoint() -> None:
    history = History().followed_by([LR], 10).followed_by([], 15).followed_by([BATCH], 20)
    again = History.of({"history": history.to_dict()}, 25)
    assert again == history and again.changes == ((10, LR), (20, BATCH)) and again.known_from == 0


def test_what_changes_before_the_first_step_is_no_change() -> None:
    assert History().followed_by([LR], 0) == History()


def test_a_run_that_goes_back_does_the_steps_with_the_present_settings() -> None:
    history = History().followed_by([LR], 10).followed_by([BATCH], 20).gone_back_to(15)
    assert history.changes == ((10, LR), (15, BATCH))


def test_an_old_checkpoint_does_not_know() -> None:
    history = History.of({"progress": {"step": 7}}, 7).followed_by([LR], 7)
    assert history.known_from == 7 and history.changes == ((7, LR),)


@pytest.mark.parametrize("stored", [[], {"changes": [{}]}, {"changes": 3}, {"changes": [], "known_from": "x"}])
def test_a_garbled_history_is_told(stored: Any) -> None:
    with pytest.raises(ValueError, match="not a history of changes"):
        History.of({"history": stored}, 3)
