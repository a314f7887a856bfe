"""The sdist and the wheel: what is in them, and the command line from a wheel outside of any checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mlra_scale import __version__
from tests.processes.api.test_alone import ALONE, HIDE, other_dependencies
from tests.support.training_runs import ROOT, environment

WRITTEN_AT_THE_TOP = (".git", ".venv", "build", "data", "dist", "runs", "wandb")
WRITTEN_ANYWHERE = shutil.ignore_patterns("*.egg-info", "__pycache__", ".hypothesis", ".*_cache")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NAME = f"mlra_scale-{__version__}"


def not_copied(folder: str, names: list[str]) -> set[str]:
    """What a clone of the project would not have."""
    at_the_top = {name for name in names if name in WRITTEN_AT_THE_TOP and Path(folder) == ROOT}
    return at_the_top | WRITTEN_ANYWHERE(folder, names)


def build(hook: str, project: Path, output: Path) -> Path:
    """Builds as pip does, by the hooks of pyproject.toml's backend, but with the setuptools of this environment."""
    output.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(output)], cwd=project, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return output / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    # The build writes beside its sources.
    shutil.copytree(ROOT, folder / "copy", ignore=not_copied)
    with tarfile.open(build("build_sdist", folder / "copy", folder / "built")) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """A wheel that is built from the sdist."""
    return build("build_wheel", sdist, sdist.parent / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the wheel is installed, and which sees the libraries of this one.

    If the tests run in an editable installation, that does not reach into it: a module that the wheel lacks is missing.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-index", "--no-deps"]
    # With the project on the path, pip would find it there, and install nothing.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, "--no-compile", str(wheel)], check=True, cwd=folder, env=clean, timeout=200)
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages_of(folder) / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return folder


def packages_of(environment: Path) -> Path:
    """Where an environment has its packages."""
    return next(environment.glob("lib/python*/site-packages"))


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the environment in a folder where no checkout is."""
    variables = environment(PATH=f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}")
    del variables["PYTHONPATH"]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=200)


def tracked(*folders: str) -> set[str]:
    """The project's files in folders, without what Python writes there."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_the_sdist_is_the_project(sdist: Path) -> None:
    files = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    folders = ("benchmarks", "containers", "docs", "ds_configs", "locks", "slurm", "tests", "tools", ".ci")
    wanted = tracked("mlra_scale", *folders)
    wanted |= {path.name for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt", ".yml", ".cff")}
    assert wanted | {"LICENSE", "Makefile", "setup.py"} <= files, wanted - files


def test_the_wheel_has_the_package_and_the_two_folders_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    bundled = {f"mlra_scale/{name}" for name in tracked("slurm", "ds_configs")} - {"mlra_scale/slurm/check.sh"}
    assert names == tracked("mlra_scale") | bundled


def test_the_command_is_that_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import mlra_scale; print(mlra_scale.__file__)")
    assert Path(where.stdout.strip()).parent == packages_of(installed) / "mlra_scale"
    assert run(installed, tmp_path, "mlra-scale", "--version").stdout == f"mlra-scale {__version__}\n"


def test_without_any_dependency_the_package_and_its_files_are_there(installed: Path, tmp_path: Path) -> None:
    """As after `pip install --no-deps`, in a Python that sees no other package."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from mlra_scale.cli.main import main; sys.exit(main())"
    packages = str(packages_of(installed))
    result = run(installed, tmp_path, "python", "-I", "-S", "-c", code, packages, "slurm-files", "here")
    assert result.returncode == 0 and (tmp_path / "here" / "slurm" / "launch.sh").is_file(), result.stderr


def test_with_torch_and_numpy_alone_the_public_face_works(installed: Path, tmp_path: Path) -> None:
    result = run(installed, tmp_path, "python", "-I", "-c", HIDE.format(names=other_dependencies()) + ALONE)
    assert result.returncode == 0 and "TevCallback needs transformers" in result.stdout, result.stderr


def test_slurm_files_are_written_and_make_their_plan(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    result = run(installed, tmp_path, "mlra-scale", "slurm-files", str(folder))
    assert result.returncode == 0, result.stderr
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == tracked("slurm", "ds_configs") - {"slurm/check.sh"}
    assert {str(folder / name) for name in written} == set(result.stdout.splitlines())
    for name in written:
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    plan = run(installed, folder, "bash", "slurm/pretrain_zero3.sh", "--dry-run", "--preset", "gpt2-xl")
    assert plan.returncode == 0 and "Memory per rank" in plan.stdout, plan.stderr


def test_deepspeed_files_are_found_by_name_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    start = ["mlra-scale", "train", "--preset", "laptop", "--dry-run", "parallel.world_size=4"]
    plan = run(installed, tmp_path, *start, "--ds-config", "ds_configs/zero3.json")
    assert plan.returncode == 0 and "ZeRO 3" in plan.stdout, plan.stdout + plan.stderr
    for name in ("ds_configs/zero9.json", "elsewhere/zero3.json", str(tmp_path / "ds_configs" / "zero3.json")):
        refused = run(installed, tmp_path, *start, "--ds-config", name)
        assert refused.returncode == 2 and "cannot be read" in refused.stderr, name
    chosen = run(installed, tmp_path, "mlra-scale", "plan", "--preset", "gpt2-mlra-72l", "--cluster", "h100")
    assert chosen.returncode == 0 and "--ds-config ds_configs/" in chosen.stdout, chosen.stderr


@pytest.mark.slow
def test_a_wheel_prepares_trains_and_exports(installed: Path, tmp_path: Path) -> None:
    prepare = ["prepare", "--source", "python-docs", "--train-bpe", "512", "--output", "text", "--max-bytes", "200e3"]
    tiny = ["model.num_layers=2", "model.hidden_size=32", "train.steps=2", "evaluation.batches=1"]
    train = ["train", "--nproc", "2", "--preset", "debug", "--run-dir", "run", "data.path=text", *tiny]
    for command in (prepare, [*train, "--ds-config", "ds_configs/zero1.json"], ["export", "run", "exported"]):
        result = run(installed, tmp_path, "mlra-scale", *command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "exported" / "model.safetensors").is_file()
