"""The output folder appears finished or not at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mlra_scale.data import DataError
from mlra_scale.data.output import atomic_folder


def make(final: Path, content: str, overwrite: bool = False) -> None:
    with atomic_folder(final, overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(content)
        assert not (final / "sub" / "file").exists() or (final / "sub" / "file").read_text() != content
        (folder / "manifest.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_it_appears_whole_with_its_parents(tmp_path: Path) -> None:
    final = tmp_path / "a" / "b" / "set"
    make(final, "one")
    assert (final / "sub" / "file").read_text() == "one" and names(final.parent) == ["set"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "a" / "set", False) as folder:
        (folder / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_finished_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    final = tmp_path / "set"
    make(final, "one")
    with pytest.raises(DataError, match="holds a finished data set; give --overwrite"):
        make(final, "two")
    assert (final / "sub" / "file").read_text() == "one"
    with pytest.raises(RuntimeError), atomic_folder(final, True):
        raise RuntimeError
    assert (final / "sub" / "file").read_text() == "one"
    make(final, "two", overwrite=True)
    assert (final / "sub" / "file").read_text() == "two" and names(tmp_path) == ["set"]


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("ten years")
    (tmp_path / "file").write_text("x")
    for name, message in (("thesis", "was not made by this tool"), ("file", "is not a folder")):
        with pytest.raises(DataError, match=message):
            make(tmp_path / name, "new", overwrite=True)
    assert names(tmp_path) == ["file", "thesis"]
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "fills an empty folder")
    assert names(tmp_path) == ["empty", "file", "thesis"]


def test_leftovers_of_a_killed_run_are_cleaned_up(tmp_path: Path) -> None:
    leftover = tmp_path / ".set.partial"
    (leftover / "tokenizer").mkdir(parents=True)
    (leftover / "train.bin").write_text("half")
    make(tmp_path / "set", "one")
    assert names(tmp_path) == ["set"] and names(tmp_path / "set") == ["manifest.json", "sub"]


def test_a_run_killed_between_its_two_renames_loses_nothing(tmp_path: Path) -> None:
    final, old = tmp_path / "set", tmp_path / ".set.old"
    make(final, "one")
    final.rename(old)
    with pytest.raises(DataError, match="holds a finished data set"):
        make(final, "two")
    assert (final / "sub" / "file").read_text() == "one" and not old.exists()
    # Killed after the second rename: the old one only has to go.
    make(old, "older")
    make(final, "three", overwrite=True)
    assert (final / "sub" / "file").read_text() == "three" and names(tmp_path) == ["set"]


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "set", False) as folder:
        (folder / "manifest.json").write_text("{}")
        with pytest.raises(DataError, match="another run is building set right now"):
            make(tmp_path / "set", "two")
        assert (folder / "manifest.json").exists()
    assert names(tmp_path / "set") == ["manifest.json"]


def test_the_lock_is_gone_with_the_run(tmp_path: Path) -> None:
    make(tmp_path / "set", "one")
    descriptor = os.open(tmp_path / "set", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
