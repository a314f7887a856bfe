"""Heartbeats of real processes: of one that works, one that is stopped, and one that native code keeps."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.cluster.messages import Heartbeat, RankMessage
from mlra_scale.cluster.rank.heartbeat import HeartbeatSender, HeartbeatSocket
from mlra_scale.process_tree import process_state

RANK = """
import ctypes, os, signal, socket, sys, time
from mlra_scale.cluster.channel import Hub
from mlra_scale.cluster.rank.heartbeat import HeartbeatSender

def loop():
    while True:
        sum(range(1000))

signal.alarm(60)  # whatever becomes of the test
rank = ["loops", "waits", "stopped", "kept"].index(sys.argv[2])
heartbeats = HeartbeatSender(sys.argv[1], rank, rank % 2)
heartbeats.begin("training", 7)
time.sleep(0.5)
if rank == 0:
    loop()
elif rank == 1:
    heartbeats.begin("saving")
    Hub("").poll(50.0)
elif rank == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
    loop()
else:
    ctypes.PyDLL(None).sleep(50)  # a call that does not let go of the interpreter
"""
KINDS = ("loops", "waits", "stopped", "kept")


@pytest.fixture
def node() -> Iterator[HeartbeatSocket]:
    with contextlib.closing(HeartbeatSocket()) as node:
        yield node


def wait_for(node: HeartbeatSocket, number: int, seconds: float = 10.0) -> list[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    received = node.receive()
    while len(received) < number:
        assert time.monotonic() < deadline, received
        time.sleep(0.01)
        received += node.receive()
    return received


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_rank_that_stands_still_is_silent_and_one_that_works_or_waits_is_not(node: HeartbeatSocket) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, node.address, kind]) for kind in KINDS]
    try:
        beats: dict[int, list[tuple[Heartbeat, float]]] = {rank: [] for rank in range(4)}
        until = None
        deadline = time.monotonic() + 30.0
        while until is None or time.monotonic() < until:
            for message in node.receive():
                beat = Heartbeat(**message["heartbeat"])
                beats[beat.rank].append((beat, time.monotonic()))
            assert time.monotonic() < deadline, beats
            if until is None and all(beats.values()):
                until = time.monotonic() + 3.2
            time.sleep(0.01)
        now = time.monotonic()
        silence = [now - beats[rank][-1][1] for rank in range(4)]
        states = [process_state(rank.pid) for rank in ranks]
        assert silence[0] < 1.8 and silence[1] < 1.8 and len(beats[0]) >= 3
        assert silence[2] > 2.2 and silence[3] > 2.2, silence
        assert states == ["running", "sleeping", "stopped", "sleeping"]
        for rank, process in enumerate(ranks):
            assert {beat.pid for beat, _ in beats[rank]} == {process.pid}
            assert {beat.local_rank for beat, _ in beats[rank]} == {rank % 2}
            assert {beat.step for beat, _ in beats[rank]} <= {0, 7}
        last = [beats[rank][-1][0] for rank in range(4)]
        assert [beat.phase for beat in last[:2]] == ["training", "saving"]
        assert last[0].step == last[1].step == 7, "the step stays where none is given"
        assert 1.5 < last[0].seconds < 5.5 and last[1].seconds < last[0].seconds
        # The one is in no function of the package; the other waits inside of one of it.
        assert last[0].location.startswith("loop (<string>:")
        ours, innermost = last[1].location.split(" > ")
        assert ours.startswith("poll (channel.py:") and innermost.startswith("wait (threading.py:")
        os.kill(ranks[2].pid, signal.SIGCONT)
        assert any(message["heartbeat"]["rank"] == 2 for message in wait_for(node, 6))
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()
    assert [process_state(rank.pid) for rank in ranks] == [""] * 4


class QuietSender(HeartbeatSender):
    """A rank's end without its thread."""

    def _run(self) -> None:
        pass


@pytest.fixture
def sender(node: HeartbeatSocket) -> Iterator[HeartbeatSender]:
    sender = QuietSender(node.address, 0, 0)
    sender._socket.settimeout(0.05)
    with sender._socket:
        yield sender


def test_a_message_arrives_at_once(node: HeartbeatSocket, sender: HeartbeatSender) -> None:
    sender.send(bad_nodes={"a": "ECC \u00e9"})
    sender.send(number=1)
    assert node.receive() == [{"bad_nodes": {"a": "ECC \u00e9"}}, {"number": 1}]
    assert node.receive() == []


def test_a_rank_reports_a_node_that_has_computed_wrong_and_ends(
    node: HeartbeatSocket, sender: HeartbeatSender, tmp_path: Path
) -> None:
    from mlra_scale.cluster.rank.__main__ import NodeWatchdog

    assert NodeWatchdog(sender, "n1", tmp_path).exclude("n2", "rank 3 on n2 computes wrong") is True
    (message,) = map(RankMessage.of, node.receive())
    assert message.bad_nodes == {"n2": "rank 3 on n2 computes wrong"}


def test_a_rank_continues_without_its_node(node: HeartbeatSocket, sender: HeartbeatSender) -> None:
    node.close()
    sender.send(number=1)


def test_a_node_that_does_not_read_loses_messages_and_delays_no_rank(
    node: HeartbeatSocket, sender: HeartbeatSender
) -> None:
    deadline, sent = time.monotonic() + 20.0, 0
    while sent < 2000 and time.monotonic() < deadline:
        started = time.monotonic()
        sender.send(number=sent)
        sent += 1
        if time.monotonic() - started > 0.04:
            break  # it is full
    assert time.monotonic() < deadline
    numbers = [message["number"] for message in node.receive()]
    assert numbers == [*range(len(numbers))] and 0 < len(numbers) < sent


def test_what_is_no_message_is_ignored(node: HeartbeatSocket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as rank:
        for content in (b"", b"{", b"\xff\xfe", b"[" * 60_000, b"[1]", b"5", b'{"heartbeat": {}}'):
            rank.sendto(content, f"\0{node.address}")
    assert node.receive() == [{"heartbeat": {}}]


def test_messages_of_other_users_are_ignored(
    node: HeartbeatSocket, sender: HeartbeatSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender.send(number=1)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert node.receive() == []
