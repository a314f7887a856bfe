"""Every piece of code of docs/library.md runs as it stands, each in a loop of the library that it is for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.api.page import LOOPS
from tests.unit.test_imports import ROOT


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs lightning")
    result = subprocess.run(
        [sys.executable, "-m", "tests.processes.api.page"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    done = [line.removeprefix("ran ") for line in result.stdout.splitlines() if line.startswith("ran ")]
    assert done == [loop.__name__ for loop in LOOPS]
