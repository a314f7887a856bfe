"""The code of docs/checkpoints.md does what it says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.failpoints import FAILPOINTS
from mlra_scale.checkpoint.fragments import PARTS
from tests.unit.checkpoint.builders import Layout, all_parts, write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "checkpoints.md").read_text(encoding="ascii")
READER, USE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_tensors_are_read_without_this_project(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(READER, namespace)
    values = all_parts()
    folder = write_checkpoint(tmp_path, 1, Layout(2, 2, 3, seed=4), values)
    for part in PARTS:
        for name, tensor in values[part].items():
            np.testing.assert_array_equal(namespace["read_tensor"](folder, name, part), tensor.numpy())


def test_the_example_of_use_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny vocabulary has no rows 100 to 200.
    code = USE.replace("100, 200", "10, 20")
    assert code != USE
    write_checkpoint(tmp_path / "runs" / "first" / "checkpoints", 100, state={"progress": {"step": 100}})
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_keys_of_the_manifest_are_documented(tmp_path: Path) -> None:
    store = Store.open(write_checkpoint(tmp_path, 1))
    keys = json.loads((store.folder / "manifest.json").read_text())
    assert all(f"`{key}`" in TEXT for key in [*keys, *store.manifest.layout])
    assert all((store.folder / name).is_file() and name in TEXT for name in store.manifest.files)


def test_every_point_is_reached_by_name() -> None:
    """failpoints.py lists what the code reaches, and the code reaches what it lists."""
    code = "".join(path.read_text() for path in sorted((ROOT / "mlra_scale" / "checkpoint").glob("*.py")))
    assert set(re.findall(r'failpoints\.reached\("([a-z-]+)"\)', code)) == set(FAILPOINTS)
