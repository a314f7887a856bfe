import errno
import os
from pathlib import Path

import pytest

from mlra_scale.config import Config, ConfigError, preset
from mlra_scale.training.run_directory import RunDirectory, held


def test_the_stored_configuration_loads_back_equal(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create(preset("debug"))
    assert Config.from_yaml(run.config.read_text()) == preset("debug") and run.holds_a_run()


def test_where_a_branch_began_is_noted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create(preset("debug"), run.checkpoints / "step-00000010")
    assert run.source() is None, "its own checkpoint"
    run.create(preset("debug"), tmp_path / "other run" / "checkpoints" / "step-00000010")
    assert run.source() == tmp_path / "other run" / "checkpoints" / "step-00000010"


def test_a_run_that_begins_anew_began_nowhere_else(tmp_path: Path) -> None:
    """Left over from a run that was removed by hand: without a checkpoint, --resume auto would begin there."""
    run = RunDirectory(tmp_path / "run")
    run.create(preset("debug"), tmp_path / "other run" / "checkpoints" / "step-00000010")
    run.create(preset("debug"))
    assert run.source() is None


def test_a_directory_on_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mkdir", "write"):
        with monkeypatch.context() as system:
            system.setattr(os, name, refuse)
            with pytest.raises(ConfigError, match="No space left on device"), held(RunDirectory(tmp_path / name)):
                pytest.fail("held")


def test_a_held_directory_keeps_others_out_until_it_is_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new" / "run")
    with held(run):
        assert not run.holds_a_run()
        with pytest.raises(ConfigError, match=f"another run is at work here .process {os.getpid()} on"), held(run):
            pass
    with held(run):
        pass


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with held(RunDirectory(tmp_path)):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out
