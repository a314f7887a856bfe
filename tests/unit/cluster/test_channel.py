"""The connection between a job and its nodes, which strangers cannot disturb."""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_scale.cluster import channel as module
from mlra_scale.cluster.channel import Heard, Hub, Link, endpoint, free_port, host_and_port, listening_host

TOKEN = "0123456789abcdef"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with contextlib.closing(Hub(TOKEN)) as hub:
        yield hub


def link_to(hub: Hub, node: str = "a", **greeting: Any) -> Link:
    return Link("127.0.0.1", hub.port, {"node": node, "token": TOKEN, **greeting}, patience=0.0)


@contextlib.contextmanager
def cut(link: Link) -> Iterator[Link]:
    """Ends a link as a process that is killed does, without waiting for the job."""
    yield link
    link._socket.close()


def heard_until(hub: Hub, is_enough: Callable[[list[Heard]], bool]) -> list[Heard]:
    heard: list[Heard] = []
    deadline = time.monotonic() + 10.0
    while not is_enough(heard):
        assert time.monotonic() < deadline, heard
        heard += hub.poll(0.05)
    return heard


def hear(hub: Hub, number: int) -> list[Heard]:
    return heard_until(hub, lambda heard: len(heard) >= number)


def assert_is_heard(hub: Hub, link: Link) -> None:
    """The link of node a still works."""
    link.send({"still": "here"})
    assert hear(hub, 1) == [Heard("a", {"still": "here"})]


@pytest.fixture
def member(hub: Hub) -> Iterator[Link]:
    """The link of node a, which the hub knows."""
    with cut(link_to(hub)) as link:
        assert hear(hub, 1) == [Heard("a", {"node": "a"})]
        yield link


def received(link: Link, number: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    deadline = time.monotonic() + 10.0
    while len(messages) < number:
        assert time.monotonic() < deadline, messages
        messages += link.receive()
        time.sleep(0.005)
    return messages


def stranger(hub: Hub) -> socket.socket:
    return socket.create_connection(("127.0.0.1", hub.port), timeout=10.0)


def drained(hub: Hub, connection: socket.socket) -> list[Heard]:
    """Ends a stranger's sending and lets the hub hear all of it, until it closes its end."""
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    heard = []
    deadline = time.monotonic() + 10.0
    while True:
        assert time.monotonic() < deadline
        heard += hub.poll(0.02)
        try:
            if connection.recv(1) == b"":
                break
        except BlockingIOError:
            continue
        except OSError:
            break
    connection.close()
    return heard


def test_nodes_are_heard_by_name_and_in_order(hub: Hub) -> None:
    links = {name: link_to(hub, name, pid=7) for name in ("a", "b")}
    for name, link in links.items():
        link.send({"from": name})
        link.send({"again": [1, None, "\u00e9\n"]})
    heard = hear(hub, 6)
    for name in links:
        assert [item.message for item in heard if item.node == name] == [
            {"node": name, "pid": 7},
            {"from": name},
            {"again": [1, None, "\u00e9\n"]},
        ]
    for link in links.values():
        with cut(link):
            continue


def test_a_message_reaches_all_nodes(hub: Hub) -> None:
    links = [link_to(hub, name) for name in ("a", "b", "c")]
    hear(hub, 3)
    hub.send({"order": "none"})
    hub.send({"order": "stop"})
    for link in links:
        with cut(link):
            assert received(link, 2) == [{"order": "none"}, {"order": "stop"}]


def test_an_end_is_heard_after_all_messages_before_it_though_the_job_sends_too(hub: Hub, member: Link) -> None:
    hub.send({"order": "none"})
    member.send({"bad_nodes": {}})
    member.send({"ended": {}})
    thread = threading.Thread(target=member.close)
    thread.start()
    heard = heard_until(hub, lambda heard: heard != [] and heard[-1].message is None)
    assert heard == [Heard("a", {"bad_nodes": {}}), Heard("a", {"ended": {}}), Heard("a", None)]
    thread.join(2.0)
    assert not thread.is_alive(), "the link knows that it was heard"


def test_a_job_that_does_not_read_delays_the_end_of_a_link_by_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LAST_WORDS_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link("127.0.0.1", server.getsockname()[1], {})
        started = time.monotonic()
        link.close()
        assert 0.15 < time.monotonic() - started < 2.0


def test_a_name_is_taken_once_and_again_after_its_end(hub: Hub, member: Link) -> None:
    with cut(link_to(hub, pid=2)) as second:
        assert heard_until(hub, lambda heard: not second.receive() and not second.is_open) == []
    assert_is_heard(hub, member)
    member._socket.close()
    assert hear(hub, 1) == [Heard("a", None)]
    with cut(link_to(hub)):
        assert hear(hub, 1) == [Heard("a", {"node": "a"})]


def test_a_job_that_ends_is_noticed_by_the_node(hub: Hub, member: Link) -> None:
    hub.send({"order": "kill"})
    hub.close()
    assert received(member, 1) == [{"order": "kill"}], "what was said before its end is heard"
    deadline = time.monotonic() + 5.0
    while member.is_open and time.monotonic() < deadline:
        assert member.receive() == []
    assert not member.is_open
    member.send({"into": "the void"})
    assert member.receive() == []
    member.close()


def test_a_link_waits_for_a_job_that_comes_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    late: list[socket.socket] = []
    timer = threading.Timer(0.7, lambda: late.append(socket.create_server(("127.0.0.1", port))))
    timer.start()
    link = Link("127.0.0.1", port, {"node": "a"}, patience=10.0)
    timer.join()
    connection, _ = late[0].accept()
    assert connection.recv(100) == b'{"node": "a"}\n'
    for closable in (connection, link, late[0]):
        closable.close()


def test_a_link_gives_up_on_a_job_that_does_not_come() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        Link("127.0.0.1", port, {}, patience=0.0)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_lines_may_be_split_anywhere(data: st.DataObject) -> None:
    messages = data.draw(
        st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=3))
    )
    greeting = {"node": "a", "token": TOKEN}
    stream = b"".join(json.dumps(message).encode() + b"\n" for message in [greeting, *messages])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=6)))
    with contextlib.closing(Hub(TOKEN)) as hub, stranger(hub) as connection:
        heard: list[Heard] = []
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            connection.sendall(stream[start:end])
            heard += hub.poll(0.01)
        heard += heard_until(hub, lambda more: len(heard) + len(more) > len(messages))
        assert [item.message for item in heard] == [{"node": "a"}, *messages]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
