"""Signs of life of real processes: of one that works, one that is stopped, and one that native code keeps."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.cluster.node import process_state
from mlra_scale.cluster.pulse import Beat, Pulse, PulseSocket

RANK = """
import ctypes, os, signal, socket, sys, time
from mlra_scale.cluster.channel import Hub
from mlra_scale.cluster.pulse import Pulse

def loop():
    while True:
        sum(range(1000))

signal.alarm(60)  # whatever becomes of the test
rank = ["loops", "waits", "stopped", "kept"].index(sys.argv[2])
pulse = Pulse(sys.argv[1], rank, rank % 2)
pulse.beat("training", 7)
time.sleep(0.5)
if rank == 0:
    loop()
elif rank == 1:
    pulse.beat("saving")
    Hub("").poll(50.0)
elif rank == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
    loop()
else:
    ctypes.PyDLL(None).sleep(50)  # a call that does not let go of the interpreter
"""
KINDS = ("loops", "waits", "stopped", "kept")


@pytest.fixture
def pulse_socket() -> Iterator[PulseSocket]:
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(PulseSocket(Path(folder))) as pulse_socket:
        yield pulse_socket


def wait_for(pulse_socket: PulseSocket, number: int, seconds: float = 10.0) -> list[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    received = pulse_socket.receive()
    while len(received) < number:
        assert time.monotonic() < deadline, received
        time.sleep(0.01)
        received += pulse_socket.receive()
    return received


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_who_stands_still_is_silent_and_who_works_or_waits_is_not(pulse_socket: PulseSocket) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, pulse_socket.address, kind]) for kind in KINDS]
    try:
        beats: dict[int, list[tuple[Beat, float]]] = {rank: [] for rank in range(4)}
        until = None
        deadline = time.monotonic() + 30.0
        while until is None or time.monotonic() < until:
            for message in pulse_socket.receive():
                beat = Beat(**message["beat"])
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
        assert [state[:1] for state in states] == ["R", "S", "T", "S"] and states[2] == "T (stopped)"
        for rank, process in enumerate(ranks):
            assert {beat.pid for beat, _ in beats[rank]} == {process.pid}
            assert {beat.local_rank for beat, _ in beats[rank]} == {rank % 2}
            assert {beat.step for beat, _ in beats[rank]} <= {0, 7}
        last = [beats[rank][-1][0] for rank in range(4)]
        assert [beat.doing for beat in last[:2]] == ["training", "saving"]
        assert last[0].step == last[1].step == 7, "the step stays where none is given"
        assert 1.5 < last[0].seconds < 5.5 and last[1].seconds < last[0].seconds
        # The one is in no function of the package; the other waits inside of one of it.
        assert last[0].place.startswith("loop (<string>:")
        ours, innermost = last[1].place.split(" > ")
        assert ours.startswith("poll (channel.py:") and innermost.startswith("select (selectors.py:")
        os.kill(ranks[2].pid, signal.SIGCONT)
        assert any(message["beat"]["rank"] == 2 for message in wait_for(pulse_socket, 6))
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()
    assert [process_state(rank.pid) for rank in ranks] == [""] * 4


def test_what_a_rank_tells_arrives_at_once(pulse_socket: PulseSocket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as quiet:
        pulse = Pulse(None, 0, 0)
        pulse._socket, pulse._address = quiet, pulse_socket.address  # without the thread
        pulse.tell(bad_nodes={"a": "ECC \u00e9"})
        pulse.tell(number=1)
        assert pulse_socket.receive() == [{"bad_nodes": {"a": "ECC \u00e9"}}, {"number": 1}]
        assert pulse_socket.receive() == []


def test_without_a_node_nothing_happens() -> None:
    pulse = Pulse(None, 0, 0)
    pulse.beat("training", 3)
    pulse.tell(bad_nodes={})


def test_a_node_that_is_gone_is_no_reason_to_stop(pulse_socket: PulseSocket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as quiet:
        pulse = Pulse(None, 0, 0)
        pulse._socket, pulse._address = quiet, pulse_socket.address
        pulse_socket.close()
        assert not Path(pulse_socket.address).exists()
        pulse.tell(number=1)


def test_a_node_that_does_not_listen_loses_some_beats_and_holds_nobody_up(pulse_socket: PulseSocket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as quiet:
        quiet.settimeout(0.05)
        pulse = Pulse(None, 0, 0)
        pulse._socket, pulse._address = quiet, pulse_socket.address
        deadline = time.monotonic() + 20.0
        sent = 0
        while sent < 2000 and time.monotonic() < deadline:
            started = time.monotonic()
            pulse.tell(number=sent)
            sent += 1
            if time.monotonic() - started > 0.04:
                break  # it is full
        assert time.monotonic() < deadline
        numbers = [message["number"] for message in pulse_socket.receive()]
        assert numbers == [*range(len(numbers))] and 0 < len(numbers) < sent


def test_what_is_no_message_is_passed_over(tmp_path: Path) -> None:
    with contextlib.closing(PulseSocket(tmp_path)) as pulse, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as rank:
        for said in (b"", b"{", b"\xff\xfe", b"[" * 60_000, b"[1]", b"5", b'{"beat": {}}'):
            rank.sendto(said, pulse.address)
        assert pulse.receive() == [{"beat": {}}]
