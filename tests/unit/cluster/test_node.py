"""The agent of a node: what it hears of its ranks, and what it does to them when the job says so or says no more."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlra_scale.cluster import node
from mlra_scale.cluster.channel import TOKEN_VARIABLE, Heard, Hub
from mlra_scale.cluster.node import Watch, parse, process_state
from mlra_scale.cluster.pulse import PulseSocket
from mlra_scale.cluster.slurm import SlurmError
from mlra_scale.cluster.versions import versions

OPTIONS = [
    "--job=10.0.0.1:41000",
    "--master=n1:29500",
    "--run-id=attempt-003",
    "--nodes=2",
    "--processes=4",
    "--device=cpu",
    "--logs=/x/logs",
    "--start-seconds=1800.0",
    "--lost-seconds=30.0",
]

RANK = """
import os, signal, sys, time
from mlra_scale.cluster import pulse as module
module._SECONDS_BETWEEN = 0.2
signal.alarm(60)
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.write(1, signal.Signals(number).name.encode() + b"\\n"))
pulse = module.Pulse(sys.argv[1], int(sys.argv[2]), int(sys.argv[2]))
pulse.beat("training", 4)
if sys.argv[3:]:
    pulse.tell(bad_nodes={"a": sys.argv[3]})
else:
    while True:
        time.sleep(60)
