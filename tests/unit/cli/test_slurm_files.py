"""The files that come with the package: where they are found, and how they are written for a cluster."""

import os
from pathlib import Path

import pytest

from mlra_scale import bundled
from mlra_scale.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted([*(ROOT / "ds_configs").iterdir(), *(ROOT / "slurm").iterdir()])


def write(folder: Path) -> int:
    return COMMANDS["slurm-files"].main([str(folder)])


def test_the_files_are_those_of_the_checkout() -> None:
    assert sorted(bundled.files().values()) == [path for path in FILES if path.name != "check.sh"]
    assert not (ROOT / "mlra_scale" / "slurm").exists() and not (ROOT / "mlra_scale" / "ds_configs").exists()


def test_a_second_call_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path / "a" / "b") == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == len(FILES) - 1 and all(os.access(p, os.X_OK) for p in written if p.name == "sweep.sh")
    written[0].unlink()
    times = [path.stat().st_mtime_ns for path in written[1:]]
    assert write(tmp_path / "a" / "b") == 0 and written[0].is_file()
    assert [path.stat().st_mtime_ns for path in written[1:]] == times


def test_an_edited_file_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited = [tmp_path / "slurm" / "launch.sh", tmp_path / "ds_configs" / "zero1.json"]
    for path in edited:
        path.parent.mkdir()
        path.write_text("mine\n")
    assert write(tmp_path) == 2
    told = capsys.readouterr().err
    assert "nothing was written" in told and all(str(path) in told for path in edited)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(edited)
    assert all(path.read_text() == "mine\n" for path in edited)


def test_a_folder_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert write(tmp_path / "file") == 2
    assert "slurm-files: error: " in (told := capsys.readouterr().err) and str(tmp_path / "file") in told


def test_a_deepspeed_file_that_is_there_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "ds_configs/zero1.json"
    assert bundled.ds_config(name) == ROOT / name
    Path("ds_configs").mkdir()
    Path(name).write_text("{}")
    assert bundled.ds_config(name) == Path(name)
    assert bundled.ds_config("ds_configs/none.json") == Path("ds_configs/none.json")
