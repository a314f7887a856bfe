import math
from types import SimpleNamespace
from typing import Any

import pytest

from mlra_scale.config import load_config
from mlra_scale.stability.watcher import Step
from mlra_scale.training.exit_codes import TrainingStopped
from mlra_scale.training.watch.step_watchers import FiniteCheck


def check_of(precision: str, ends_run: bool = True, **fields: int) -> FiniteCheck:
    overrides = [f"train.precision={precision}", *(f"train.{key}={value}" for key, value in fields.items())]
    return FiniteCheck(load_config("debug", overrides=overrides).train, ends_run)


def result(loss: float = 2.0, gradient_norm: float = 1.0, overflow: bool = False) -> Any:
    return SimpleNamespace(loss=loss, gradient_norm=gradient_norm, overflow=overflow, loss_scale=1024.0)


def proposal(loss: float, gradient_norm: float) -> Any:
    return SimpleNamespace(is_finite=math.isfinite(loss) and math.isfinite(gradient_norm))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_value_that_is_not_finite_is_not_applied_and_stops_unless_a_guard_decides(precision: str) -> None:
    for loss, gradient_norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        check, guarded = check_of(precision), check_of(precision, ends_run=False)
        assert not check.before_update(proposal(loss, gradient_norm))
        assert not guarded.before_update(proposal(loss, gradient_norm))
        guarded.after_step(Step(12, True, 96), result(loss, gradient_norm))
        with pytest.raises(TrainingStopped) as stop:
            check.after_step(Step(12, True, 96), result(loss, gradient_norm))
        for part in ("step 12", f"loss {loss}", f"gradient norm {gradient_norm}", "96", "optim.lr", "--resume auto"):
            assert part in str(stop.value)
        assert stop.value.values["step"] == 12 and stop.value.values["consumed_samples"] == 96


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_numbers_pass(precision: str) -> None:
    check = check_of(precision)
    assert check.before_update(proposal(2.0, 1e6))
    check.after_step(Step(1, True, 0), result())


def test_fp16_ends_only_after_a_row_of_overflows_which_a_resume_does_not_break() -> None:
    check, resumed = (check_of("fp16", max_consecutive_overflows=3) for _ in range(2))
    overflow = result(math.inf, math.nan, overflow=True)
    for step, outcome in enumerate([overflow, overflow, result(), overflow, overflow], start=1):
        check.after_step(Step(step, True, 0), outcome)
    resumed.load_state(check.state())
    for each in (check, resumed):
        with pytest.raises(TrainingStopped, match="3 loss-scale overflows in a row") as stop:
            each.after_step(Step(6, True, 0), overflow)
        assert "train.max_consecutive_overflows" in str(stop.value)


def test_under_a_guard_too_many_overflows_are_for_it_to_judge() -> None:
    check = check_of("fp16", ends_run=False, max_consecutive_overflows=3)
    for step in (1, 2, 3):
        assert check.overflow_fault() is None
        check.after_step(Step(step, True, 0), result(math.inf, math.nan, overflow=True))
    assert check.overflow_fault() == "3 loss-scale overflows in a row"
    check.after_step(Step(4, True, 0), result())
    assert check.overflow_fault() is None
