"""The project's own programs: make, .ci/run, and what the installer reads of an environment."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_project import ROOT, load_script


def test_the_build_of_torch_is_read_without_importing_it(tmp_path: Path) -> None:
    import torch

    module: Any = load_script("tools/install.py")
    build = module.torch_build(Path(sys.executable))
    assert (build.version, build.cuda) == (str(torch.__version__), torch.version.cuda)
    venv.create(tmp_path / "empty", with_pip=False)
    assert module.torch_build(tmp_path / "empty" / "bin" / "python") is None


def test_make_without_a_target_explains_itself() -> None:
    result = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, timeout=60, check=True)
    for target in ("quickstart", "test", "lint", "bench", "docs", "locks", "clean"):
        assert f"make {target}" in result.stdout


@pytest.mark.parametrize("has_compiler", [True, False])
@pytest.mark.parametrize("packages", ["root with apt-get", "no root", "no apt-get"])
def test_ci_installs_only_what_is_missing(tmp_path: Path, has_compiler: bool, packages: str) -> None:
    programs = {"make": "echo make $1", "id": f"echo {1000 if packages == 'no root' else 0}"}
    programs |= dict.fromkeys(("munged", "slurmctld", "slurmd", "sbatch", "shellcheck", "chromium"), "")
    if has_compiler:
        programs["c++"] = ""
    if packages != "no apt-get":
        programs["apt-get"] = 'echo apt-get "$1" "${@: -1}"'
    programs["python"] = 'echo "$@"'
    # A Python that has all: whether this one has its headers is not the question here.
    programs["python3"] = "exit 0"
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").symlink_to(tmp_path)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    result = subprocess.run(
        [shutil.which("bash") or "", ROOT / ".ci" / "run"],
        env={"PATH": str(tmp_path), "VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    wanted = ["make lint", "make docs", "make test", ".ci/check_skips.py build/tests.xml"]
    installed = ["apt-get update -qq", "apt-get install g++"] if packages == "root with apt-get" else []
    assert result.stdout.splitlines() == ([] if has_compiler else installed) + wanted
    told = ".ci/run: this machine may lack what these Debian packages give: g++\n"
    assert result.stderr == ("" if has_compiler or installed else told)
