"""The connection between a job and its nodes: JSON objects, one per line, over TCP.

The end of a connection is a message too: the node has died. A secret, made for each attempt and passed to the nodes in
their environment, keeps other users of the cluster out. A connection that has not shown it is a stranger: the job keeps
few of them, for a short time, and reads one short line of each; any fault of theirs ends their connection alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import queue
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

TOKEN_VARIABLE = "MLRA_SCALE_JOB_TOKEN"
_LONGEST_LINE = 1 << 20
"""Bytes of a node's line: a node with many ranks reports some hundred bytes of each."""
_LONGEST_GREETING = 1 << 14
_MAX_STRANGERS = 32
"""Strangers at a time, beside one from each machine: many nodes may connect at the same moment."""
_STRANGER_SECONDS = 20.0
"""How long a connection may take to send its greeting."""
_BACKLOG = 1024
_LAST_WORDS_SECONDS = 5.0
_PORTS = (10000, 65536)
"""Below 10000 are the ports of well-known services, Slurm's among them."""
_OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")

Message = dict[str, Any]


class Heard(NamedTuple):
    """What a node has sent; `message` None: its connection has ended."""

    node: str
    message: Message | None


def _parsed(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _encoded(message: Message) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


class _Connection(asyncio.Protocol):
    """The job's end of one connection; a stranger as long as it has no node."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._rest = hub, b""
        self.node: str | None = None
        self.host = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.host = str((transport.get_extra_info("peername") or [""])[0])
        self._hub._strangers.append(self)
        loop = asyncio.get_running_loop()
        # After what has arrived with the connection: a greeting makes room too.
        loop.call_later(0.0, self._hub._make_room)
        loop.call_later(_STRANGER_SECONDS, lambda: None if self.node else transport.close())

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line and not (self._fits(line) and self._take(_parsed(line))):
                self.transport.close()
                return
        if not self._fits(self._rest):
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.node is None:
            self._hub._strangers.remove(self)
        else:
            del self._hub._nodes[self.node]
            self._hub._heard.put(Heard(self.node, None))

    def _fits(self, line: bytes) -> bool:
        return len(line) <= (_LONGEST_GREETING if self.node is None else _LONGEST_LINE)

    def _take(self, message: Message | None) -> bool:
        """Takes a message; returns False if the connection must end."""
        if message is None:
            return False
        if self.node is None:
            name, token = message.get("node"), message.pop("token", None)
            if not isinstance(name, str) or not name or name in self._hub._nodes or not self._hub._is_secret(token):
                return False
            self.node = name
            self._hub._strangers.remove(self)
            self._hub._nodes[name] = self
        self._hub._heard.put(Heard(self.node, message))
        return True


class Hub:
    """The job's end of all connections: listens on a free port, in a thread of its own.

    Args:
        token: The secret.
        host: The address of this machine to listen at (`listening_host`); empty: all addresses, IPv4 and IPv6.
    """

    def __init__(self, token: str, host: str = "") -> None:
        self._token = token.encode()
        self._heard: queue.Queue[Heard] = queue.Queue()
        self._strangers: list[_Connection] = []  # the oldest first
        self._nodes: dict[str, _Connection] = {}
        self._socket = _listen(host)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_print_unless_of_the_system)
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)
        self._thread.start()
        serving = self._loop.create_server(lambda: _Connection(self), sock=self._socket, backlog=_BACKLOG)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    def poll(self, seconds: float) -> list[Heard]:
        """Waits until something is heard, at most so long, and returns all that was heard, in order."""
        heard: list[Heard] = []
        with contextlib.suppress(queue.Empty):
            heard.append(self._heard.get(timeout=seconds))
            while True:
                heard.append(self._heard.get_nowait())
        return heard

    def send(self, message: Message) -> None:
        """Sends a message to all nodes; one that has ended is heard to end."""

        def write() -> None:
            for connection in self._nodes.values():
                connection.transport.write(_encoded(message))

        self._loop.call_soon_threadsafe(write)

    def close(self) -> None:
        """Ends all connections, after what was sent over them as far as nodes take it at once."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            self._server.close()
            connections = [*self._strangers, *self._nodes.values()]
            for connection in connections:
                connection.transport.close()
            await asyncio.sleep(0.0)
            for connection in connections:
                connection.transport.abort()
            await asyncio.sleep(0.0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _is_secret(self, token: Any) -> bool:
        return isinstance(token, str) and hmac.compare_digest(token.encode(errors="replace"), self._token)

    def _make_room(self) -> None:
        """Ends the oldest strangers of the machine that has most of them; the only one of a machine may be a node."""
        while True:
            strangers = [stranger for stranger in self._strangers if not stranger.transport.is_closing()]
            if len(strangers) <= _MAX_STRANGERS:
                return
            crowd, number = Counter(stranger.host for stranger in strangers).most_common(1)[0]
            if number == 1:
                return
            next(stranger for stranger in strangers if stranger.host == crowd).transport.close()


def _print_unless_of_the_system(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handles errors of the hub's loop; where no descriptor is free, the loop accepts connections a second later."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def listening_host(host: str, others: Iterable[str]) -> str:
    """Returns the address of this machine at which other nodes reach it; empty, for all addresses, where it is unclear.

    It is unclear where the name is not known here, has several addresses or that of another machine, or means the
    loopback (as some distributions write a machine's own name into /etc/hosts) while other nodes are elsewhere.

    Args:
        host: This node's name or address, as Slurm gives it to the others.
        others: Theirs.
    """
    addresses = _addresses(host)
    if len(addresses) != 1:
        return ""
    (address,) = addresses
    is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if is_loopback and any(_addresses(other) != addresses for other in others):
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
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        except (OSError, ValueError):
            return socket.create_server(("", 0), backlog=_BACKLOG)  # without IPv6
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=_BACKLOG)


def free_port() -> int:
    """Returns a port of this machine that no process uses; another one each time.

    It is outside the range from which the kernel takes the ports of outgoing connections, where it has enough others:
    within that range, any connection of another process could take the port before it is listened at.
    """
    candidates = set(range(*_PORTS)) - _outgoing_ports()
    if len(candidates) >= 1000:
        for port in random.SystemRandom().sample(sorted(candidates), 100):
            with contextlib.suppress(OSError), socket.create_server(("", port)):
                return port
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def _outgoing_ports() -> set[int]:
    """Returns the range from which Linux takes the ports of outgoing connections; its default where it is unknown."""
    try:
        first, last = map(int, _OUTGOING_PORTS.read_text("ascii").split())
    except (OSError, ValueError):
        first, last = 32768, 60999
    return set(range(first, last + 1))


def endpoint(host: str, port: int) -> str:
    """Returns HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_and_port(text: str) -> tuple[str, int]:
    """Reads what `endpoint` wrote."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Link:
    """A node's end of its connection; for one thread.

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
                self._socket = socket.create_connection((host, port), timeout=10.0)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        # Small messages must not wait for the answer to the one before.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self.is_open = True
        self._write(greeting)

    def _write(self, message: Message) -> None:
        self._socket.settimeout(10.0)
        try:
            self._socket.sendall(_encoded(message))
        finally:
            self._socket.settimeout(0.0)

    def send(self, message: Message) -> None:
        """Sends the job a message; one that the job no longer hears is lost."""
        try:
            self._write(message)
        except OSError:
            self.is_open = False

    def receive(self) -> list[Message]:
        """Returns what the job has sent since the last call."""
        try:
            received = self._socket.recv(1 << 16) if self.is_open else b""
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            received = b""
        *lines, self._rest = (self._rest + received).split(b"\n")
        messages = [_parsed(line) for line in lines if line]
        self.is_open = received != b"" and len(self._rest) <= _LONGEST_LINE and None not in messages
        return [message for message in messages if message is not None] if self.is_open else []

    def close(self) -> None:
        """Ends the connection after all that was sent has been heard.

        A socket that is closed with unread orders in it would discard what is still on its way.
        """
        self.is_open = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(_LAST_WORDS_SECONDS)
            while self._socket.recv(1 << 16):
                continue
        self._socket.close()
