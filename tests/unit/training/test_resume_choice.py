"""Which checkpoint a start resumes from, and what it says of those that it passes over."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.checkpoint.retention import checkpoint_name
from mlra_scale.config import ConfigError, Problem
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start.resume_choice import ResumePoint, choose_checkpoint
from tests.unit.checkpoint.builders import config_of, parts_with, vectors_with, write_checkpoint


def state_at(step: int) -> dict[str, Any]:
    """The state of a run after a step, as far as a start looks at it."""
    mix = {"names": ["d"], "fingerprints": ["f"], "weights": [1.0], "from_sample": 0}
    return {
        "progress": {"step": step, "consumed_samples": 2 * step, "consumed_tokens": 100 + step},
        "engine": {"optimizer_step": step, "num_skipped": 0, "loss_scaler": None},
        "windows": {},
        "data": {"mixes": [mix], "validation": None, "tokenizer": None},
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "run")
    run.create(config_of())
    for step in (10, 20, 30):
        write_checkpoint(run.checkpoints, step, state=state_at(step))
    return run.path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunDirectory:
    """A directory that holds a run with three checkpoints, the last one the latest."""
    return RunDirectory(Path(shutil.copytree(original, tmp_path / "run")))


def at(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / checkpoint_name(step)


def refused(run: RunDirectory, resume: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        choose_checkpoint(run, resume)
    (problem,) = caught.value.problems
    return problem


def test_a_new_or_empty_directory_is_fine_and_stays_untouched(tmp_path: Path) -> None:
    assert choose_checkpoint(RunDirectory(tmp_path / "a" / "b"), "none") == ResumePoint()
    assert choose_checkpoint(RunDirectory(tmp_path), "auto") == ResumePoint()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_prepared_for_the_checkpoints_is_no_run(run: RunDirectory, tmp_path: Path) -> None:
    """Often they are to go to another disk than the record."""
    new, scratch = RunDirectory(tmp_path / "new"), tmp_path / "scratch"
    new.path.mkdir()
    scratch.mkdir()
    new.checkpoints.symlink_to(scratch)
    assert choose_checkpoint(new, "none") == choose_checkpoint(new, "auto") == ResumePoint()
    write_checkpoint(scratch, 10, state=state_at(10))
    assert "holds another run" in refused(new, "none").remedy
    assert choose_checkpoint(new, "auto").checkpoint == at(new, 10)


def test_files_of_others_are_no_run_and_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "slurm-12.out").write_text("")
    assert choose_checkpoint(RunDirectory(tmp_path), "none") == ResumePoint()
    assert "is a file" in refused(RunDirectory(tmp_path / "slurm-12.out"), "none").remedy


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user sees it; root may write everywhere, so the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for resume in ("none", "auto"):
        assert "cannot be written" in refused(RunDirectory(tmp_path), resume).remedy


def test_another_run_is_refused_unless_resumed(run: RunDirectory) -> None:
    problem = refused(run, "none")
    assert problem.field == "--run-dir" and "--resume auto" in problem.remedy
    assert choose_checkpoint(run, "auto") == ResumePoint(at(run, 30))
    assert choose_checkpoint(run, str(at(run, 10))) == ResumePoint(at(run, 10)), "an earlier one may be named"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "there is no such folder"),
    "truncated": (lambda path: os.truncate(path / "rank-00000.safetensors", 100), "has 100 bytes and not"),
    "no shard": (lambda path: (path / "rank-00000.safetensors").unlink(), "is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "manifest of another save": (
        lambda path: shutil.copy(path.with_name(checkpoint_name(10)) / "manifest.json", path),
        "damaged or of another save",
    ),
    "flipped state": (lambda path: flip(path / "state.json"), "damaged or of another save"),
    "flipped manifest": (lambda path: flip(path / "manifest.json"), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_gives_way_to_the_one_before(run: RunDirectory, damage: str) -> None:
    destroy, reason = DAMAGES[damage]
    destroy(at(run, 30))
    choice = choose_checkpoint(run, "auto")
    assert choice.checkpoint == at(run, 20)
    (rejected,) = choice.rejected
    assert rejected.path == at(run, 30) and reason in rejected.reason
    assert reason in refused(run, str(at(run, 30))).remedy, "a path that was named is not replaced by another"


@pytest.mark.parametrize(
    ("section", "bad", "reason"),
    [
        ("progress", {}, "'data' is missing"),
        ("progress", {"step": "3"}, "has progress"),
        ("progress", {"step": 1, "samples": 2}, "unexpected keyword argument"),
        ("progress", [], "no object"),
        ("engine", {}, "'optimizer_step' is missing"),
        ("engine", {"optimizer_step": True, "num_skipped": 0}, "engine has optimizer_step True"),
        ("engine", {"optimizer_step": 4, "num_skipped": 0, "adam_begun_at": []}, "engine has adam_begun_at"),
        ("engine", {"optimizer_step": 4, "num_skipped": 0, "adam_begun_at": {"head": 1}}, "adam_begun_at 'head' 1"),
        ("engine", {"optimizer_step": 4, "num_skipped": 0, "adam_begun_at": {"final_norm.bias": 5}}, "bias' 5"),
        ("windows", None, "windows is None"),
        ("data", {"mixes": []}, "not a history of data"),
        ("data", {"mixes": [], "validation": None, "tokenizer": None}, "not a history of data"),
        ("data", {"mixes": [1], "validation": None, "tokenizer": None}, "not a mix of data sets"),
        ("data", {"mixes": {"a": 1}, "validation": None, "tokenizer": None}, "not a mix of data sets"),
    ],
)
def test_a_state_that_is_not_sound_is_passed_over(
    run: RunDirectory, tmp_path: Path, section: str, bad: Any, reason: str
) -> None:
    """Sizes and checksums are right: only what is in it is not what a start needs."""
    state = state_at(40) | {section: bad}
    if section == "progress" and bad == {}:
        del state["data"]
    write_checkpoint(run.checkpoints, 40, state=state)
    choice = choose_checkpoint(run, "auto")
    assert choice.checkpoint == at(run, 30)
    (rejected,) = choice.rejected
    assert rejected.path == at(run, 40) and reason in rejected.reason and "state.json" in rejected.reason


def test_a_checkpoint_with_some_of_the_vectors_of_its_power_iterations_is_passed_over(run: RunDirectory) -> None:
    """It would begin them anew, and not continue as if it had not been stopped."""
    spectron: dict[str, Any] = {"name": "spectron"}
    some = dict(list(vectors_with(**spectron).items())[1:])
    options: dict[str, Any] = {"optim": spectron, "buffers": some, "state": state_at(40)}
    write_checkpoint(run.checkpoints, 40, values=parts_with(**spectron), **options)
    choice = choose_checkpoint(run, "auto")
    assert choice.checkpoint == at(run, 30) and "lacks optimizer_vector/blocks.0" in choice.rejected[0].reason
    for buffers in (vectors_with(**spectron), {}):
        write_checkpoint(run.checkpoints, 40, values=parts_with(**spectron), **options | {"buffers": buffers})
        assert choose_checkpoint(run, "auto").checkpoint == at(run, 40)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a\x00b", b"x" * 100_000])
def test_a_note_of_where_a_branch_began_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    run = RunDirectory(tmp_path / "branch")
    run.create(config_of())
    (run.path / "started_from").write_bytes(content)
    problem = refused(run, "auto")
    assert problem.field == "--run-dir" and "started_from" in problem.remedy


def test_bad_ones_are_passed_over_one_after_another_and_a_missing_pointer_is_reported(run: RunDirectory) -> None:
    (at(run, 20) / "state.json").unlink()
    choice = choose_checkpoint(run, "auto", {at(run, 30): "its sha256 is another"})
    assert choice.checkpoint == at(run, 10)
    assert [item.path for item in choice.rejected] == [at(run, 30), at(run, 20)]
    (run.checkpoints / "latest").unlink()
    choice = choose_checkpoint(run, "auto")
    assert choice.checkpoint == at(run, 30)
    assert [(item.path.name, item.reason) for item in choice.rejected] == [("latest", "is missing")]


def test_checkpoints_that_are_all_bad_are_no_reason_to_begin_anew(run: RunDirectory) -> None:
    for step in (10, 20, 30):
        (at(run, step) / "config.yaml").unlink()
    problem = refused(run, "auto")
    assert problem.field == "--resume" and "none of them can be used" in problem.remedy
    assert checkpoint_name(30) in problem.remedy
    (run.checkpoints / "latest").unlink()
    assert checkpoint_name(10) in refused(run, "auto").remedy
    shutil.rmtree(run.checkpoints)
    assert choose_checkpoint(run, "auto") == ResumePoint(), "stopped before its first checkpoint"


def test_checkpoints_of_an_abandoned_branch_come_last(run: RunDirectory) -> None:
    """The latest is 20, since the run was continued from there: 30 belongs to a branch that was given up."""
    (run.checkpoints / "latest").write_text(f"{checkpoint_name(20)}\n")
    assert choose_checkpoint(run, "auto") == ResumePoint(at(run, 20))
    bad = {at(run, 20): "bad"}
    assert choose_checkpoint(run, "auto", bad).checkpoint == at(run, 10)
    assert choose_checkpoint(run, "auto", bad | {at(run, 10): "bad"}).checkpoint == at(run, 30)


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000030"])
def test_a_path_may_be_a_run_its_checkpoints_or_one_of_them(run: RunDirectory, part: str) -> None:
    assert choose_checkpoint(run, str(run.path / part)) == ResumePoint(at(run, 30))


def test_a_branch_needs_a_directory_of_its_own(run: RunDirectory, tmp_path: Path) -> None:
    other, archived = RunDirectory(tmp_path / "other"), tmp_path / "archive" / "best"
    assert choose_checkpoint(other, str(at(run, 30))) == ResumePoint(at(run, 30))
    shutil.copytree(at(run, 10), archived)
    assert choose_checkpoint(other, str(archived)) == ResumePoint(archived), "anywhere and under any name"
    other.create(config_of())
    assert "none of its checkpoints" in refused(other, str(at(run, 30))).remedy


def test_a_branch_that_has_no_checkpoint_yet_begins_again_where_it_began(run: RunDirectory, tmp_path: Path) -> None:
    """Without this, --resume auto would begin at step 0 with new weights."""
    branch = RunDirectory(tmp_path / "branch")
    branch.create(config_of(), at(run, 20))
    assert choose_checkpoint(branch, "auto") == ResumePoint(at(run, 20))
    assert "none of its checkpoints" in refused(branch, str(at(run, 10))).remedy, "another one than it began from"
    assert "is no checkpoint" in refused(branch, str(tmp_path)).remedy
    shutil.rmtree(at(run, 20))
    assert "the run began from" in refused(branch, "auto").remedy


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000020"])
def test_the_command_that_began_a_branch_continues_it(run: RunDirectory, tmp_path: Path, part: str) -> None:
    """A queue starts the same command line again, wherever the run that it branched from has come to in between."""
    branch, command = RunDirectory(tmp_path / "branch"), str(run.path / part)
    branch.create(config_of(), at(run, 20))
    assert choose_checkpoint(branch, command) == ResumePoint(at(run, 20)), "no checkpoint of its own yet"
    write_checkpoint(branch.checkpoints, 40, state=state_at(40))
    shutil.rmtree(run.path)
    assert choose_checkpoint(branch, command) == ResumePoint(at(branch, 40))
    shutil.rmtree(branch.checkpoints)
    assert "the run began from" in refused(branch, command).remedy
