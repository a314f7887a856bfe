import errno
import os
import shutil
from pathlib import Path

import pytest

from mlra_scale.config import Config, ConfigError, load_config, preset
from mlra_scale.training.resume import Origin
from mlra_scale.training.run_directory import RunDirectory, check_run_directory, checkpoint_name, find_checkpoint, held


@pytest.fixture
def config() -> Config:
    return preset("debug")


@pytest.fixture
def run(tmp_path: Path, config: Config) -> RunDirectory:
    """A directory that holds a run with two checkpoints, the second one the latest."""
    run = RunDirectory(tmp_path / "run")
    run.create(config)
    for step in (10, 20):
        folder = run.checkpoints / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config.to_yaml())
        Origin(step, 1, 1, {"data.path": "a"}).write(folder)
    (run.checkpoints / "latest").write_text(checkpoint_name(20) + "\n")
    return run


def test_the_stored_configuration_loads_back_equal(run: RunDirectory, config: Config) -> None:
    assert type(config).from_yaml(run.config.read_text()) == config


def test_a_new_or_empty_directory_is_fine_and_stays_untouched(tmp_path: Path, config: Config) -> None:
    assert check_run_directory(config, RunDirectory(tmp_path / "a" / "b"), "none") == ([], None)
    assert check_run_directory(config, RunDirectory(tmp_path), "auto") == ([], None)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_no_run(tmp_path: Path, config: Config) -> None:
    (tmp_path / "slurm-12.out").write_text("")
    assert check_run_directory(config, RunDirectory(tmp_path), "none") == ([], None)


def test_another_run_is_refused_unless_resumed(run: RunDirectory, config: Config) -> None:
    (problem,), _ = check_run_directory(config, run, "none")
    assert problem.field == "--run-dir" and "--resume auto" in problem.remedy
    assert check_run_directory(config, run, "auto") == ([], run.checkpoints / checkpoint_name(20))


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


def test_a_file_is_refused(tmp_path: Path, config: Config) -> None:
    (tmp_path / "x").write_text("")
    (problem,), _ = check_run_directory(config, RunDirectory(tmp_path / "x"), "none")
    assert "is a file" in problem.remedy


def test_resume_auto_without_a_checkpoint_begins_the_same_run_anew(run: RunDirectory, config: Config) -> None:
    (run.checkpoints / "latest").unlink()
    assert check_run_directory(config, run, "auto") == ([], None)
    other = load_config("debug", overrides=["model.num_layers=5"])
    (problem,), _ = check_run_directory(other, run, "auto")
    assert problem.field == "model.num_layers" and "has 4" in problem.remedy
    run.config.unlink()
    (problem,), _ = check_run_directory(config, run, "auto")
    assert "config.yaml cannot be read" in problem.remedy


def test_resume_auto_with_a_pointer_to_nothing_is_refused(run: RunDirectory, config: Config) -> None:
    (run.checkpoints / "latest").write_text("step-00000099\n")
    (problem,), _ = check_run_directory(config, run, "auto")
    assert "step-00000099" in problem.remedy


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000020"])
def test_a_path_may_be_a_run_its_checkpoints_or_one_of_them(run: RunDirectory, part: str) -> None:
    assert find_checkpoint(run, str(run.path / part)) == run.checkpoints / checkpoint_name(20)


def test_an_earlier_checkpoint_may_be_named(run: RunDirectory) -> None:
    earlier = run.checkpoints / checkpoint_name(10)
    assert find_checkpoint(run, str(earlier)) == earlier


def test_a_path_without_a_checkpoint_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no checkpoint"):
        find_checkpoint(run, str(tmp_path))


def test_a_branch_needs_a_directory_of_its_own(run: RunDirectory, config: Config, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "other")
    source = run.checkpoints / checkpoint_name(20)
    assert check_run_directory(config, other, str(source)) == ([], source)
    other.create(config)
    (problem,), _ = check_run_directory(config, other, str(source))
    assert "another run" in problem.remedy


def test_a_checkpoint_may_lie_anywhere_under_any_name(run: RunDirectory, config: Config, tmp_path: Path) -> None:
    archived = tmp_path / "archive" / "best"
    shutil.copytree(run.checkpoints / checkpoint_name(10), archived)
    assert check_run_directory(config, RunDirectory(tmp_path / "branch"), str(archived)) == ([], archived)


def test_a_folder_is_no_checkpoint_before_its_last_file(run: RunDirectory) -> None:
    latest = run.checkpoints / checkpoint_name(20)
    (latest / "origin.json").unlink()
    with pytest.raises(ConfigError, match="is no checkpoint"):
        find_checkpoint(run, str(latest))
