"""Heartbeats: a thread of every rank sends its node each second what the rank does, over a local datagram socket.

The thread stands still with its process (stopped, or kept by native code that does not release the interpreter). This
tells a silent rank from one that waits for others.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

_SECONDS_BETWEEN = 1.0
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group of a sender, as the kernel adds them to a message."""
_PACKAGE = str(Path(__file__).parents[2]) + os.sep


class HeartbeatSender:
    """Sends the heartbeats of a rank, with its global and local number, to the socket of the node's agent."""

    def __init__(self, address: str, rank: int, local_rank: int) -> None:
        self._address, self._rank, self._local_rank = f"\0{address}", rank, local_rank
        self._phase, self._step, self._since = "starting", 0, time.monotonic()
        self._main_thread = threading.main_thread().ident
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(1.0)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def begin(self, phase: str, step: int | None = None) -> None:
        """Notes the phase that the rank begins, at the same step as before if none is given; the thread sends it."""
        self._phase, self._since = phase, time.monotonic()
        self._step = self._step if step is None else step

    def send(self, **values: Any) -> None:
        """Sends the node a message (messages.RankMessage) at once."""
        # A node that does not read for a second loses some messages, and an ended one all; the rank continues.
        with contextlib.suppress(OSError):
            self._socket.sendto(json.dumps(values).encode("ascii"), self._address)

    def _run(self) -> None:
        while True:
            frame = sys._current_frames().get(self._main_thread or 0)
            self.send(
                heartbeat={
                    "rank": self._rank,
                    "local_rank": self._local_rank,
                    "pid": os.getpid(),
                    "phase": self._phase,
                    "step": self._step,
                    "seconds": round(time.monotonic() - self._since, 3),
                    "location": _location(frame),
                }
            )
            del frame  # it would keep the main thread's objects alive
            time.sleep(_SECONDS_BETWEEN)


class HeartbeatSocket:
    """The node's end: a socket without a file (Linux), which needs no room on a disk. It ignores other users."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # to a name that the kernel chooses; it begins with a null byte
        self._socket.setblocking(False)
        self.address: str = self._socket.getsockname()[1:].decode()

    def receive(self) -> list[dict[str, Any]]:
        """Returns all messages that have arrived; what is no JSON object is ignored."""
        received: list[dict[str, Any]] = []
        while True:
            try:
                content, credentials, _, _ = self._socket.recvmsg(1 << 16, socket.CMSG_SPACE(_CREDENTIALS.size))
                message = json.loads(content)
            except BlockingIOError:
                return received
            except (ValueError, RecursionError):
                continue
            (_, uid, _) = _CREDENTIALS.unpack(credentials[0][2])
            if isinstance(message, dict) and uid == os.getuid():
                received.append(message)

    def close(self) -> None:
        """Removes the socket."""
        self._socket.close()


def _location(frame: FrameType | None) -> str:
    """Returns in a few words where a thread is: innermost function of this package, and innermost function of all."""
    if frame is None:
        return ""
    innermost = _name(frame)
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(_PACKAGE):
        ours = ours.f_back
    return innermost if ours is None or ours is frame else f"{_name(ours)} > {innermost}"


def _name(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
