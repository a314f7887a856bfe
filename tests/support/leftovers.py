"""Whether processes have ended that something else has killed."""

import time
from collections.abc import Collection

from mlra_scale.cluster.process_tree import process_state


def all_end(pids: Collection[int], seconds: float = 20.0) -> bool:
    """Waits until processes are gone, or wait for a new parent only; a killed one takes a moment to end.

    Args:
        pids: Their numbers.
        seconds: How long to wait.

    Returns:
        Whether all have ended.
    """
    deadline = time.monotonic() + seconds
    while any(process_state(pid) not in ("", "zombie") for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
