"""What must start without the heavy libraries: each in an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_imports import PACKAGE, ROOT

LIBRARIES = {"torch", "deepspeed", "megatron", "transformers", "numpy"}
# What a training loads only where it is asked for, or after its first step has begun.
OPTIONAL = {"wandb", "tensorboard", "transformers", "datasets", "huggingface_hub", "lm_eval", "lightning", "requests"}
OPTIONAL |= {"pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "triton", "torch._dynamo", "torch._inductor"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("config", LIBRARIES),
        ("cli.main", LIBRARIES),
        ("stability.tev_folder", LIBRARIES - {"torch", "numpy"}),
        ("checkpoint.huggingface.tensors", LIBRARIES - {"torch", "numpy"}),
        ("evaluation.models", {"deepspeed", "megatron"}),
        ("data.prepare", LIBRARIES - {"numpy"}),
        pytest.param("training.loop.trainer", OPTIONAL, marks=pytest.mark.slow),
    ],
)
def test_what_reads_configurations_and_weights_loads_no_heavy_library(module: str, heavy: set[str]) -> None:
    code = f"import {PACKAGE}.{module}, sys; print(*({heavy} & set(sys.modules)))"
    # -I keeps what site packages preload through the environment out; the root is named instead.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []


def test_dry_run_for_many_ranks_needs_neither_ranks_nor_torch(tmp_path: Path) -> None:
    """Run as on a login node: where importing torch fails."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    arguments = ["--preset", "gpt2-mlra-72l", "--dry-run", "parallel.world_size=32", "parallel.tensor=4"]
    result = subprocess.run(
        [sys.executable, "-m", "mlra_scale.train", *arguments, "parallel.pipeline=2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "32 rank(s): tensor 4 x pipeline 2 x data 4" in result.stdout
    assert "959,441,920" in result.stdout and "Memory per rank" in result.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["torch.py"]