"""


def test_what_follows_the_dashes_is_the_trainings() -> None:
    training = ["--preset", "debug", "--device", "--job=x", "--", "--nodes=7", "parallel.world_size=8"]
    arguments = parse([*OPTIONS, "--", *training])
    assert arguments.training == training
    assert (arguments.job, arguments.master, arguments.run_id) == ("10.0.0.1:41000", "n1:29500", "attempt-003")
    assert (arguments.nodes, arguments.processes, arguments.device) == (2, 4, "cpu")
    assert (arguments.logs, arguments.start_seconds, arguments.lost_seconds) == (Path("/x/logs"), 1800.0, 30.0)


def test_a_training_without_arguments() -> None:
    assert parse(OPTIONS).training == parse([*OPTIONS, "--"]).training == []


@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_every_option_is_required(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*OPTIONS[:index], *OPTIONS[index + 1 :], "--", "--preset", "debug"])
    assert OPTIONS[index].split("=")[0] in capsys.readouterr().err


def test_options_have_no_short_forms() -> None:
    with pytest.raises(SystemExit):
        parse(["--jo=10.0.0.1:41000", *OPTIONS[1:]])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_the_state_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert wait_until(lambda: process_state(process.pid) == "S (sleeping)")
            process.send_signal(signal.SIGSTOP)
            assert wait_until(lambda: process_state(process.pid) == "T (stopped)")
        finally:
            process.kill()
        assert wait_until(lambda: process_state(process.pid) == "Z (zombie)")
    assert process_state(process.pid) == ""
    assert process_state(os.getpid()) == "R (running)"


def wait_until(is_so: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Site:
    """A job's hub, a node's watch, and its ranks."""

    def __init__(self, folder: Path, lost_seconds: float = 30.0) -> None:
        self.hub = Hub("secret")
        self.pulse = PulseSocket(folder)
        self.said: list[Heard] = []
        self.ranks: list[subprocess.Popen[str]] = []
        self._is_job_there = True
        arguments = argparse.Namespace(job=f"127.0.0.1:{self.hub.port}", logs=folder, lost_seconds=lost_seconds)
        self.watch = Watch(arguments, "a", 1, self.pulse)

    def start_rank(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, self.pulse.address, str(len(self.ranks)), *arguments]
        self.ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return self.ranks[-1]

    def hear_until(self, is_enough: Callable[[], Any], seconds: float = 10.0) -> bool:
        """Plays the job, which lets the node know that it is there."""

        def listen() -> bool:
            self.said += self.hub.poll(0.02)
            if self._is_job_there:
                self.hub.send({"order": "none"})
            return bool(is_enough())

        return wait_until(listen, seconds)

    def messages(self, key: str) -> list[Any]:
        return [heard.message[key] for heard in self.said if heard.message is not None and key in heard.message]

    def wait_for_ranks(self) -> None:
        def are_there() -> bool:
            doing = [rank["beat"]["doing"] for ranks in self.messages("ranks")[-1:] for rank in ranks]
            return doing == ["training"] * len(self.ranks)

        assert self.hear_until(are_there), self.said

    def be_silent(self) -> None:
        self._is_job_there = False

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
            if rank.stdout is not None:
                rank.stdout.close()
        self.watch.ended(failures=[])  # ends its thread
        self.hub.close()
        self.pulse.close()


@pytest.fixture
def make_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    monkeypatch.setattr(node, "_REPORT_SECONDS", 0.2)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def make(**options: float) -> Site:
            site = Site(Path(folder), **options)
            stack.callback(site.close)
            return site

        yield make


Sites = Callable[..., Site]


def test_the_job_learns_of_the_node_and_its_ranks(make_site: Sites) -> None:
    site = make_site()
    ranks = [site.start_rank(), site.start_rank()]
    site.wait_for_ranks()
    assert site.said[0] == Heard("a", {"node": "a", "pid": os.getpid(), "versions": versions()})
    told = sorted(site.messages("ranks")[-1], key=lambda rank: rank["beat"]["rank"])
    for number, rank in enumerate(told):
        assert rank["beat"]["pid"] == ranks[number].pid
        assert (rank["beat"]["rank"], rank["beat"]["doing"], rank["beat"]["step"]) == (number, "training", 4)
        assert rank["silence"] < 5.0 and rank["state"] == "S (sleeping)"
    ranks[1].send_signal(signal.SIGSTOP)
    assert site.hear_until(
        lambda: (
            max((rank["silence"], rank["beat"]["rank"], rank["state"]) for rank in site.messages("ranks")[-1])
            > (0.9, 1, "T (stopped)")
        )
    )


@pytest.mark.parametrize("from_job", [True, False], ids=["order", "signal"])
def test_a_stop_reaches_every_rank_once(make_site: Sites, from_job: bool) -> None:
    site = make_site()
    early = site.start_rank()
    site.wait_for_ranks()
    if from_job:
        site.hub.send({"order": "stop"})
    else:
        site.watch.ask_to_stop(signal.SIGTERM, None)
    assert early.stdout is not None and early.stdout.readline() == "SIGUSR1\n"
    late = site.start_rank()
    site.wait_for_ranks()
    assert late.stdout is not None and late.stdout.readline() == "SIGUSR1\n"
    site.hub.send({"order": "stop"})
    site.watch.ask_to_stop(signal.SIGUSR1, None)
    site.hear_until(lambda: False, 0.5)
    assert [rank.poll() for rank in site.ranks] == [None, None]
    for rank in site.ranks:
        rank.kill()
    assert [rank.communicate()[0] for rank in site.ranks] == ["", ""], "no second signal"
    assert site.messages("signalled") == [True]


def test_stacks_are_asked_of_every_rank(make_site: Sites) -> None:
    site = make_site()
    for _ in range(2):
        site.start_rank()
    site.wait_for_ranks()
    site.hub.send({"order": "stacks"})
    for rank in site.ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "SIGUSR2\n"


def test_an_order_to_kill_ends_the_ranks_even_stopped_ones(make_site: Sites) -> None:
    site = make_site()
    for _ in range(2):
        site.start_rank()
    site.wait_for_ranks()
    site.ranks[1].send_signal(signal.SIGSTOP)
    site.hub.send({"order": "kill"})
    assert [rank.wait(5.0) for rank in site.ranks] == [-signal.SIGKILL] * 2
    site.hear_until(lambda: False, 0.3)
    assert site.hub.nodes == {"a"}, "torchrun tells first how they ended"


AGENT = """
import argparse, signal, sys, time
from pathlib import Path
from mlra_scale.cluster import node
from mlra_scale.cluster.pulse import PulseSocket
signal.alarm(60)
node._KILL_SECONDS = float(sys.argv[3])
folder = Path(sys.argv[2])
arguments = argparse.Namespace(job=sys.argv[1], logs=folder, lost_seconds=30.0)
watch = node.Watch(arguments, "a", 1, PulseSocket(folder))
time.sleep(60)  # as in a rendezvous that never ends
"""


@pytest.mark.parametrize("has_rank", [False, True])
def test_an_agent_whose_torchrun_does_not_return_ends(has_rank: bool) -> None:
    """At once where no rank has come; where ranks were killed, torchrun may first tell how they ended."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        hub = stack.enter_context(contextlib.closing(Hub("secret")))
        command = [sys.executable, "-c", AGENT, f"127.0.0.1:{hub.port}", folder, "0.3" if has_rank else "30"]
        agent = stack.enter_context(subprocess.Popen(command, env={**os.environ, TOKEN_VARIABLE: "secret"}))
        stack.callback(agent.kill)
        said: list[Heard] = []

        def has_heard(key: str) -> bool:
            said.extend(hub.poll(0.1))
            return any((heard.message or {}).get(key) for heard in said)

        assert wait_until(lambda: has_heard("versions"))
        if has_rank:
            rank_command = [sys.executable, "-c", RANK, f"{folder}/pulse", "0"]
            rank = stack.enter_context(subprocess.Popen(rank_command, stdout=subprocess.PIPE))
            stack.callback(rank.kill)
            assert wait_until(lambda: has_heard("ranks"))
        hub.send({"order": "kill"})
        assert agent.wait(10.0) == 1
        if has_rank:
            assert rank.wait(5.0) == -signal.SIGKILL


