"""job.json: what is written is read again, and nothing half-written or foreign is taken for it."""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mlra_scale.cluster.job_file import JobAttempt, JobFile, now


def filled(path: Path) -> JobFile:
    attempts = [
        JobAttempt(
            1,
            "7",
            ["a", "b"],
            4,
            ended=now(),
            end="hung",
            reason="rank 1",
            has_progressed=True,
            failures=["rank 1 \u00e9"],
            first_step_seconds=2.5,
        ),
        JobAttempt(2, "7", ["a"], 2),
    ]
    return JobFile(
        path, "7", "name", ["--preset", "debug"], "running", "why", steps=9, excluded={"b": "ECC"}, attempts=attempts
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = filled(tmp_path / "job.json")
    file.write()
    assert asdict(JobFile.read(file.path)) == asdict(file)
    assert datetime.now(UTC) - datetime.fromisoformat(file.updated) < timedelta(seconds=10)
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_its_keys_are_frozen(tmp_path: Path) -> None:
    """Other programs read it."""
    file = filled(tmp_path / "job.json")
    file.write()
    values = json.loads(file.path.read_text())
    keys = "job_id name command state reason updated steps num_requeues console excluded first_counted attempts version"
    assert [*values] == keys.split()
    keys = "number job_id nodes num_ranks started ended end reason has_progressed failures first_step_seconds"
    assert [*values["attempts"][0]] == keys.split()


def test_a_missing_file_is_a_job_without_attempts(tmp_path: Path) -> None:
    file = JobFile.read(tmp_path / "job.json")
    assert (file.state, file.attempts, file.ends) == ("pending", [], [])


def test_a_change_of_state_is_written(tmp_path: Path) -> None:
    file = filled(tmp_path / "job.json")
    file.become("requeued", "node b is lost")
    read = JobFile.read(file.path)
    assert (read.state, read.reason) == ("requeued", "node b is lost")
    file.become("done")
    assert JobFile.read(file.path).reason == "", "no reason of an earlier state stays"


def test_an_attempt_without_an_end_has_failed(tmp_path: Path) -> None:
    assert filled(tmp_path / "job.json").ends == [("hung", True), ("failed", False)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"attempts": 3}',
        '{"attempts": [3]}',
        '{"attempts": [{}]}',
        '{"attempts": [], "unknown": 1}',
        '{"attempts": [], "path": "x"}',
        '{"attempts": [], "steps": null}',
        '{"attempts": [], "state": "lazy"}',
    ],
)
def test_a_file_of_another_form_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"job\.json is no job file of this program .*; move it away"):
        JobFile.read(path)
    assert path.read_text() == text


def test_where_there_is_no_room_for_a_second_file_it_is_overwritten_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has blanks at its end for this. Content with no room even there is not written, and the job continues."""
    file = filled(tmp_path / "job.json")
    file.become("running")
    size = file.path.stat().st_size

    def refuse(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    file.attempts[-1].reason = "x" * 2000
    file.become("failed", "y" * 2000)
    assert capsys.readouterr().err == ""
    assert asdict(JobFile.read(file.path)) == asdict(file) and file.path.stat().st_size == size
    file.become("done")
    assert asdict(JobFile.read(file.path)) == asdict(file), "nothing is left of the longer text"
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
    file.become("failed", "more than there is room for: " + "x" * 20_000)
    assert "No space left on device" in capsys.readouterr().err
    assert JobFile.read(file.path).state == "done"
