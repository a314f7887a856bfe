"""Signs of life: every rank tells its node each second what it does, over a local datagram socket.

A thread of its own sends them. It stands still with its process (stopped, or kept by native code that never lets go of
the interpreter) and so tells a silent rank from one that waits for others.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

PULSE_VARIABLE = "MLRA_SCALE_PULSE_SOCKET"
_SECONDS_BETWEEN = 1.0
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


@dataclass(frozen=True)
class Beat:
    """What a rank tells.

    Attributes:
        rank: Its global rank.
        local_rank: Its place on the node.
        pid: Its process.
        doing: `starting`, `connecting`, `checking`, `preparing`, `training`, `evaluating`, `saving`,
            `rolling back`, `ending`.
        step: The step that it is at.
        seconds: Since it began what it does.
        place: Where its main thread is: innermost function of this package, and innermost function of all.
    """

    rank: int
    local_rank: int
    pid: int
    doing: str
    step: int
    seconds: float
    place: str


class Pulse:
    """A rank's end; without a socket in the environment it does nothing.

    Args:
        address: The node's socket; None: nobody listens.
        rank: Global rank.
        local_rank: Place on the node.
    """

    def __init__(self, address: str | None, rank: int, local_rank: int) -> None:
        self._address, self._rank, self._local_rank = address, rank, local_rank
        self._doing, self._step, self._since = "starting", 0, time.monotonic()
        self._main_thread = threading.main_thread().ident
        self._socket: socket.socket | None = None
        if address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.settimeout(1.0)
            threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def beat(self, doing: str, step: int | None = None) -> None:
        """Notes what the rank begins, at the same step as before if none is given; the thread tells it."""
        self._doing, self._since = doing, time.monotonic()
        self._step = self._step if step is None else step

    def tell(self, **values: Any) -> None:
        """Tells the node something at once."""
        if self._socket is not None and self._address is not None:
            # A node that does not listen for a second loses some, and one that is gone all: no reason to stop.
            with contextlib.suppress(OSError):
                self._socket.sendto(json.dumps(values).encode("ascii"), self._address)

    def _run(self) -> None:
        while True:
            frame = sys._current_frames().get(self._main_thread or 0)
            beat = Beat(
                self._rank,
                self._local_rank,
                os.getpid(),
                self._doing,
                self._step,
                round(time.monotonic() - self._since, 3),
                _place(frame),
            )
            del frame  # it would keep the main thread's objects alive
            self.tell(beat=asdict(beat))
            time.sleep(_SECONDS_BETWEEN)


class PulseSocket:
    """The node's end: a socket in a private directory.

    Args:
        folder: A short-lived directory on the node's own disk.
    """

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "pulse")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)

    def receive(self) -> list[dict[str, Any]]:
        """Returns all that has come; what is no JSON object is passed over."""
        received: list[dict[str, Any]] = []
        while True:
            try:
                message = json.loads(self._socket.recv(1 << 16))
            except BlockingIOError:
                return received
            except (ValueError, RecursionError):
                continue
            if isinstance(message, dict):
                received.append(message)

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def close(self) -> None:
        """Removes the socket."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)


def _place(frame: FrameType | None) -> str:
    """Says in a few words where a thread is."""
    if frame is None:
        return ""
    innermost = _name(frame)
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(_PACKAGE):
        ours = ours.f_back
    if ours is None or ours is frame:
        return innermost
    return f"{_name(ours)} > {innermost}"


def _name(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
