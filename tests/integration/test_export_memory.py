"""The memory benchmark of exports runs, and would tell of too much."""

from pathlib import Path

import pytest

from benchmarks import export_memory


@pytest.mark.slow
def test_it_runs_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert export_memory.main(["--quick", "--folder", str(tmp_path), "--tokens", "100"]) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith(("| gpt2", "| mlra"))]
    assert len(rows) == 2 and "of many ranks" in shown and "every peak is below 2 GB" in shown
    assert list(tmp_path.iterdir()) == []
    row = {"format": "gpt2", "checkpoint": "x", "peak": 3e9, "loaded": 3e8, "above": 2.7e9, "seconds": 1.0}
    monkeypatch.setattr(export_memory, "measure", lambda *arguments: row | {"difference": 0.0, "bound": 1e-4})
    assert export_memory.main(["--quick", "--folder", str(tmp_path)]) == 1
