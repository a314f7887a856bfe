"""Is the Hugging Face hub within reach? Asked before its libraries are, which retry for most of a minute, aloud."""

from __future__ import annotations

import queue
import threading

_SECONDS = 6.0


def is_offline() -> bool:
    """Returns whether HF_HUB_OFFLINE is set: what is in the hub's cache is read, and nothing else."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def unreachable_hub() -> str | None:
    """Returns the hub's address where it does not answer; None also with HF_HUB_OFFLINE, which needs no hub."""
    from huggingface_hub import constants

    if is_offline():
        return None
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    # In a thread, because no time limit of a connection covers the look-up of the host's name.
    threading.Thread(target=_ask, args=(constants.ENDPOINT, answers), daemon=True).start()
    try:
        return None if answers.get(timeout=_SECONDS) else constants.ENDPOINT
    except queue.Empty:
        return constants.ENDPOINT


def _ask(address: str, answers: queue.SimpleQueue[bool]) -> None:
    import huggingface_hub

    try:
        # The library's own session, so that proxies and certificates are those of the requests to come.
        huggingface_hub.get_session().head(address, timeout=_SECONDS)
    except Exception:  # kinds of the library's network stack; whatever they say, nothing can be loaded from there
        answers.put(False)
    else:
        answers.put(True)
