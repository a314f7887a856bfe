"""Waiting for what another thread or process does, however slow the machine is."""

import time
from collections.abc import Callable, Collection

from mlra_scale.process_tree import process_state


def eventually(is_so: Callable[[], object], seconds: float = 10.0) -> bool:
    """Waits until something is so; returns whether it is within so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def all_end(pids: Collection[int], seconds: float = 20.0) -> bool:
    """Waits until processes are gone, or wait for a new parent only; a killed one takes a moment to end."""
    return eventually(lambda: all(process_state(pid) in ("", "zombie") for pid in pids), seconds)
