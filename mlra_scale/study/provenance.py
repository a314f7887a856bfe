"""Where a study ran: study.json, beside its results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlra_scale
from mlra_scale.config import ConfigError, Problem
from mlra_scale.config.json_text import read_json_object
from mlra_scale.files import write_atomically
from mlra_scale.training.record import commit, output_of

_LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy")
_GIB = 2.0**30
VERSION = 2
"""Version of a sweep's output folder: study.json, results.jsonl, result.json; the first version had no such key."""


def gpu_names() -> list[str]:
    """Returns the names of the machine's NVIDIA GPUs."""
    listed = output_of(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]) or ""
    return [line.strip() for line in listed.splitlines() if line.strip()]


def hardware() -> dict[str, Any]:
    """Returns a description of this machine."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "gpus": gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of the libraries that compute."""
    found = {"python": platform.python_version(), "mlra-scale": mlra_scale.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def note_start(path: Path, name: str, command: Sequence[str]) -> None:
    """Writes study.json, with the command line, at the start of a sweep; `started` of an earlier start stays.

    Raises:
        ConfigError: The file is damaged, or of a newer version.
    """
    started = _now()
    if path.exists():
        try:
            about = read_json_object(path)
            started, version = str(about["started"]), about.get("version", 1)
        except (ValueError, KeyError) as error:
            reason = str(error) if isinstance(error, ValueError) else "it lacks `started`"
            remedy = f"{reason}; remove the file, which only records where the study ran"
            raise ConfigError([Problem("--output", str(path), remedy)]) from None
        if version not in range(1, VERSION + 1):
            remedy = f"it has version {version!r}; this program reads versions 1 to {VERSION}: use a newer program"
            raise ConfigError([Problem("--output", str(path), remedy)])
    about = {"version": VERSION, "name": name, "commit": commit(), "command": list(command), "hardware": hardware()}
    about |= {"versions": versions(), "started": started, "ended": None}
    write_atomically(path, json.dumps(about, indent=1) + "\n")


def note_end(path: Path) -> None:
    """Writes the time at which every cell had a result into study.json, if it has none yet."""
    try:
        about = read_json_object(path)
    except ValueError:
        return  # missing, or damaged since the start, which checked it
    if about.get("ended", "") is None:
        write_atomically(path, json.dumps({**about, "ended": _now()}, indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
