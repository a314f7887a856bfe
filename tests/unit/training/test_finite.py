import math
from types import SimpleNamespace
from typing import Any

import pytest

from mlra_scale.config import load_config
from mlra_scale.training.finite import FiniteCheck, TrainingStopped


def check_of(precision: str, is_guarded: bool = False, **fields: int) -> FiniteCheck:
    overrides = [f"train.precision={precision}", *(f"train.{key}={value}" for key, value in fields.items())]
    return FiniteCheck(load_config("debug", overrides=overrides).train, is_guarded)


def result(loss: float = 2.0, gradient_norm: float = 1.0, overflow: bool = False) -> Any:
    return SimpleNamespace(loss=loss, gradient_norm=gradient_norm, overflow=overflow, loss_scale=1024.0)


def proposal(loss: float, gradient_norm: float) -> Any:
    return SimpleNamespace(loss=loss, gradient_norm=gradient_norm)


BAD = [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("loss", "gradient_norm"), BAD)
def test_a_value_that_is_no_number_is_not_applied_and_stops(precision: str, loss: float, gradient_norm: float) -> None:
    check = check_of(precision)
    assert not check.approve(proposal(loss, gradient_norm))
    with pytest.raises(TrainingStopped) as stop:
        check.check(12, result(loss, gradient_norm), consumed_samples=96)
    for part in ("step 12", f"loss {loss}", f"gradient norm {gradient_norm}", "96", "optim.lr", "--resume auto"):
        assert part in str(stop.value)
    assert stop.value.values["step"] == 12 and stop.value.values["consumed_samples"] == 96


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_numbers_pass(precision: str) -> None:
    check = check_of(precision)
    assert check.approve(proposal(2.0, 1e6))
    check.check(1, result(), 0)


def test_fp16_ends_only_after_a_row_of_overflows() -> None:
    check = check_of("fp16", max_consecutive_overflows=3)
    overflow = result(math.inf, math.nan, overflow=True)
    for step, outcome in enumerate([overflow, overflow, result(), overflow, overflow], start=1):
        check.check(step, outcome, 0)
    with pytest.raises(TrainingStopped, match="3 loss-scale overflows in a row") as stop:
        check.check(6, overflow, 0)
    assert "train.max_consecutive_overflows" in str(stop.value)


def test_a_row_of_overflows_goes_on_after_a_resume() -> None:
    check, resumed = (check_of("fp16", max_consecutive_overflows=3) for _ in range(2))
    overflow = result(math.inf, math.nan, overflow=True)
    for step in (1, 2):
        check.check(step, overflow, 0)
    resumed.load(check.state())
    with pytest.raises(TrainingStopped, match="3 loss-scale overflows in a row"):
        resumed.check(3, overflow, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("loss", "gradient_norm"), BAD)
def test_under_a_guard_it_is_not_applied_and_the_run_goes_on(precision: str, loss: float, gradient_norm: float) -> None:
    check = check_of(precision, is_guarded=True)
    assert not check.approve(proposal(loss, gradient_norm))
    check.check(12, result(loss, gradient_norm), consumed_samples=96)


def test_under_a_guard_too_many_overflows_are_for_it_to_judge() -> None:
    check = check_of("fp16", is_guarded=True, max_consecutive_overflows=3)
    for step in (1, 2, 3):
        assert check.too_many_overflows is None
        check.check(step, result(math.inf, math.nan, overflow=True), 0)
    assert check.too_many_overflows == "3 loss-scale overflows in a row"
    check.check(4, result(), 0)
    assert check.too_many_overflows is None
