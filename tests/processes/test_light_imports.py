"""What must start without the heavy libraries: each in an interpreter of its own."""

import subprocess
import sys

import pytest

from tests.unit.test_imports import PACKAGE, ROOT


@pytest.mark.parametrize("module", ["config", "cli.main"])
def test_configuration_and_command_line_load_no_heavy_library(module: str) -> None:
    heavy = {"torch", "deepspeed", "megatron", "transformers", "numpy"}
    code = f"import {PACKAGE}.{module}, sys; print(*({heavy} & set(sys.modules)))"
    # -I keeps what site packages preload through the environment out; the root is named instead.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []
