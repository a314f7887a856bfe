"""Unit tests start no process: what does, fails here."""

import multiprocessing.process
import multiprocessing.util
import os
import subprocess
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

STARTERS: list[tuple[Any, str]] = [
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    (multiprocessing.util, "spawnv_passfds"),
    *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")),
]
"""Everything in Python's library that starts a process goes through one of these."""


@pytest.fixture(autouse=True, scope="session")
def found_fonts() -> None:
    """matplotlib looks for fonts when it is imported for the first time on a machine, by a process."""
    import matplotlib.font_manager  # noqa: F401


@pytest.fixture(autouse=True)
def refused_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuses to start a process, and fails the test also where its code has caught the refusal.

    Yields:
        What was refused; a test that clears it has expected that.
    """
    started: list[str] = []

    def refuse(owner: Any, name: str) -> Any:
        def start(*arguments: Any, **settings: Any) -> NoReturn:
            # A method gets its object first, which is not whole yet.
            shown = arguments[1:] if isinstance(owner, type) else arguments
            started.append(f"{owner.__name__}.{name}{shown!r}")
            raise AssertionError(f"a unit test starts a process: {started[-1]}; move it to tests/processes")

        return start

    for owner, name in STARTERS:
        monkeypatch.setattr(owner, name, refuse(owner, name))
    yield started
    assert not started, f"a unit test started {started}; move it to tests/processes"
