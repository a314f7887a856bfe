"""The project's own machinery: pinned versions, the installer, the check on skipped tests."""

import importlib.util
import json
import re
import sys
import tomllib
import urllib.error
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlra_scale import __version__

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

    module.build = None
    module.only_cpu = False

    def record(what: str, command: list[str], verb: str = "installing") -> None:
        module.commands.append(command)
        (tmp_path / "venv").mkdir(exist_ok=True)
        if verb == "removing":
            module.build = None
        elif what.startswith("torch (") and module.build is None:
            # As pip has it: what is there is good enough, whatever its build.
            cuda = None if what == "torch (cpu)" or module.only_cpu else "13.0"
            module.build = module.TorchBuild("2.13.0", cuda)

    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("refused")

    monkeypatch.setattr(module, "run_step", record)
    monkeypatch.setattr(module, "torch_build", lambda python: module.build)
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


def test_the_version_is_the_same_everywhere() -> None:
    citation = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    headings = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation == headings[:1] == [__version__]


def test_a_second_installation_does_nothing(installer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    installer.install(folder, "auto", set())
    assert [command[2] for command in installer.commands] == ["venv", "pip", "pip"]
    assert json.loads((folder / "installed.json").read_text())["torch"] == "cpu"
    installer.commands.clear()
    installer.install(folder, "auto", set())
    assert installer.commands == []


def test_an_extra_is_added_to_what_is_there(installer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    installer.install(folder, "torch==2.12.1", set())
    installer.commands.clear()
    installer.install(folder, "auto", {"dev"})
    # The torch that was chosen stays, and only the package is installed again, with its extra.
    assert len(installer.commands) == 1
    assert installer.commands[0][-1].endswith("[dev]")
    assert "torch==" not in (folder / "constraints.txt").read_text()
    installer.commands.clear()
    installer.install(folder, "auto", set())
    assert installer.commands == []


def test_another_build_of_torch_takes_the_place_of_the_first(
    installer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "venv"
    for choice, cuda in (("cpu", None), ("cuda", "13.0"), ("cpu", None), ("torch==2.12.1", "13.0")):
        installer.commands.clear()
        installer.install(folder, choice, set())
        assert installer.build.cuda == cuda
        assert [c for c in installer.commands if "uninstall" in c] == (
            [] if (choice, installer.commands[0][2]) == ("cpu", "venv") else [installer.commands[0]]
        )
        assert json.loads((folder / "installed.json").read_text())["torch"] == choice
        assert str(installer.build) in capsys.readouterr().out


def test_a_build_that_is_there_is_kept(installer: Any, tmp_path: Path) -> None:
    """After an interruption there is no record, but what pip had installed."""
    installer.build = installer.TorchBuild("2.13.0", None)
    installer.install(tmp_path / "venv", "cpu", set())
    assert not [command for command in installer.commands if "uninstall" in command]


def test_a_change_of_torch_that_fails_is_not_recorded(installer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    installer.install(folder, "cpu", {"dev"})
    installer.only_cpu = True
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"sources gave torch 2\.13\.0 without CUDA"):
            installer.install(folder, "cuda", set())
    installer.install(folder, "auto", set())
    done = json.loads((folder / "installed.json").read_text())
    assert (done["torch"], done["extras"]) == ("cpu", ["dev"])


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


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ('<testcase name="a"/><testcase name="b"><skipped message="needs an NVIDIA GPU"/></testcase>', 0),
        ('<testcase name="a"/><testcase name="b"><skipped message="flaky"/></testcase>', 1),
        ('<testcase name="b"><skipped message="needs an NVIDIA GPU"/></testcase>', 1),
        (
            '<testcase name="a"/><testcase classname="tests.slurm.test_jobs" name="b"><skipped message="needs Slurm"/>'
            "</testcase>",
            1,
        ),
        ('<testcase name="a"/><testcase name="b"><skipped message="needs Chromium (Debian: chromium)"/></testcase>', 1),
        ("", 1),
    ],
)
def test_skips_without_a_need_fail(tmp_path: Path, cases: str, expected: int) -> None:
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert len(load_script(".ci/check_skips.py").problems_of(report)) == expected
