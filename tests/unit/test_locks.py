"""The lock files of locks/: complete, pinned, with hashes, and of the versions that are tested."""

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.test_project import ROOT, load_script

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = [f"{build}-py{python}" for build in ("cpu", "cuda") for python in ("311", "313")]
ENTRY = re.compile(
    r"^([a-z0-9-]+)(?:==([^\s;]+)| @ (https://download\.pytorch\.org/whl/cpu/\S+)) \\\n"
    r"((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
    re.MULTILINE,
)
EXCEPT_ON_3_13 = {"megatron-core"}


def packages(name: str) -> dict[str, str]:
    """Package to version; every line of the file belongs to an entry."""
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    header, body = text.split("\n", 1)
    assert header.startswith("# Python 3.") and ENTRY.sub("", body) == ""
    found: dict[str, str] = {}
    for match in ENTRY.finditer(body):
        assert match[1] not in found
        found[match[1]] = match[2] or match[3].rpartition("/torch-")[2].partition("%2B")[0]
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }


def needs(lines: list[str], environment: dict[str, str]) -> list[Requirement]:
    found = map(Requirement, lines)
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": "", **environment})]


def test_there_is_a_file_for_every_python_and_build() -> None:
    assert {path.stem for path in (ROOT / "locks").iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_versions_are_the_tested_ones_and_within_the_ranges(name: str) -> None:
    locked, tested = packages(name), pins()
    other = EXCEPT_ON_3_13 if name.endswith("313") else set()
    assert {each: version for each, version in locked.items() if tested.get(each, version) != version}.keys() <= other
    for requirement in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["report"]):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not allow the locked {version}"


@pytest.mark.parametrize("python", ["311", "313"])
def test_the_builds_differ_in_torch_and_what_it_needs(python: str) -> None:
    cpu, cuda = packages(f"cpu-py{python}"), packages(f"cuda-py{python}")
    only = set(cuda) - set(cpu)
    assert set(cpu) < set(cuda) and all(cuda[name] == version for name, version in cpu.items())
    assert "triton" in only and all(re.match("nvidia-|cuda-|triton$", name) for name in only), only
    text = (ROOT / "locks" / f"cpu-py{python}.txt").read_text()
    assert f"torch-{cpu['torch']}%2Bcpu-cp{python}-cp{python}-manylinux_2_28_x86_64.whl" in text


def test_nothing_that_a_locked_package_needs_is_missing() -> None:
    """By the metadata of what is installed here, in the locked version and for this Python."""
    locked = packages("cpu-py311")
    environment = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux"}
    looked_at = 0
    for name, version in locked.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version.partition("+")[0] != version:
            continue
        looked_at += 1
        for requirement in needs(installed.requires or [], environment):
            there = locked.get(canonicalize_name(requirement.name))
            assert there is not None, f"{name} needs {requirement}"
            assert requirement.specifier.contains(there, prereleases=True), f"{name} needs {requirement}"
    assert looked_at > len(locked) // 2, "too few of the locked packages are installed here"


def test_of_many_files_those_for_the_platform_are_locked() -> None:
    module: Any = load_script("tools/lock.py")
    wheels = {
        "a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl": "1",
        "a-1-cp39-abi3-manylinux_2_28_x86_64.whl": "2",
        "a-1-py3-none-any.whl": "3",
        "a-1-cp312-cp312-manylinux_2_17_x86_64.whl": "4",
        "a-1-cp311-cp311-musllinux_1_2_x86_64.whl": "5",
        "a-1-cp311-cp311-manylinux_2_34_x86_64.whl": "6",
        "a-1-cp311-cp311-macosx_11_0_arm64.whl": "7",
    }
    package: dict[str, Any] = {
        "wheels": [{"url": f"https://b/{name}", "hashes": {"sha256": value}} for name, value in wheels.items()],
        "sdist": {"hashes": {"sha256": "9"}},
    }
    assert module.hashes_of(package, (3, 11)) == ["1", "2", "3"]
    package["wheels"] = package["wheels"][3:]
    assert module.hashes_of(package, (3, 11)) == ["9"] and module.hashes_of(package, (3, 12)) == ["4"]


def test_torch_for_cpus_is_the_tested_version() -> None:
    module: Any = load_script("tools/lock.py")
    assert set(module.CPU_TORCH) == {pins()["torch"]} and set(module.CPU_TORCH[pins()["torch"]]) == set(module.PYTHONS)
    assert Path(module.LOCKS) == ROOT / "locks"