lines = st.one_of(
    st.binary(max_size=40),
    json_values.map(lambda value: json.dumps(value).encode()),
    # Nearly right: only the token is not, or the line's end.
    json_values.map(lambda token: json.dumps({"node": "a", "token": token}).encode()),
    st.just(json.dumps({"node": "a", "token": TOKEN[:-1]}).encode()),
    st.just(json.dumps({"node": "a"}).encode()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(lines, st.sampled_from([b"\n", b"", b"\r\n"])), max_size=4))
def test_nothing_that_strangers_send_is_heard_or_disturbs_a_node(said: list[tuple[bytes, bytes]]) -> None:
    with contextlib.closing(Hub(TOKEN)) as hub, cut(link_to(hub)) as link:
        hear(hub, 1)
        connection = stranger(hub)
        with contextlib.suppress(OSError):
            for line, end in said:
                connection.sendall(line + end)
        assert drained(hub, connection) == []
        assert_is_heard(hub, link)


@pytest.mark.parametrize(
    "said",
    [
        b'{"node": "b", "token": 5}\n',
        b'{"node": "b", "token": null}\n',
        b"[1, 2]\n",
        b"\xff\xfe\n",
        b'{"node": "b", "token": "' + b"9" * 100_000 + b'"}\n',
        b"9" * 100_000 + b"\n",
        '{"node": "b", "token": "\u00e9"}\n'.encode(),
        b'{"node": "b", "token": "\\ud800"}\n',
        b'{"node": "\\udfff", "token": "0123456789abcde\\udfff"}\n',
        b'{"node": "b", "token": {"a": []}}\n',
        b'{"token": "0123456789abcdef"}\n',
        b'{"node": 5, "token": "0123456789abcdef"}\n',
        b"[" * 60_000 + b"\n",
        b"[" * 9_000 + b"\n",
        b'{"node": "b", "token": ' + b"9" * 9_000 + b"}\n",
    ],
    ids=[
        *("number", "null", "list", "bytes", "long token", "long number", "not ascii", "surrogate"),
        *("surrogates", "object", "no name", "name is a number", "deep", "deep and short", "digits"),
    ],
)
def test_what_a_stranger_sends_ends_its_connection_alone(hub: Hub, member: Link, said: bytes) -> None:
    connection = stranger(hub)
    connection.sendall(said)
    assert drained(hub, connection) == []
    assert_is_heard(hub, member)


def test_a_stranger_without_an_end_of_line_is_cut_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_GREETING", 1000)
    with stranger(hub) as connection:
        connection.sendall(b"x" * 2000)
        assert heard_until(hub, lambda heard: is_closed(connection)) == []


def test_a_line_that_is_no_message_ends_a_node(hub: Hub) -> None:
    with stranger(hub) as connection:
        connection.sendall(json.dumps({"node": "a", "token": TOKEN}).encode() + b"\nnonsense\n")
        connection.sendall(b"\n")
        heard = drained(hub, connection)
    assert [item.message for item in heard] in ([{"node": "a"}, None], []), "both at once, or one after the other"


