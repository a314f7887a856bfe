"""Makes the virtual environment of the Makefile's targets; needs nothing but Python's standard library.

    python3 tools/install.py [--venv .venv] [--torch auto] [--extra dev]

A file in the environment records what was installed, so that a second call ends at once and a call after
pyproject.toml or constraints.txt changed installs again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SHOW_TORCH = """
import importlib.util, json, pathlib, runpy
version = runpy.run_path(str(pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
print(json.dumps({"version": str(version["__version__"]), "cuda": version["cuda"]}))
"""


def main() -> None:
    """Parses the command line, checks this Python and installs what is not there yet."""
    parser = argparse.ArgumentParser(description="Make the virtual environment of the Makefile's targets.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="where to make it (default: %(default)s)")
    parser.add_argument("--torch", default="auto", help="auto, cpu, cuda, or any arguments of pip install")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml, such as dev")
    arguments = parser.parse_args()
    check_python()
    install(arguments.venv.absolute(), arguments.torch, set(arguments.extra))


def check_python() -> None:
    """Ends with what to do where this Python is too old or cannot make environments."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what tells users of an older Python
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"{sys.executable} is Python {version}; 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(f"{sys.executable} has no venv module; on Debian and Ubuntu: apt-get install python3-venv")


def install(venv: Path, torch: str, extras: set[str]) -> None:
    """Makes the environment and installs torch, then the package; does nothing where that has been done.

    Args:
        venv: The environment's folder.
        torch: "cpu", "cuda", arguments for pip, or "auto": what is there, else the CUDA build if there is a GPU.
        extras: Extras of pyproject.toml; those of earlier calls stay.
    """
    stamp = venv / "installed.json"
    done = json.loads(stamp.read_text()) if stamp.exists() else {"torch": None, "extras": [], "digest": None}
    if torch == "auto":
        torch = done["torch"] or ("cuda" if has_nvidia_gpu() else "cpu")
    extras |= set(done["extras"])
    wanted = {"torch": torch, "extras": sorted(extras), "digest": digest_of(ROOT / "pyproject.toml", CONSTRAINTS)}
    if wanted == done:
        return
    start = time.monotonic()
    python = venv / "bin" / "python"
    if not stamp.exists():
        # Also where an earlier call was interrupted half-way: making it again does no harm.
        run_step(f"virtual environment {os.path.relpath(venv)}", [sys.executable, "-m", "venv", str(venv)])
    # Byte code is left to the first import, which needs a small part of all modules.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    if (torch, wanted["digest"]) != (done["torch"], done["digest"]):
        # Torch goes first: its build is chosen here, and no other package pulls in another one.
        if torch != done["torch"] and not fits(there := torch_build(python), torch):
            # For pip one build is as good as the other. From here on nothing is promised of what the record tells.
            if stamp.exists():
                stamp.write_text(json.dumps(done | {"torch": None}))
            run_step(f"{there}", [*pip[:3], "uninstall", "--quiet", "--yes", "torch"], "removing")
        run_step(f"torch ({torch})", [*pip, *torch_arguments(torch)])
        check_build(torch_build(python), torch)
    package = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
    constraints = write_constraints(venv, torch)
    run_step("packages", [*pip, "--use-pep517", "--constraint", str(constraints), "--editable", package])
    stamp.write_text(json.dumps(wanted))
    print(f"installation: {time.monotonic() - start:.0f} s", flush=True)


def has_nvidia_gpu() -> bool:
    """True where nvidia-smi runs and names a GPU."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and b"GPU" in listing.stdout


def torch_arguments(torch: str) -> list[str]:
    """The arguments of pip for this choice of torch.

    PyPI's torch for Linux is the CUDA build. The CPU build has an index of its own; where that cannot be reached, pip's
    own sources are all there is, which serves machines whose pip is set up with a mirror or a folder of wheels.
    """
    if torch not in ("cpu", "cuda"):
        return shlex.split(torch)
    arguments = ["torch", "--constraint", str(CONSTRAINTS)]
    if torch == "cuda":
        return arguments
    try:
        # Asked with a short limit: pip itself would try again and again for minutes.
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=3).close()
    except OSError as error:
        print(f"{CPU_INDEX} is out of reach ({error}): torch comes from where pip looks by default", flush=True)
        return arguments
    return [*arguments, "--extra-index-url", CPU_INDEX]


class TorchBuild(NamedTuple):
    """An installed torch; cuda is the version of CUDA that it was built for, None without."""

    version: str
    cuda: str | None

    def __str__(self) -> str:
        return f"torch {self.version} " + (f"for CUDA {self.cuda}" if self.cuda else "without CUDA")


def torch_build(python: Path) -> TorchBuild | None:
    """The torch of an environment, or None. It is not imported, which would take seconds."""
    result = subprocess.run([str(python), "-c", SHOW_TORCH], capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        # A folder without its version file is what an interrupted pip leaves.
        return None
    return TorchBuild(**json.loads(result.stdout))


def fits(build: TorchBuild | None, torch: str) -> bool:
    """True where pip may be left to itself: nothing is there, or the build that was chosen."""
    return build is None or (torch in ("cpu", "cuda") and (build.cuda is not None) == (torch == "cuda"))


def check_build(build: TorchBuild | None, torch: str) -> None:
    """Says which torch was got; ends where a GPU was to be used and this torch cannot."""
    if build is None:
        sys.exit(f"pip ended well, but there is no torch; TORCH={torch!r} must name it")
    if torch == "cuda" and build.cuda is None:
        sys.exit(
            f"a build for CUDA was wanted, but pip's sources gave {build}: name one, as in make "
            'TORCH="torch --index-url https://download.pytorch.org/whl/cu130", or take TORCH=cpu'
        )
    larger = "; it runs on CPUs too, and is only larger than the CPU build" if torch == "cpu" and build.cuda else ""
    print(f"  {build}{larger}", flush=True)


def write_constraints(venv: Path, torch: str) -> Path:
    """The constraints file for the other packages: without torch where the user chose its version."""
    if torch in ("cpu", "cuda"):
        return CONSTRAINTS
    path = venv / "constraints.txt"
    lines = CONSTRAINTS.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("torch==")))
    return path


def digest_of(*paths: Path) -> str:
    """Checksum over the contents of files."""
    checksum = hashlib.sha256()
    for path in paths:
        checksum.update(path.read_bytes())
    return checksum.hexdigest()


def run_step(what: str, command: list[str], verb: str = "installing") -> None:
    """Runs one command and prints what it took; ends with its exit code if it fails."""
    print(f"{verb} {what} ...", flush=True)
    start = time.monotonic()
    result = subprocess.run(command, cwd=ROOT)
    if result.returncode != 0:
        print(f"{verb} {what} failed: {shlex.join(command)}", file=sys.stderr)
        sys.exit(result.returncode)
    print(f"  {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
