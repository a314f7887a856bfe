"""The flags, exit codes and dry runs of `mlra_scale.train`, and which warnings its console leaves out."""

import warnings

import pytest

from mlra_scale import train
from mlra_scale.config import preset_names
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.log.console import silence_libraries


def test_these_flags_and_no_more() -> None:
    flags = {flag for action in train.build_parser()._actions for flag in action.option_strings}
    assert flags == {"-h", "--help", "--preset", "--config", "--ds-config", "--run-dir", "--resume", "--dry-run"}


def test_exit_codes_are_what_launchers_know() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "DONE": 0, "FAILED": 1, "BAD_INPUT": 2, "NON_FINITE": 3, "CHECKPOINT_FAILED": 4, "PREEMPTED": 5, "BAD_NODE": 6,
        "UNSTABLE": 7, "EXPORT_FAILED": 8, "INTERRUPTED": 130,
    }  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_dry_run_of_every_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--preset", name, "--dry-run"]) == ExitCode.DONE
    assert name in capsys.readouterr().out


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["model.num_layers=6", "--preset", "debug", "train.steps=7", "--dry-run"]) == ExitCode.DONE
    assert "6 layers" in capsys.readouterr().out


def test_dry_run_takes_the_launchers_number_of_ranks_and_only_rank_0_prints_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train.main(["--preset", "debug", "--dry-run"]) == ExitCode.DONE
    assert "4 rank(s)" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "3")
    assert train.main(["--preset", "debug", "--dry-run"]) == ExitCode.DONE
    assert capsys.readouterr().out == ""


def test_another_rank_reports_only_what_rank_0_did_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends this rank while it waits; where it does not, the mistake is this node's alone."""
    waited: list[float] = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--preset", "debog", "--dry-run"]) == ExitCode.BAD_INPUT
    assert "(rank 1)" in capsys.readouterr().err and waited == [train._RANK_0_SECONDS]


def test_only_known_warnings_are_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_libraries("cpu")
        del shown[:]
        known = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another."
        warnings.warn_explicit(known, FutureWarning, "torch/distributed/c10d_logger.py", 83, "torch.distributed")
        warnings.warn_explicit("loss is NaN", UserWarning, "torch/optim/adamw.py", 1, "torch.optim.adamw")
    assert [str(warning.message) for warning in shown] == ["loss is NaN"]
