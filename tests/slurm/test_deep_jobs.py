"""The jobs of test_jobs.py at 72 layers, which gives the figures of docs/slurm.md."""

import os
import subprocess
import sys

import pytest

from tests.support.training_runs import ROOT


@pytest.mark.nightly
@pytest.mark.timeout(3 * 3600)
def test_all_jobs_at_72_layers() -> None:
    """In a pytest of its own: the depth is read when tests/slurm/jobs.py is imported."""
    command = [sys.executable, "-m", "pytest", "tests/slurm/test_jobs.py", "-m", "not nightly", "-s"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"SLURM_TEST_LAYERS": "72"}, check=True)
