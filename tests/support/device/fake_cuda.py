"""Compiles and loads a CUDA device that is not there: FakeTensors on `cuda` in a build of torch for CPUs.

Imports no torch: torch looks once for the device, when it is imported.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
CACHE = Path(__file__).resolve().parents[3] / ".pytest_cache" / "fake_cuda"
FLAGS = ("-O1", "-shared", "-fPIC", "-std=c++20", "-w")


def missing() -> str | None:
    """Returns what this machine lacks for a trace, as the reason of a skipped test; None: nothing."""
    compiler = _compiler()
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler: {compiler} is not there"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "needs a build of torch for CPUs: this one has a CUDA of its own"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def compiled_library() -> Path:
    """Returns the compiled library; compiles it (seconds) where the cache does not have it for this torch."""
    about = f"{metadata.version('torch')} {_compiler()} {FLAGS}"
    key = hashlib.sha256(about.encode() + SOURCE.read_bytes()).hexdigest()[:20]
    compiled = CACHE / f"{key}.so"
    if not compiled.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = compiled.with_suffix(f".{os.getpid()}")
        torch = _torch()
        folders = (torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include")
        command = [_compiler(), *FLAGS, str(SOURCE), "-o", str(partial), *(f"-I{folder}" for folder in folders)]
        subprocess.run([*command, f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
        partial.replace(compiled)  # several processes may compile at once
    return compiled


def load() -> None:
    """Makes `cuda` a device of this process; before torch is imported."""
    assert "torch" not in sys.modules, "torch has looked for its devices already"
    compiled = compiled_library()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(compiled), mode=ctypes.RTLD_GLOBAL)
