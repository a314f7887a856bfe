import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.config import Config, ConfigError, load_config, preset
from mlra_scale.console import set_up_logging
from mlra_scale.training.resume import read_stored
from mlra_scale.training.run_directory import RunDirectory, run_lock


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 5000, "nested too deeply"),
        (b"\xff", "is not UTF-8 text (byte 0)"),
        (b"a: &x [1]\nb: [*x, *x]", "aliases"),
        (b"version: 5\n", "version = 5: the file was written by a newer program"),
        (b"version: x\n", "version = 'x': must be a whole number from 1 to 4"),
        (b'"\\x1b[2J": 1\n', r"\x1b[2J = 1: unknown key"),
        (b"a: \x1b\n", "special characters are not allowed"),
        (b"- " * 400, "model = None: is required|nested|must be a mapping"),
        (b"x" * 2**21, "is larger than"),
        (b"", "must be a mapping"),
    ],
)
def test_a_damaged_configuration_is_one_error_that_names_the_file(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_stored(file)
    (problem,) = caught.value.problems
    assert str(file) in str(problem) and str(problem).isprintable()
    assert any(part in str(problem) for part in reason.split("|")), str(problem)
    with pytest.raises(ConfigError) as caught:
        load_config(config_file=file)
    assert all(str(problem).isprintable() for problem in caught.value.problems)


def test_the_stored_configuration_loads_back_equal_and_so_does_one_of_version_1(tmp_path: Path) -> None:
    """Commit 3a017c2 wrote no version."""
    run = RunDirectory(tmp_path)
    run.create(preset("debug"))
    text = run.config.read_text()
    assert Config.from_yaml(text) == preset("debug") and run.holds_a_run() and text.startswith("version: 4\n")
    run.config.write_text(text.partition("\n")[2])
    assert read_stored(run.config) == preset("debug") == load_config(config_file=run.config)


BAD: tuple[Any, ...] = (None, -1, [], 1.5)
ROLLBACK: dict[str, Any] = {"step": 9, "to_step": 4, "skipped_from": 3, "skipped_to": 7, "reason": "loss inf"}


def test_rollbacks_are_read_with_and_without_a_version(tmp_path: Path) -> None:
    run, file = RunDirectory(tmp_path), tmp_path / "guard.json"
    assert run.read_rollbacks() == ()
    run.write_rollbacks([ROLLBACK])
    assert json.loads(file.read_text()) == {"version": 2, "rollbacks": [ROLLBACK]}
    assert run.read_rollbacks() == (ROLLBACK,)
    file.write_text(json.dumps({"rollbacks": [ROLLBACK]}))
    assert run.read_rollbacks() == (ROLLBACK,)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        "{}",
        '{"rollbacks": {}}',
        '{"rollbacks": [1]}',
        '{"version": 3, "rollbacks": []}',
        '{"version": "2", "rollbacks": []}',
        *(json.dumps({"rollbacks": [{**ROLLBACK, key: bad}]}) for key in ROLLBACK for bad in BAD),
        *(json.dumps({"rollbacks": [{k: v for k, v in ROLLBACK.items() if k != key}]}) for key in ROLLBACK),
    ],
)
def test_a_damaged_record_of_the_guard_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "guard.json"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        RunDirectory(tmp_path).read_rollbacks()
    assert str(caught.value).startswith(str(file)) and str(caught.value).isprintable()


def test_where_a_branch_began_is_noted_and_a_run_that_begins_anew_began_nowhere_else(tmp_path: Path) -> None:
    """A note left over from a run that was removed by hand would let --resume auto begin there."""
    run = RunDirectory(tmp_path / "run")
    run.create(preset("debug"), run.checkpoints / "step-00000010")
    assert run.origin() is None, "its own checkpoint"
    run.create(preset("debug"), tmp_path / "other run" / "checkpoints" / "step-00000010")
    assert run.origin() == tmp_path / "other run" / "checkpoints" / "step-00000010"
    run.create(preset("debug"))
    assert run.origin() is None


def test_a_directory_on_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mkdir", "write"):
        with monkeypatch.context() as system:
            system.setattr(os, name, refuse)
            with pytest.raises(ConfigError, match="No space left on device"), run_lock(RunDirectory(tmp_path / name)):
                pytest.fail("held")


def test_a_locked_directory_refuses_others_until_it_is_unlocked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new" / "run")
    with run_lock(run):
        assert not run.holds_a_run()
        with pytest.raises(ConfigError, match=f"another run is at work here .process {os.getpid()} on"), run_lock(run):
            pass
    with run_lock(run):
        pass


def test_a_file_system_without_locks_is_reported_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    set_up_logging(0)
    with run_lock(RunDirectory(tmp_path)):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err
