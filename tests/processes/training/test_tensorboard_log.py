"""The log in TensorBoard, read back by its own reader, after a resume and a rollback; and never the end of a run."""

import builtins
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlra_scale.config import ConfigError, Named, load_config
from mlra_scale.stability.guard import Action
from mlra_scale.training.log import tensorboard_log
from mlra_scale.training.log.tensorboard_log import TensorBoardLog, check_tensorboard, open_tensorboard
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.request import LaunchRequest, resolve_run
from tests.processes.training.test_report import VALUES, report_of

ON = load_config("debug", overrides=["tensorboard.enabled=true"])


def scalars(run: RunDirectory) -> dict[str, dict[int, float]]:
    """Each tag's values by step, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run.tensorboard))
    read.Reload()
    return {tag: {item.step: item.value for item in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    pytest.importorskip("tensorboard", reason="needs tensorboard (the extra tensorboard)")
    return RunDirectory(tmp_path / "run")


def test_numbers_are_written_in_groups_and_nothing_else(run: RunDirectory) -> None:
    log = open_tensorboard(ON, run, 0)
    nested = {"kinds": {"all": {"gradient_norm": 3.0}}, "layers": [1.0, 2.0]}
    log.log(5, {"step": 5, "loss": 2.5, "bad": math.nan, "note": "text", "gradients": nested, "overflow": True})
    log.finish()
    log.log(6, {"loss": 1.0})  # closed: dropped
    assert scalars(run) == {
        "curves/loss": {5: 2.5},
        "curves/overflow": {5: 1.0},
        "gradients/kinds/all/gradient_norm": {5: 3.0},
    }


def test_steps_that_are_done_again_are_there_once(run: RunDirectory) -> None:
    """As after a kill at step 3, when the checkpoint is that of step 2."""
    for first, losses in ((0, {1: 9.0, 2: 8.0, 3: 7.0}), (3, {3: 6.5, 4: 6.0})):
        log = open_tensorboard(ON, run, first)
        for step, loss in losses.items():
            log.log(step, {"loss": loss})
        log.finish()
    assert scalars(run)["curves/loss"] == {1: 9.0, 2: 8.0, 3: 6.5, 4: 6.0}


def test_a_report_writes_its_record_and_what_a_rollback_undoes_is_dropped(run: RunDirectory, tmp_path: Path) -> None:
    with report_of(tmp_path, overrides=("tensorboard.enabled=true",)) as report:
        report.open()
        for step in (1, 2, 3):
            report.record(Progress(step, 8 * step, 512 * step), {**VALUES, "loss": 4.0 - step})
        action = Action("rollback", 3, "the loss rose", to_step=1, skipped=(8, 24))
        report.on_rollback(action, 1, Progress(1, 8, 512), {"until": None, "factor": 1.0})
        report.record(Progress(2, 40, 2048), {**VALUES, "loss": 0.5})
    found = scalars(run)
    assert found["curves/loss"] == {1: 3.0, 2: 0.5}
    assert (found["guard/rollback"], found["guard/to_step"]) == ({3: 1.0}, {3: 1.0})


def test_what_a_resumed_run_adds_to_its_last_step_alone_is_written_again(run: RunDirectory, tmp_path: Path) -> None:
    """As after a stop that left out the validation of step 2."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with report_of(tmp_path, overrides=("tensorboard.enabled=true",)) as report:
        report.open()
        report.record(Progress(2, 16, 1024), VALUES)
        report.amend(Progress(2, 16, 1024), {"validation_loss": 2.5, "validation_perplexity": 12.2})
    read = EventAccumulator(str(run.tensorboard))
    read.Reload()
    assert [item.step for item in read.Scalars("curves/loss")] == [2]
    assert [(item.step, item.value) for item in read.Scalars("curves/validation_loss")] == [(2, 2.5)]


def test_it_is_off_by_default_and_leaves_nothing(tmp_path: Path) -> None:
    with report_of(tmp_path) as report:
        report.open()
        report.record(Progress(1, 8, 512), VALUES)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_the_package_the_start_is_refused_and_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard_log, "find_spec", lambda name: None)
    (problem,) = check_tensorboard(ON)
    assert "pip install 'mlra-scale[tensorboard]'" in str(problem) and problem.field == "tensorboard.enabled"
    assert check_tensorboard(load_config("debug")) == []
    with pytest.raises(ConfigError) as caught:
        resolve_run(LaunchRequest(ON, Named(frozenset()), RunDirectory(tmp_path / "run"), "none", 1))
    assert problem in caught.value.problems, "with all else that is wrong"


def test_what_goes_wrong_later_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(tensorboard_log._logger, "warning", lambda text, *values: warnings.append(text % values))

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    for log in (
        TensorBoardLog(SimpleNamespace(add_scalar=fail)),
        TensorBoardLog(SimpleNamespace(close=fail)),
    ):
        log.log(1, {} if "close" in vars(log._writer) else {"loss": 1.0})
        log.finish()
        log.log(2, {"loss": 1.0})
    assert warnings == ["tensorboard: stopped logging (no space left)"] * 2

    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError("broken")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    open_tensorboard(ON, RunDirectory(tmp_path), 0).log(1, {"loss": 1.0})
    assert warnings[2:] == ["tensorboard: not used in this run (broken)"]
