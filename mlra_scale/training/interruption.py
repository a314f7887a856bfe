"""What reaches a run from outside: signals that request a stop, and the watchdog that supervises a rank.

Each signal saves a checkpoint first; a second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from mlra_scale.training.exit_codes import ExitCode

if TYPE_CHECKING:  # importing an engine imports DeepSpeed
    import torch


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""Sent by clusters before they take a machine away, by a terminal that closes, and by Ctrl-C."""

OFTEN_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Ignored signals of these kinds stay ignored, as a shell's background job and nohup expect; except under torchrun,
whose ranks inherit that they are ignored although torchrun handles them and passes them on."""

_ONE_PRESS_SECONDS = 1.0
"""Two SIGINT within this time are one Ctrl-C that arrived twice: from the terminal, and from a launcher."""
_KILL_SECONDS = 2.0
"""How long the main thread may take to end after a second Ctrl-C."""
_POLL_SECONDS = 0.1

EXPENDABLE_SECONDS = 10.0
"""How long a process with nothing to save may take to end: less than the 30 s of torchrun and Slurm."""


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class _Presses:
    """Counts Ctrl-C; torchrun passes the first one on to its ranks as SIGINT and answers a second one with SIGTERM."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._second_signals = (signal.SIGINT, signal.SIGTERM) if _is_under_torchrun() else (signal.SIGINT,)

    def is_second(self, number: int) -> bool:
        """Counts a signal; returns whether it is the second press."""
        now = time.monotonic()
        if self._first is None:
            self._first = now if number == signal.SIGINT else None
            return False
        return number in self._second_signals and now - self._first > _ONE_PRESS_SECONDS


@dataclass(frozen=True)
class _Limit:
    """How long the process may take to end once a signal requests it, and how it is ended after that time."""

    seconds: float | None
    text: str
    code: int
    since: float = field(default_factory=time.monotonic)


class Interruption:
    """Remembers that a signal requested a stop, and ends the process where it cannot end by itself.

    A signal may reach one rank only, or each rank in another step: all ranks decide together when to stop.

    Python runs a signal handler only between two of its instructions, and so never while a collective or a library
    waits. A thread therefore receives the signals too, through a pipe into which Python's C code writes their numbers.
    It ends the process after a second Ctrl-C and, while there is nothing to save, some time after any first signal
    (see `limit`).

    Only the main thread may set handlers; in any other thread this class does nothing.
    """

    def __init__(self) -> None:
        self._stop: signal.Signals | None = None
        self._presses = _Presses()
        self._previous: dict[int, Any] = {}
        self._wakeup: tuple[int, int] | None = None
        self._limit = _Limit(0.0, "stopped before training began: nothing was written", ExitCode.PREEMPTED)
        self._masks = threading.local()  # of the threads that fork
        self._is_main = os.environ.get("RANK", "0") == "0"

    def is_stop_requested(self) -> bool:
        """Returns whether this rank received a signal that requests a stop."""
        return self._stop is not None

    def limit(self, seconds: float | None, text: str = "", code: int = ExitCode.PREEMPTED) -> None:
        """Sets how long the process may take to end after a signal, or after this call if that is later.

        If it has to be ended, rank 0 prints `text`, and its exit code is `code`. With `seconds` None there is no limit.
        """
        self._limit = _Limit(seconds, text, code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop = self._stop or signal.Signals(number)
        if self._presses.is_second(number):
            raise KeyboardInterrupt

    def _watch(self, receiver: int) -> None:
        """Runs in a thread: sees every signal at once, whatever the main thread waits for."""
        presses, requested_at, kill_at = _Presses(), None, None
        while True:
            ready, _, _ = select.select([receiver], [], [], None if requested_at is None else _POLL_SECONDS)
            numbers = os.read(receiver, 64) if ready else b""
            if ready and not numbers:
                os.close(receiver)
                return
            now, limit = time.monotonic(), self._limit
            for number in numbers:
                if number not in self._previous:
                    continue
                if presses.is_second(number) and kill_at is None:
                    kill_at = now + _KILL_SECONDS
                if requested_at is None:
                    requested_at = now
                    self._acknowledge(signal.Signals(number), limit)
            if kill_at is not None and now >= kill_at:
                self._end(ExitCode.INTERRUPTED, "ended at once by a second Ctrl-C; continue with --resume auto")
            if requested_at is None or limit.seconds is None:
                continue
            if now >= max(requested_at, limit.since) + limit.seconds:
                self._end(limit.code, limit.text)

    def _acknowledge(self, number: signal.Signals, limit: _Limit) -> None:
        if limit.seconds is None:
            again = "; Ctrl-C again ends it at once, without a checkpoint" if number == signal.SIGINT else ""
            self._print(f"{number.name}: the run stops after this step, with a checkpoint{again}")

    def _end(self, code: int, text: str) -> NoReturn:
        if text:
            self._print(text)
        os._exit(code)

    def _print(self, text: str) -> None:
        """Writes past sys.stderr, whose lock the main thread may hold, and never waits for the console."""
        if self._is_main:
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 0.0)[1]:
                    os.write(2, f"{text}\n".encode("ascii", errors="backslashreplace"))

    def _before_fork(self) -> None:
        """Blocks the signals until the child no longer writes them into the pipe of its parent."""
        if self._wakeup is not None:
            self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)

    def _after_fork(self, is_child: bool) -> None:
        if self._wakeup is None:
            return
        if is_child:
            signal.set_wakeup_fd(-1)
            self._restore()
            self._wakeup = None
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def until_exit(self) -> Interruption:
        """Handles signals until the process has ended, for a program's main module.

        At its very end Python gives signals their default effect. A launcher that ends all ranks when one ends would
        then report a rank that is about to exit as killed.
        """
        atexit.register(self._ignore)  # the first to be registered is the last to run
        return self.__enter__()

    def _ignore(self) -> None:
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        for number in STOP_SIGNALS:
            is_ignored = number in OFTEN_IGNORED and signal.getsignal(number) is signal.SIG_IGN
            if not is_ignored or _is_under_torchrun():
                self._previous[number] = signal.getsignal(number)
        self._wakeup = (sender, signal.set_wakeup_fd(sender, warn_on_full_buffer=False))
        for handled in self._previous:
            signal.signal(handled, self._handle)
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=partial(self._after_fork, is_child=False),
            after_in_child=partial(self._after_fork, is_child=True),
        )
        threading.Thread(target=self._watch, args=(receiver,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._wakeup is None:
            return
        sender, before = self._wakeup
        self._wakeup = None
        self._restore()
        signal.set_wakeup_fd(before)
        os.close(sender)  # which ends the thread


class Watchdog:
    """Does nothing. A cluster job passes a subclass to `train.main`."""

    lock_seconds = 2.0
    """How long to wait for another run that still holds the lock of the run directory."""
    node = socket.gethostname()
    """The name of this node."""

    def heartbeat(self, phase: str, step: int) -> None:
        """Reports the present step and what the rank does from now on (such as `training`); called often: be cheap."""

    def check(self, device: torch.device) -> None:
        """Checks all ranks together, once, as soon as they can communicate; collective."""

    def exclude(self, node: str, reason: str) -> bool:
        """Called on all ranks when a node has computed wrong.

        Returns:
            Whether the ranks are to end, since they will be started again without it; the same on all ranks.
        """
        return False
