"""Which code runs: the commit, where it is a checkout."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import mlra_scale

ROOT = Path(mlra_scale.__file__).resolve().parents[1]
_SECONDS = 10.0


def commit() -> str | None:
    """Returns the commit of this code, with "+changes" behind it if files differ from it; None outside of git."""
    name = output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if name is None:
        return None
    changes = output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return name.strip() + ("+changes" if changes else "")


def output_of(command: Sequence[str]) -> str | None:
    """Returns what a command prints; None where it is missing, fails or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
