"""The connection between a job and its nodes: JSON objects, one per line, over TCP.

Its end is news too: a node whose connection breaks has died. A secret, made anew for every attempt and handed down in
the environment, keeps other users of the cluster out. Whoever has not shown it is a stranger: few of them at a time are
listened to, for a short time and to one short line, and any fault of theirs ends their connection and nothing else.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TOKEN_VARIABLE = "MLRA_SCALE_JOB_TOKEN"
_LONGEST_LINE = 1 << 20
"""Bytes of a member's line: a node with many ranks reports some hundred bytes of each."""
_LONGEST_GREETING = 1 << 14
_MAX_STRANGERS = 32
"""Connections without a greeting at a time, beside one from each machine: many nodes may connect in one moment."""
_STRANGER_SECONDS = 20.0
"""How long a connection may take to send its greeting."""
_ACCEPTED_AT_ONCE = 64
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
    """A socket, read as lines of JSON.

    Args:
        connection: The socket.
        longest: So many bytes may a line have.
    """

    def __init__(self, connection: socket.socket, longest: int = _LONGEST_LINE) -> None:
        self.connection, self.longest = connection, longest
        self._rest = b""

    def read(self) -> list[Message] | None:
        """Returns what is there without waiting for more; None at the end of the connection."""
        try:
            received = self.connection.recv(min(1 << 16, self.longest))
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not received:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        if max(map(len, [*lines, self._rest])) > self.longest:
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


@dataclass
class _Stranger:
    """A connection that has not shown the secret yet."""

    lines: _Lines
    host: str
    since: float


class Hub:
    """The job's end: listens on a free port and hears all nodes; for one thread.

    Args:
        token: The secret.
        host: The address to listen at, of this machine; empty: all addresses, IPv4 and IPv6. See `listening_host`.
    """

    def __init__(self, token: str, host: str = "") -> None:
        self._token = token.encode()
        self._server = _listen(host)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._nodes: dict[str, _Lines] = {}

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.getsockname()[1])

    @property
    def address(self) -> str:
        """The address at which it listens."""
        return str(self._server.getsockname()[0])

    def poll(self, seconds: float) -> list[Heard]:
        """Waits until something is heard, at most so long, and returns it in order."""
        heard: list[Heard] = []
        ready = [key.fileobj for key, _ in self._selector.select(seconds)]
        for connection in ready:
            if isinstance(connection, socket.socket) and connection is not self._server:
                heard += self._read(connection)
        if self._server in ready:
            heard += self._accept()
        for connection, stranger in list(self._strangers.items()):
            if time.monotonic() - stranger.since > _STRANGER_SECONDS:
                self._end(connection)
        return heard

    def send(self, message: Message) -> None:
        """Tells all nodes; one that cannot be told is heard to end."""
        for lines in list(self._nodes.values()):
            with contextlib.suppress(OSError):
                lines.write(message)

    def close(self) -> None:
        """Ends all connections."""
        for connection in [*self._strangers, *(lines.connection for lines in self._nodes.values())]:
            connection.close()
        self._selector.close()
        self._server.close()

    def _accept(self) -> list[Heard]:
        """Takes in those who wait, and hears what they have sent already."""
        heard: list[Heard] = []
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, address = self._server.accept()
            except OSError:
                break  # nobody waits; or no descriptor is free, and who waits is asked in the next round
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
            lines = _Lines(connection, _LONGEST_GREETING)
            self._strangers[connection] = _Stranger(lines, str(address[0]), time.monotonic())
            heard += self._read(connection)
            if len(self._strangers) > _MAX_STRANGERS:
                self._end_oldest_stranger()
        return heard

    def _end_oldest_stranger(self) -> None:
        """Makes room: whoever opens many connections loses its own. A machine's only one may be a node's: it stays."""
        counted = Counter(stranger.host for stranger in self._strangers.values())
        crowd = max(counted, key=lambda host: counted[host])
        if counted[crowd] > 1:
            self._end(next(connection for connection, stranger in self._strangers.items() if stranger.host == crowd))

    def _end(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        self._strangers.pop(connection, None)

    def _read(self, connection: socket.socket) -> list[Heard]:
        if connection in self._strangers:
            return self._greet(connection, self._strangers[connection].lines)
        name = next((name for name, lines in self._nodes.items() if lines.connection is connection), None)
        if name is None:
            return []  # ended in this round
        messages = self._nodes[name].read()
        if messages is None:
            self._end(connection)
            del self._nodes[name]
            return [Heard(name, None)]
        return [Heard(name, message) for message in messages]

    def _greet(self, connection: socket.socket, lines: _Lines) -> list[Heard]:
        """Hears a stranger's first line, which must show the secret and a name that is not taken."""
        messages = lines.read()
        if messages is None:
            self._end(connection)
        if not messages:
            return []
        name, token = messages[0].get("node"), messages[0].pop("token", None)
        is_right = isinstance(token, str) and hmac.compare_digest(token.encode(errors="replace"), self._token)
        if not is_right or not isinstance(name, str) or name in self._nodes:
            self._end(connection)
            return []
        del self._strangers[connection]
        lines.longest = _LONGEST_LINE
        self._nodes[name] = lines
        return [Heard(name, message) for message in messages]


def listening_host(host: str, others: Iterable[str]) -> str:
    """Finds the address of this machine that other nodes reach it at.

    Args:
        host: This node's name or address, as Slurm gives it to the others.
        others: Theirs.

    Returns:
        The address, if exactly this machine has it. Empty, for all addresses, where it cannot be found: the name is not
        known here, or means an address that this machine does not have, or means the loopback (as some distributions
        write a machine's own name into /etc/hosts) while other nodes are elsewhere.
    """
    addresses = _addresses(host)
    if len(addresses) != 1:
        return ""
    (address,) = addresses
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        found = [_addresses(other) for other in others]
        if not all(each == addresses for each in found):
            return ""
    try:
        _listen(address).close()
    except OSError:
        return ""
    return address


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def _listen(host: str) -> socket.socket:
    if host == "":
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except (OSError, ValueError):
            return socket.create_server(("", 0), backlog=1024)  # without IPv6
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=1024)


def endpoint(host: str, port: int) -> str:
    """Returns HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_and_port(text: str) -> tuple[str, int]:
    """Reads what `endpoint` wrote."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


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
