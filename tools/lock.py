"""Writes the lock files of locks/ anew; needs uv, packaging and PyPI (the extra `locks`).

    python tools/lock.py

A lock file has every package of an installation with the extra `report` on x86-64 Linux (glibc 2.28 or newer), in the
version of constraints.txt, with the SHA-256 of the files that pip may take. It is installed by
`pip install --require-hashes --no-deps -r FILE`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
PYTHONS = ((3, 11), (3, 13))
ONLY_ON_3_11 = ("megatron-core",)
"""Pins of constraints.txt that another Python leaves: newer releases need Python 3.12."""
FOR_CUDA = ("nvidia-", "cuda-", "triton")
"""Beginnings of the packages that only torch's CUDA build needs."""
CPU_TORCH = {
    "2.13.0": {
        (3, 11): "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        (3, 13): "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
    }
}
"""SHA-256 of torch's CPU builds by version: links of https://download.pytorch.org/whl/cpu/torch/ have them."""
_CPU_URL = "https://download.pytorch.org/whl/cpu/torch-{version}%2Bcpu-{tag}-{tag}-manylinux_2_28_x86_64.whl"
_OLDER = (f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1))
PLATFORMS = (*_OLDER, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")


def main() -> None:
    """Writes all lock files."""
    LOCKS.mkdir(exist_ok=True)
    for python in PYTHONS:
        packages = resolve(python)
        for build in ("cpu", "cuda"):
            name = f"{build}-py{python[0]}{python[1]}.txt"
            (LOCKS / name).write_text("\n".join(lines_of(packages, python, build)) + "\n", encoding="ascii")
            print(f"locks/{name}")


def resolve(python: tuple[int, int]) -> list[dict[str, Any]]:
    """Returns all packages as pylock.toml has them (PEP 751), with torch's CUDA build."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [pin for pin in pins if python == PYTHONS[0] or not pin.startswith(ONLY_ON_3_11)]
    with tempfile.TemporaryDirectory() as folder:
        constraints, output = Path(folder, "constraints.txt"), Path(folder, "pylock.toml")
        constraints.write_text("\n".join(kept) + "\n")
        command = ["uv", "pip", "compile", "--quiet", "--no-header", "--format", "pylock.toml", "--output-file", output]
        command += ["--python-version", ".".join(map(str, python)), "--python-platform", "x86_64-manylinux_2_28"]
        command += ["--constraint", constraints, "--extra", "report", ROOT / "pyproject.toml"]
        if (code := subprocess.run([*map(str, command)], check=False).returncode) != 0:
            sys.exit(code)
        return tomllib.loads(output.read_text())["packages"]


def lines_of(packages: list[dict[str, Any]], python: tuple[int, int], build: str) -> Iterator[str]:
    """Yields the lines of a lock file."""
    yield f"# Python {python[0]}.{python[1]}, x86-64 Linux, torch for {build}; written by tools/lock.py"
    for package in packages:
        name, version = package["name"], package["version"]
        if build == "cpu" and name.startswith(FOR_CUDA):
            continue
        if build == "cpu" and name == "torch":
            tag = f"cp{python[0]}{python[1]}"
            yield f"torch @ {_CPU_URL.format(version=version, tag=tag)} \\"
            yield f"    --hash=sha256:{CPU_TORCH[version][python]}"
            continue
        yield f"{name}=={version} \\"
        yield " \\\n".join(f"    --hash=sha256:{sha256}" for sha256 in hashes_of(package, python))


def hashes_of(package: dict[str, Any], python: tuple[int, int]) -> list[str]:
    """Returns the checksums of the wheels for this Python and platform, or of the sources where there is none."""
    supported = tags_of(python)
    fitting = [
        wheel["hashes"]["sha256"]
        for wheel in package.get("wheels", ())
        if not supported.isdisjoint(parse_wheel_filename(wheel["url"].rpartition("/")[2].replace("%2B", "+"))[3])
    ]
    return sorted(fitting) or [package["sdist"]["hashes"]["sha256"]]


def tags_of(python: tuple[int, int]) -> set[Tag]:
    """Returns the tags of the wheels that this Python can install."""
    own = cpython_tags(python, platforms=PLATFORMS)
    return {*own, *compatible_tags(python, f"cp{python[0]}{python[1]}", PLATFORMS)}


if __name__ == "__main__":
    main()
