"""What must start without the heavy libraries: each in an interpreter of its own."""

import subprocess
import sys

from tests.unit.test_imports import PACKAGE, ROOT


def test_importing_the_configuration_loads_no_heavy_library() -> None:
    heavy = {"torch", "deepspeed", "megatron", "transformers", "numpy"}
    code = f"import {PACKAGE}.config, sys; print(*({heavy} & set(sys.modules)))"
    # -I keeps what site packages preload through the environment out; the root is named instead.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []
