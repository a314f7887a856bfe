"""The connection between a job and its nodes: JSON objects, one per line, over TCP.

Its end is news too: a node whose connection breaks has died. A secret, made anew for every attempt and handed down in
the environment, keeps other users of the cluster out.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any

TOKEN_VARIABLE = "MLRA_SCALE_JOB_TOKEN"
_LONGEST_LINE = 1 << 24
_LAST_WORDS_SECONDS = 5.0

Message = dict[str, Any]


@dataclass(frozen=True)
class Heard:
    """Something from a node.

    Attributes:
        node: Its name.
        message: What it said; None: the connection has ended.
    """

    node: str
    message: Message | None


class _Lines:
    """A socket, read as lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def read(self) -> list[Message] | None:
        """Returns what is there without waiting for more; None at the end of the connection."""
        try:
            received = self.connection.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not received:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            return None
        try:
            messages = [json.loads(line) for line in lines if line]
        except (ValueError, RecursionError):
            return None  # none of ours
        return messages if all(isinstance(message, dict) for message in messages) else None

    def write(self, message: Message) -> None:
        self.connection.settimeout(10.0)
        try:
            self.connection.sendall(json.dumps(message).encode("ascii") + b"\n")
        finally:
            self.connection.settimeout(0.0)


class Hub:
    """The job's end: listens on a free port and hears all nodes; for one thread."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._server = socket.create_server(("", 0), backlog=1024)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._strangers: dict[socket.socket, _Lines] = {}
        self._nodes: dict[str, _Lines] = {}

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.getsockname()[1])

    def poll(self, seconds: float) -> list[Heard]:
        """Waits until something is heard, at most so long, and returns it in order."""
        heard: list[Heard] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
            else:
                heard += self._read(key.fileobj)  # type: ignore[arg-type]
        return heard

    def send(self, message: Message) -> None:
        """Tells all nodes; one that cannot be told is heard to end."""
        for lines in list(self._nodes.values()):
            with contextlib.suppress(OSError):
                lines.write(message)

    def close(self) -> None:
        """Ends all connections."""
        for lines in [*self._strangers.values(), *self._nodes.values()]:
            lines.connection.close()
        self._selector.close()
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._strangers[connection] = _Lines(connection)
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> list[Heard]:
        name = next((name for name, lines in self._nodes.items() if lines.connection is connection), None)
        lines = self._strangers[connection] if name is None else self._nodes[name]
        messages = lines.read()
        heard: list[Heard] = []
        if messages and name is None:
            greeting = messages[0]
            name = str(greeting.get("node"))
            token = str(greeting.get("token")).encode()
            if not hmac.compare_digest(token, self._token.encode()) or name in self._nodes:
                name, messages = None, None
            else:
                del greeting["token"]
                self._nodes[name] = self._strangers.pop(connection)
        if name is not None:
            heard += [Heard(name, message) for message in messages or ()]
        if messages is None:
            self._selector.unregister(connection)
            connection.close()
            self._strangers.pop(connection, None)
            if name is not None:
                del self._nodes[name]
                heard.append(Heard(name, None))
        return heard


class Link:
    """A node's end; for one thread.

    Args:
        host: Where the job is.
        port: Of its hub.
        greeting: The first message; it holds `node` and `token`.
        patience: Seconds to keep trying to connect.

    Raises:
        OSError: The job cannot be reached.
    """

    def __init__(self, host: str, port: int, greeting: Message, patience: float = 30.0) -> None:
        deadline = time.monotonic() + patience
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=10.0)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        # Small messages must not wait for the answer to the one before.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = _Lines(connection)
        self._lines.write(greeting)
        self.is_open = True

    def send(self, message: Message) -> None:
        """Tells the job; what it does not hear any more is forgotten."""
        try:
            self._lines.write(message)
        except OSError:
            self.is_open = False

    def receive(self) -> list[Message]:
        """Returns what the job has said since the last call."""
        messages = self._lines.read() if self.is_open else None
        if messages is None:
            self.is_open = False
        return messages or []

    def close(self) -> None:
        """Ends the connection, after all that was said has been heard.

        A socket that is closed with unread orders in it would throw away what is still on its way.
        """
        self.is_open = False
        connection = self._lines.connection
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(_LAST_WORDS_SECONDS)
            while connection.recv(1 << 16):
                continue
        connection.close()

    def fileno(self) -> int:
        """For selectors."""
        return self._lines.connection.fileno()