def test_ranks_do_not_outlive_the_job(make_site: Sites) -> None:
    """They must not meet those of the next attempt."""
    site = make_site()
    site.start_rank()
    site.wait_for_ranks()
    assert not site.watch.has_lost_job
    site.hub.close()
    assert site.ranks[0].wait(5.0) == -signal.SIGKILL


def test_ranks_do_not_outlive_a_job_that_is_heard_no_more(make_site: Sites) -> None:
    """Its machine has lost power: no connection breaks."""
    site = make_site(lost_seconds=1.0)
    site.start_rank()
    site.wait_for_ranks()
    assert not site.hear_until(lambda: site.ranks[0].poll() is not None, 1.5), "the job is there"
    site.be_silent()
    started = time.monotonic()
    assert site.hear_until(lambda: site.ranks[0].poll() is not None, 5.0)
    assert site.ranks[0].returncode == -signal.SIGKILL and time.monotonic() - started > 0.7


def test_a_lost_job_is_told_once(make_site: Sites, capfd: pytest.CaptureFixture[str]) -> None:
    site = make_site()
    site.start_rank()
    site.wait_for_ranks()
    site.hub.close()
    assert site.ranks[0].wait(5.0) == -signal.SIGKILL
    time.sleep(0.5)
    assert capfd.readouterr().err == "a: the job is heard no more; its ranks here end\n"
    assert site.watch.has_lost_job


@pytest.mark.parametrize(
    ("is_stop_asked", "environment", "expected"),
    [(False, {"SLURM_JOB_ID": "41"}, ["41"]), (True, {"SLURM_JOB_ID": "41"}, []), (False, {}, [])],
)
def test_a_job_that_was_lost_with_its_node_is_queued_again(
    monkeypatch: pytest.MonkeyPatch, is_stop_asked: bool, environment: dict[str, str], expected: list[str]
) -> None:
    """Not where Slurm ends this node's part too, and signals it."""
    requeued: list[str] = []

    def requeue(job_id: str) -> None:
        requeued.append(job_id)
        raise SlurmError("another node was first")

    monkeypatch.setattr(node, "_JOB_SECONDS", 0.0)
    monkeypatch.setattr(node, "requeue", requeue)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    node._requeue_without_job(cast(Watch, SimpleNamespace(is_stop_asked=is_stop_asked)))
    assert requeued == expected


def test_the_end_is_told_after_what_the_ranks_told(make_site: Sites) -> None:
    site = make_site()
    assert site.start_rank("ECC").wait(10.0) == 0
    threading.Thread(target=site.watch.ended, kwargs={"failures": [{"rank": 0}]}).start()
    assert site.hear_until(lambda: site.messages("ended"))
    keys = [key for heard in site.said for key in heard.message or {} if key in ("bad_nodes", "ended")]
    assert keys == ["bad_nodes", "ended"]
    assert site.messages("bad_nodes") == [{"a": "ECC"}] and site.messages("ended") == [{"failures": [{"rank": 0}]}]
