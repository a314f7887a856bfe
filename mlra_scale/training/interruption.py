"""Signals that end a run: Ctrl-C at once, and the polite ones of a cluster after the step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""They ask for a checkpoint and an end: what clusters send before they take a machine away."""


class Interruption:
    """Raises KeyboardInterrupt on SIGINT, as Python does, and remembers the signals that ask for a stop.

    SIGINT is raised once more at the next step if it went under: native code that asks Python for an attribute may
    throw away whatever exception comes up meanwhile, and a run was seen to train on after its SIGINT.

    A signal may reach one rank only, or each at another step: when to stop is for all ranks together to decide.
    """

    def __init__(self) -> None:
        self._has_come = False
        self._stop: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises KeyboardInterrupt if SIGINT has come; called between steps."""
        if self._has_come:
            raise KeyboardInterrupt

    def is_stop_asked(self) -> bool:
        """Returns whether this rank was asked to stop after the step."""
        return self._stop is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._has_come = True
        raise KeyboardInterrupt

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = signal.Signals(number)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self
        # Where a parent has SIGINT ignored, as shells do for background jobs, it stays so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note_stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
