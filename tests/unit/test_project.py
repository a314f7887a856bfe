"""The project's own machinery: pinned versions, the installer, the check on skipped tests."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import urllib.error
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def load_script(path: str) -> ModuleType:
    """A script as a module, without making its folder a package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/install.py with commands recorded instead of run."""
    module: Any = load_script("tools/install.py")
    module.commands = []

    def record(what: str, command: list[str]) -> None:
        module.commands.append(command)
        (tmp_path / "venv").mkdir(exist_ok=True)

    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("refused")

    monkeypatch.setattr(module, "run_step", record)
    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    return module


def test_the_suite_sees_no_gpu() -> None:
    import torch

    assert torch.cuda.device_count() == 0


def test_every_requirement_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for line in sum(project["optional-dependencies"].values(), project["dependencies"]):
        requirement = Requirement(line)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{line} does not allow the tested {pin}"


def test_a_second_installation_does_nothing(installer: Any, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    installer.install(venv, "auto", set())
    assert [command[2] for command in installer.commands] == ["venv", "pip", "pip"]
    assert json.loads((venv / "installed.json").read_text())["torch"] == "cpu"
    installer.commands.clear()
    installer.install(venv, "auto", set())
    assert installer.commands == []


def test_an_extra_is_added_to_what_is_there(installer: Any, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    installer.install(venv, "torch==2.12.1", set())
    installer.commands.clear()
    installer.install(venv, "auto", {"dev"})
    # The torch that was chosen stays, and only the package is installed again, with its extra.
    assert len(installer.commands) == 1
    assert installer.commands[0][-1].endswith("[dev]")
    assert "torch==" not in (venv / "constraints.txt").read_text()
    installer.commands.clear()
    installer.install(venv, "auto", set())
    assert installer.commands == []


@pytest.mark.parametrize(("choice", "is_reachable"), [("cpu", True), ("cpu", False), ("cuda", True)])
def test_the_cpu_build_has_its_own_index(
    installer: Any, monkeypatch: pytest.MonkeyPatch, choice: str, is_reachable: bool
) -> None:
    if is_reachable:
        monkeypatch.setattr(installer.urllib.request, "urlopen", lambda url, timeout: (ROOT / "LICENSE").open())
    arguments = installer.torch_arguments(choice)
    assert ("--extra-index-url" in arguments) == (choice == "cpu" and is_reachable)


def test_arguments_for_pip_are_passed_on(installer: Any) -> None:
    assert installer.torch_arguments("torch==2.12.1 --index-url 'https://a b'") == [
        "torch==2.12.1",
        "--index-url",
        "https://a b",
    ]


def test_an_old_python_is_told_what_to_do(installer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"is Python 3\.9; 3\.11 or newer is needed"):
        installer.check_python()


def test_a_python_without_venv_is_told_what_to_install(installer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match="python3-venv"):
        installer.check_python()


def test_make_without_a_target_explains_itself() -> None:
    result = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, timeout=60, check=True)
    for target in ("quickstart", "test", "lint", "bench", "clean"):
        assert f"make {target}" in result.stdout


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ('<testcase name="a"/><testcase name="b"><skipped message="needs an NVIDIA GPU"/></testcase>', 0),
        ('<testcase name="a"/><testcase name="b"><skipped message="flaky"/></testcase>', 1),
        ('<testcase name="b"><skipped message="needs an NVIDIA GPU"/></testcase>', 1),
        ("", 1),
    ],
)
def test_skips_without_a_need_fail(tmp_path: Path, cases: str, expected: int) -> None:
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert len(load_script(".ci/check_skips.py").problems_of(report)) == expected
