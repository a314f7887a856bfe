"""Starts the subprocess of a layout and reads its report."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.support.device import fake_cuda
from tests.support.device.layouts import Layout
from tests.support.device.report import Report

ROOT = Path(__file__).resolve().parents[3]
LIMIT_SECONDS = 500
PROGRAM = """
from tests.support.device import fake_cuda
fake_cuda.load()  # before torch is imported
from tests.support.device import traced
traced.main()
"""


class TraceError(RuntimeError):
    """The subprocess failed; its text has the end of what it printed."""


@cache
def trace(layout: Layout, faults: tuple[str, ...] = ()) -> Report:
    """Traces a layout in a process of its own.

    Raises:
        TraceError: The process failed.
    """
    fake_cuda.compiled_library()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"RANK": str(layout.rank), "WORLD_SIZE": str(layout.world_size)}
    environment |= {"LOCAL_RANK": str(layout.rank % 8), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=pickle.dumps((layout, faults, file)),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        if file.exists():
            report: Report = pickle.loads(file.read_bytes())
            return report
    output, errors = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    raise TraceError(f"{layout.name}: exit code {done.returncode}\n{output[-2000:]}\n{errors[-6000:]}")
