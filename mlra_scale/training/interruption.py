"""Ctrl-C that is not lost on its way through a library."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Raises KeyboardInterrupt on SIGINT, as Python does, and once more at the next step if that went under.

    Native code that asks Python for an attribute may throw away whatever exception comes up meanwhile: a run was seen
    to train on after its SIGINT.
    """

    def __init__(self) -> None:
        self._has_come = False
        self._before: Any = None

    def check(self) -> None:
        """Raises KeyboardInterrupt if SIGINT has come; called between steps."""
        if self._has_come:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._has_come = True
        raise KeyboardInterrupt

    def __enter__(self) -> Interruption:
        # Where a parent has SIGINT ignored, as shells do for background jobs, it stays so.
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_default and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
