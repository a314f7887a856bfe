"""Signals that ask a run to stop: each of them saves first, and a second Ctrl-C ends the process at once."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NoReturn

from mlra_scale.training.exit_codes import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""They ask for a checkpoint and an end: what clusters send before they take a machine away, what a terminal sends when
it closes, and Ctrl-C."""

OFTEN_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""A parent that has these ignored (a shell's background job, nohup) wants them to stay so. Under torchrun they do not:
torchrun inherits and hands on that they are ignored, listens to them all the same, and passes them on."""

_ONE_PRESS_SECONDS = 1.0
"""Two SIGINT within this time are one Ctrl-C that came twice: from the terminal, and from a launcher."""

_KILL_SECONDS = 2.0
"""How long a process may take to end after a second Ctrl-C; then it is ended, wherever it is."""

_POLL_SECONDS = 0.1

EXPENDABLE_SECONDS = 10.0
"""How long a process with nothing to save may take to end in good order: less than the 30 s of torchrun and Slurm."""


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class _Presses:
    """Counts Ctrl-C.

    torchrun starts its ranks in sessions of their own, passes the first Ctrl-C on as SIGINT, and then ends its ranks
    with SIGTERM when a second one comes: that SIGTERM is the second press here.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._seconds = (signal.SIGINT, signal.SIGTERM) if _is_under_torchrun() else (signal.SIGINT,)

    def is_second(self, number: int) -> bool:
        """Takes a signal; returns whether it is the second press."""
        now = time.monotonic()
        if self._first is None:
            self._first = now if number == signal.SIGINT else None
            return False
        return number in self._seconds and now - self._first > _ONE_PRESS_SECONDS


@dataclass(frozen=True)
class _Limit:
    """How long this process may take to end once it was asked to, and how it ends when the time is over."""

    seconds: float | None
    text: str
    code: int
    since: float = field(default_factory=time.monotonic)


class Interruption:
    """Remembers that a signal asked for a stop, and ends the process where it cannot end by itself.

    A signal may reach one rank only, or each at another step: when to stop is for all ranks together to decide.

    Python runs a handler only between two of its instructions: never, while a collective or a library waits. A thread
    therefore gets the signals too, by the descriptor that Python's C code writes their numbers to. It ends the process
    after a second Ctrl-C, and after any first signal where there is nothing to save: before training, as `limit` says.

    Only the main thread may set handlers; in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self._stop: signal.Signals | None = None
        self._presses = _Presses()
        self._before: dict[int, Any] = {}
        self._wakeup: tuple[int, int, int] | None = None
        self._limit = _Limit(0.0, "stopped before training began: nothing was written", ExitCode.PREEMPTED)
        self._masks = threading.local()  # of the threads that fork
        self._is_main = os.environ.get("RANK", "0") == "0"

    def is_stop_asked(self) -> bool:
        """Returns whether this rank was asked to stop."""
        return self._stop is not None

    def limit(self, seconds: float | None, text: str = "", code: int = ExitCode.PREEMPTED) -> None:
        """Says how long the process may take to end from now on, once a signal has asked for it.

        Args:
            seconds: From the signal or from this call, whichever is later; None: as long as it needs.
            text: What rank 0 says if the process has to be ended.
            code: Its exit code then.
        """
        self._limit = _Limit(seconds, text, code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler: of the first signal it only takes a note."""
        self._stop = self._stop or signal.Signals(number)
        if self._presses.is_second(number):
            raise KeyboardInterrupt

    def _watch(self, receiver: int) -> None:
        """Runs in a thread: sees every signal at once, whatever the main thread waits for."""
        presses, asked_at, kill_at = _Presses(), None, None
        while True:
            ready, _, _ = select.select([receiver], [], [], None if asked_at is None else _POLL_SECONDS)
            numbers = os.read(receiver, 64) if ready else b""
            if ready and not numbers:
                os.close(receiver)
                return
            now, limit = time.monotonic(), self._limit
            for number in numbers:
                if number not in self._before:
                    continue
                if presses.is_second(number) and kill_at is None:
                    kill_at = now + _KILL_SECONDS
                if asked_at is None:
                    asked_at = now
                    self._acknowledge(signal.Signals(number), limit)
            if kill_at is not None and now >= kill_at:
                self._end(ExitCode.INTERRUPTED, "ended at once by a second Ctrl-C; continue with --resume auto")
            if asked_at is None or limit.seconds is None:
                continue
            if now >= max(asked_at, limit.since) + limit.seconds:
                self._end(limit.code, limit.text)

    def _acknowledge(self, number: signal.Signals, limit: _Limit) -> None:
        if limit.seconds is None:
            again = "; Ctrl-C again ends it at once, without a checkpoint" if number == signal.SIGINT else ""
            self._say(f"{number.name}: the run stops after this step, with a checkpoint{again}")

    def _end(self, code: int, text: str) -> NoReturn:
        if text:
            self._say(text)
        os._exit(code)

    def _say(self, text: str) -> None:
        """Writes past sys.stderr, whose lock the main thread may hold; a console that takes nothing is passed over."""
        if self._is_main:
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 0.0)[1]:
                    os.write(2, f"{text}\n".encode("ascii", errors="backslashreplace"))

    def _before_fork(self) -> None:
        """A child must not write its signals into the pipe that it shares with its parent, not even at first."""
        if self._wakeup is not None:
            self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)

    def _after_fork(self, is_child: bool) -> None:
        if self._wakeup is None:
            return
        if is_child:
            signal.set_wakeup_fd(-1)
            self._restore()
            self._wakeup = None
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def until_exit(self) -> Interruption:
        """Listens until the process has ended, for the module that is the process's main one.

        A launcher ends all ranks when one ends. Python's own last act is to give signals their default effect: a rank
        would then be reported as killed, instead of with the code that says why it ended.
        """
        atexit.register(self._ignore)  # the first to be registered is the last to run
        return self.__enter__()

    def _ignore(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        for number in STOP_SIGNALS:
            is_ignored = number in OFTEN_IGNORED and signal.getsignal(number) is signal.SIG_IGN
            if is_ignored and not _is_under_torchrun():
                continue
            self._before[number] = signal.getsignal(number)
        self._wakeup = (receiver, sender, signal.set_wakeup_fd(sender, warn_on_full_buffer=False))
        for handled in self._before:
            signal.signal(handled, self._note)
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=partial(self._after_fork, is_child=False),
            after_in_child=partial(self._after_fork, is_child=True),
        )
        threading.Thread(target=self._watch, args=(receiver,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._wakeup is None:
            return
        _, sender, before = self._wakeup
        self._wakeup = None
        self._restore()
        signal.set_wakeup_fd(before)
        os.close(sender)  # which ends the thread