def is_closed(connection: socket.socket) -> bool:
    """Whether the hub has ended a stranger's connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_strangers_are_few_at_a_time_and_nodes_come_through(hub: Hub, member: Link) -> None:
    """Of many connections from one machine, the oldest are ended."""
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(stranger(hub)) for _ in range(150)]
        heard_until(hub, lambda heard: sum(map(is_closed, crowd)) == 150 - module._MAX_STRANGERS)
        assert not any(map(is_closed, crowd[-module._MAX_STRANGERS :]))
        with cut(link_to(hub, "b")):
            assert [item.node for item in hear(hub, 1)] == ["b"]
            assert_is_heard(hub, member)


def test_the_crowd_from_one_machine_makes_room_for_another(hub: Hub) -> None:
    """127.0.0.2 is another machine's address to the hub."""
    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(socket.create_connection(("127.0.0.1", hub.port), 10.0, ("127.0.0.2", 0)))
        hub.poll(1.0)
        crowd = [stack.enter_context(stranger(hub)) for _ in range(module._MAX_STRANGERS + 8)]
        heard_until(hub, lambda heard: sum(map(is_closed, crowd)) == 9)
        assert not is_closed(alone)


def test_many_nodes_that_connect_in_one_moment_are_all_heard(hub: Hub) -> None:
    """Their greetings are still on the way when the hub takes them in: none is ended for another."""
    number = 2 * module._MAX_STRANGERS
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(socket.create_connection(("127.0.0.1", hub.port), 10.0, (f"127.0.1.{index}", 0)))
            for index in range(1, number + 1)
        ]
        while len(hub._strangers) < number and not any(map(is_closed, nodes)):
            hub.poll(1.0)
        for index, node in enumerate(nodes):
            node.setblocking(True)
            node.sendall(f'{{"node": "{index}", "token": "{TOKEN}"}}\n'.encode())
        assert {item.node for item in hear(hub, number)} == {str(index) for index in range(number)}


def test_a_stranger_without_a_greeting_is_cut_off_in_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRANGER_SECONDS", 0.2)
    with cut(link_to(hub)) as link, stranger(hub) as silent, stranger(hub) as slow:
        slow.sendall(b'{"node": ')
        heard = heard_until(hub, lambda heard: is_closed(silent) and is_closed(slow))
        assert [item.message for item in heard] == [{"node": "a"}], "a member may be silent for as long as it likes"
        assert_is_heard(hub, link)


def test_a_line_that_is_too_long_ends_a_node(hub: Hub, member: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_LINE", 20_000)
    member.send({"long": "x" * 19_000})
    assert len(hear(hub, 1)) == 1, "longer than a greeting may be"
    member.send({"long": "x" * 30_000})
    assert hear(hub, 1) == [Heard("a", None)]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_hub_listens_at_one_address(host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("needs IPv6")
    with contextlib.closing(Hub(TOKEN, host)) as hub:
        name, port = host_and_port(endpoint(host, hub.port))
        assert (name, port) == (host, hub.port)
        with cut(Link(name, port, {"node": "a", "token": TOKEN}, patience=0.0)):
            assert hear(hub, 1) == [Heard("a", {"node": "a"})]
        if host != "127.0.0.2":
            with pytest.raises(OSError, match="refused"):
                Link("127.0.0.2", hub.port, {}, patience=0.0)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_hub_at_all_addresses_hears_both_families(hub: Hub) -> None:
    hosts = ["127.0.0.1", *(["::1"] if has_ipv6() else [])]
    for host in hosts:
        with cut(Link(host, hub.port, {"node": host, "token": TOKEN}, patience=0.0)):
            assert hear(hub, 1) == [Heard(host, {"node": host})]
        assert hear(hub, 1) == [Heard(host, None)]


@pytest.mark.parametrize(
    ("host", "others", "expected"),
    [
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("127.0.0.1", ["127.0.0.1", "192.0.2.7"], ""),  # a machine's own name is often its loopback
        ("::1", ["192.0.2.7"], ""),
        ("192.0.2.1", [], ""),  # of no machine
        ("no-such-host.invalid", [], ""),
    ],
)
def test_the_address_at_which_a_hub_listens(host: str, others: list[str], expected: str) -> None:
    assert listening_host(host, others) == expected


@pytest.mark.parametrize(
    ("outgoing", "is_free"),
    [
        ("32768\t60999\n", lambda port: port < 32768 or port > 60999),
        ("10000 64000", lambda port: port > 64000),
        ("1024 65535", lambda port: port >= 1024),  # no others are left
        (None, lambda port: port < 32768 or port > 60999),
    ],
)
def test_free_ports_differ_and_no_outgoing_connection_takes_them(
    outgoing: str | None, is_free: Callable[[int], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port within the range of outgoing connections was taken between its choice and torchrun's start."""
    if outgoing is not None:
        (tmp_path / "range").write_text(outgoing)
    monkeypatch.setattr(module, "_OUTGOING_PORTS", tmp_path / "range")
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 15 and all(map(is_free, ports))


def test_a_free_port_is_not_one_that_is_listened_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", free_port())) as server:
        taken = server.getsockname()[1]
        free = free_port()
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, ports, count: [taken, free])
        assert free_port() == free
