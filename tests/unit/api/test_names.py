"""The names of the public face, and the page that explains them."""

import ast
import re
import sys
from typing import Any

import pytest

import mlra_scale
from tests.unit.test_imports import ROOT

PAGE = (ROOT / "docs" / "library.md").read_text()


def test_every_name_is_there() -> None:
    assert set(mlra_scale.__all__) == set(mlra_scale._MODULES)
    for name in mlra_scale.__all__:
        if name == "LightningTevCallback":
            pytest.importorskip("lightning", reason="needs lightning")
        assert getattr(mlra_scale, name).__name__ == name
    assert set(mlra_scale.__all__) <= set(dir(mlra_scale)), "for completion"
    with pytest.raises(AttributeError, match="has no attribute 'tve'"):
        _ = mlra_scale.tve


@pytest.mark.parametrize(
    ("name", "library", "module"),
    [
        ("TevCallback", "transformers", "transformers_callback"),
        ("LightningTevCallback", "lightning", "lightning_callback"),
        ("attach_tev", "deepspeed", "deepspeed_engine"),
    ],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: str, library: str, module: str) -> None:
    missing: dict[str, Any] = {key: None for key in list(sys.modules) if key.partition(".")[0] == library}
    for key in {library, *missing}:
        monkeypatch.setitem(sys.modules, key, None)
    monkeypatch.delitem(sys.modules, f"mlra_scale.api.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"mlra_scale\.{name} needs {library}: pip install {library}"):
        getattr(mlra_scale, name)


def test_a_missing_library_is_found_behind_errors_of_transformers() -> None:
    wrapped = ModuleNotFoundError("Could not import module 'TrainerCallback'")
    wrapped.__cause__ = ModuleNotFoundError("No module named 'accelerate'", name="accelerate.utils")
    assert mlra_scale._missing_library(wrapped) == "accelerate"
    assert mlra_scale._missing_library(ModuleNotFoundError("of nothing")) == ""


def test_the_page_has_every_name_and_its_code_uses_no_other() -> None:
    table = PAGE.split("\n## ")[0]
    assert {name for name in mlra_scale.__all__ if f"`{name}" not in table} == {"TevStatistics"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    used = set()
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and node.module == "mlra_scale":
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mlra_scale":
            used.add(node.attr)
    assert used <= set(mlra_scale.__all__) and {"tev", "TevCallback", "LightningTevCallback", "attach_tev"} <= used
