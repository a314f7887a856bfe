"""The output folder of a preparation: only a finished data set is replaced, and only when asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlra_scale.data import DataError
from mlra_scale.data.prepare import output_folder


def make(final: Path, content: str, overwrite: bool = False) -> None:
    with output_folder(final, overwrite) as folder:
        (folder / "file").write_text(content)
        (folder / "manifest.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_finished_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    final = tmp_path / "set"
    make(final, "one")
    with pytest.raises(DataError, match="holds a finished data set; give --overwrite"):
        make(final, "two")
    with pytest.raises(RuntimeError), output_folder(final, True):
        raise RuntimeError
    assert (final / "file").read_text() == "one"
    make(final, "two", overwrite=True)
    assert (final / "file").read_text() == "two" and names(tmp_path) == ["set"]


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


def test_a_data_set_that_a_killed_run_set_aside_is_not_replaced_either(tmp_path: Path) -> None:
    make(tmp_path / ".set.old", "one")  # killed between its two renames
    with pytest.raises(DataError, match="holds a finished data set"):
        make(tmp_path / "set", "two")
    assert (tmp_path / "set" / "file").read_text() == "one" and names(tmp_path) == ["set"]


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    with output_folder(tmp_path / "set", False) as folder:
        (folder / "manifest.json").write_text("{}")
        with pytest.raises(DataError, match="another run is building set right now"):
            make(tmp_path / "set", "two")
    assert names(tmp_path / "set") == ["manifest.json"]
