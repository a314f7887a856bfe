"""The block through inductor and Triton for NVIDIA's compute capability 9.0, on a machine without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.device import fake_cuda
from tests.support.device.inductor import MARK
from tests.support.device.running import ROOT

MAX_LAUNCHES = 24
"""Kernels of Triton that a block starts, forward and backward: 22 with torch 2.13 and Triton 3.9."""
HAS_TRITON = importlib.util.find_spec("triton") is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing())),
    # No extra of pyproject.toml: its pin would bind builds of torch for GPUs, which bring a Triton of their own.
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton beside torch for CPUs: pip install triton==3.9.0"),
]


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.layer_norm_scaling=true"], ["model.depth_rule=completep"], ["model.attention=dense"]],
    ids=["mlra", "layer-norm-scaling", "completep", "dense"],
)
def test_a_block_compiles_to_kernels(tmp_path: Path, overrides: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cuda", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.support.device.inductor", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(MARK)] or [done.stderr[-4000:]]
    report: dict[str, Any] = json.loads(line.removeprefix(MARK))
    assert report["kernels"] and all(kernel["bytes"] > 0 for kernel in report["kernels"]), "no machine code"
    # Attention and matrix products are the libraries'; all else is fused.
    attention = "_scaled_dot_product_flash_attention"
    assert set(report["attention"]) == {attention, f"{attention}_backward"}
    assert 0 < report["launches"] <= MAX_LAUNCHES
