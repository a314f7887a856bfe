"""The first command of the README, in a fresh copy of the project with an environment of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes.test_packaging import not_copied
from tests.support.training_runs import ROOT


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_quickstart_of_a_fresh_checkout(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "project", ignore=not_copied)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        ["make", "quickstart"], cwd=tmp_path / "project", env=clean, capture_output=True, text=True, timeout=2300
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    run = tmp_path / "project" / "runs" / "quickstart"
    assert (run / "exported" / "model.safetensors").is_file() and (run / "report" / "report.html").is_file()
    assert (run / "report" / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert "a sample, by stock transformers alone:\nReturn a list of" in result.stdout
    assert "quickstart: installation" in result.stdout
