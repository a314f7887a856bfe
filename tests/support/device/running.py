"""Starts the subprocess of a layout and reads its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

from tests.support.device import fake_cuda
from tests.support.device.layouts import Layout
from tests.support.device.report import Report

ROOT = Path(__file__).resolve().parents[3]
MARK = "traced report: "
LIMIT_SECONDS = 500
PROGRAM = """
import sys
from tests.support.device import fake_cuda
fake_cuda.load()  # before torch is imported
from tests.support.device import traced
traced.main(*sys.argv[1:])
"""


class TraceError(RuntimeError):
    """The subprocess failed; its text has the end of what it printed."""


@cache
def trace(layout: Layout, faults: str = "") -> Report:
    """Traces a layout in a process of its own.

    Args:
        layout: The layout.
        faults: Names of faults of tests/support/device/faults.py to put in, with commas between.

    Raises:
        TraceError: The process failed.
    """
    fake_cuda.library()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"RANK": str(layout.rank), "WORLD_SIZE": str(layout.world_size)}
    environment |= {"LOCAL_RANK": str(layout.rank % 8), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(asdict(layout)), faults]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Report.from_json(line.removeprefix(MARK))
    raise TraceError(f"{layout.name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
