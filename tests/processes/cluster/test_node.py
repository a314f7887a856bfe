"""The agent of a node: what it hears of its ranks, and what it does to them when the job says so or says no more."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Heard, Hub
from mlra_scale.cluster.job_file import JobAttempt
from mlra_scale.cluster.messages import NodeMessage, RankFailure
from mlra_scale.cluster.node import __main__ as node
from mlra_scale.cluster.node import watch as watch_module
from mlra_scale.cluster.node.__main__ import folder_fault, parse
from mlra_scale.cluster.node.watch import Watch, connect
from mlra_scale.cluster.rank.heartbeat import HeartbeatSocket
from mlra_scale.cluster.rank.latch import Latch
from mlra_scale.cluster.versions import versions
from mlra_scale.process_tree import process_state
from tests.support.waiting import all_end, eventually

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
    "--nonce=abc",
]

RANK = """
import os, signal, sys, time
from mlra_scale.cluster.rank import heartbeat as module
module._SECONDS_BETWEEN = 0.2
signal.alarm(60)
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: os.write(1, signal.Signals(number).name.encode() + b"\\n"))
heartbeats = module.HeartbeatSender(sys.argv[1], int(sys.argv[2]), int(sys.argv[2]))
heartbeats.begin("training", 4)
if sys.argv[3:]:
    heartbeats.send(bad_nodes={"a": sys.argv[3]})
else:
    while True:
        time.sleep(60)
"""


def test_arguments_after_the_dashes_are_of_the_training() -> None:
    training = ["--preset", "debug", "--device", "--job=x", "--", "--nodes=7", "parallel.world_size=8"]
    arguments = parse([*OPTIONS, "--", *training])
    assert arguments.training == training
    assert (arguments.job, arguments.master, arguments.run_id) == ("10.0.0.1:41000", "n1:29500", "attempt-003")
    assert (arguments.nodes, arguments.processes, arguments.device) == (2, 4, "cpu")
    assert (arguments.logs, arguments.start_seconds, arguments.lost_seconds) == (Path("/x/logs"), 1800.0, 30.0)
    assert parse(OPTIONS).training == parse([*OPTIONS, "--"]).training == []
    with pytest.raises(SystemExit):
        parse(["--jo=10.0.0.1:41000", *OPTIONS[1:]])  # no short forms


def test_every_option_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    for option in OPTIONS:
        with pytest.raises(SystemExit):
            parse([*(other for other in OPTIONS if other != option), "--", "--preset", "debug"])
        assert option.split("=")[0] in capsys.readouterr().err


class JobSide:
    """Plays the job.

    Attributes:
        hub: Of the job.
        said: What has been heard of the node.
    """

    def __init__(self) -> None:
        self.hub = Hub("secret")
        self.said: list[Heard] = []

    def hear_until(self, is_enough: Callable[[], Any], seconds: float = 10.0) -> bool:
        """Lets the node know that the job is there, until enough has been heard."""

        def listen() -> bool:
            self.said += self.hub.poll(0.02)
            self.hub.send({"order": "none"})
            return bool(is_enough())

        return eventually(listen, seconds)

    def messages(self, key: str) -> list[Any]:
        """What the node has said under a key."""
        return [heard.message[key] for heard in self.said if heard.message is not None and key in heard.message]


class Site(JobSide):
    """A job's hub, a node's watch, and its ranks."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.heartbeats = HeartbeatSocket()
        self.ranks: list[subprocess.Popen[str]] = []
        self.link = connect(f"127.0.0.1:{self.hub.port}", "a")
        pids = lambda: [rank.pid for rank in self.ranks]  # noqa: E731
        self.latch = Latch(2)
        self.watch = Watch(self.link, self.heartbeats, self.latch, folder, 1, 30.0, pids)

    def start_rank(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, self.heartbeats.address, str(len(self.ranks)), *arguments]
        self.ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return self.ranks[-1]

    def wait_for_ranks(self) -> None:
        def are_there() -> bool:
            doing = [rank["heartbeat"]["phase"] for ranks in self.messages("ranks")[-1:] for rank in ranks]
            return doing == ["training"] * len(self.ranks)

        assert self.hear_until(are_there), self.said

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
            if rank.stdout is not None:
                rank.stdout.close()
        ending = threading.Thread(target=self.watch.report_end, args=(NodeMessage(failures=[]),))  # ends its thread
        ending.start()
        while ending.is_alive():
            self.hub.poll(0.02)
        self.hub.close()
        self.heartbeats.close()


@pytest.fixture
def make_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    monkeypatch.setattr(watch_module, "_REPORT_SECONDS", 0.2)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def make() -> Site:
            site = Site(Path(folder))
            stack.callback(site.close)
            return site

        yield make


Sites = Callable[..., Site]


def test_the_job_hears_of_the_node_and_its_ranks(make_site: Sites) -> None:
    site = make_site()
    ranks = [site.start_rank(), site.start_rank()]
    site.wait_for_ranks()
    assert site.said[0] == Heard("a", {"node": "a", "pid": os.getpid(), "versions": versions()})
    reported = sorted(site.messages("ranks")[-1], key=lambda rank: rank["heartbeat"]["rank"])
    for number, rank in enumerate(reported):
        wanted = {"rank": number, "pid": ranks[number].pid, "phase": "training", "step": 4}
        assert rank["heartbeat"].items() >= wanted.items()
        assert rank["silence"] < 5.0 and rank["state"] == "sleeping"
    ranks[1].send_signal(signal.SIGSTOP)

    def is_seen_stopped() -> bool:
        silence, state = max((rank["silence"], rank["state"]) for rank in site.messages("ranks")[-1])
        return silence > 0.9 and state == "stopped"

    assert site.hear_until(is_seen_stopped)


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


@pytest.mark.parametrize(("order", "is_open"), [("none", False), ("stacks", False), ("begin", True), ("stop", True)])
def test_orders_that_let_ranks_begin(make_site: Sites, order: str, is_open: bool) -> None:
    """Where the ranks are to stop, they must not wait for ever."""
    site = make_site()
    assert not site.latch.is_open
    site.watch._obey({"order": order})  # not over the network: an order that has not arrived opens nothing either
    assert site.latch.is_open == is_open


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
    assert None not in [heard.message for heard in site.said], "torchrun reports first how they ended"


AGENT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from mlra_scale.cluster.messages import NodeMessage, RankFailure
from mlra_scale.cluster.node import watch as module
from mlra_scale.process_tree import descendants
from mlra_scale.cluster.rank.latch import Latch
from mlra_scale.cluster.rank.heartbeat import HeartbeatSocket
signal.alarm(60)
job, logs, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
module._KILL_SECONDS, module._JOB_SECONDS, module._REPORT_SECONDS = settings["kill"], settings["job"], 0.2
heartbeats = HeartbeatSocket()
exec(settings.get("before", ""))
link, node_rank = module.connect(job, "a"), settings["node_rank"]
latch = Latch(1)
if settings["has_begun"]:
    latch.open()
watch = module.Watch(link, heartbeats, latch, logs, node_rank, settings["lost"], lambda: descendants(os.getpid()))
signal.signal(signal.SIGTERM, watch.ask_to_stop)
# Half a minute is half a second here.
patient = watch._has_ended.wait
watch._has_ended.wait = lambda seconds=None: patient(None if seconds is None else seconds / 60)
code = 0
if settings["has_rank"]:
    rank = subprocess.Popen([sys.executable, "-c", settings["play"], heartbeats.address, "0"])
    code = rank.wait()
if settings["is_stuck"]:
    time.sleep(60)  # as in a rendezvous that never ends
watch.report_end(NodeMessage(failures=[RankFailure(rank=0, code=code, time=0.0, message="")]))
sys.exit(1)
"""


class Agent(JobSide):
    """An agent in a process of its own, as it ends that sometimes.

    Attributes:
        process: The agent.
        attempt: Folder of the attempt's logs.
    """

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._stack, self._calls = stack, folder / "calls"
        stack.callback(self.hub.close)
        self.attempt = folder / "run" / "logs" / "attempt-002"
        self.attempt.mkdir(parents=True)
        (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {self._calls}\n')
        (folder / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "41")
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")

    def start(self, **more: Any) -> None:
        """Starts it, and waits until it has been heard, its rank too."""
        settings = {"kill": 30.0, "job": 0.2, "lost": 30.0, "node_rank": 0, "has_rank": True, "is_stuck": False}
        settings |= {"has_begun": True, **more}
        command = [sys.executable, "-c", AGENT, f"127.0.0.1:{self.hub.port}", str(self.attempt)]
        command += [json.dumps({"play": RANK, **settings})]
        self.process = self._stack.enter_context(subprocess.Popen(command))
        self._stack.callback(self.process.kill)
        is_heard = settings["has_rank"] and "play" not in settings
        assert self.hear_until(lambda: any(self.messages("ranks" if is_heard else "versions")))

    def is_rank_there(self) -> bool:
        """Whether the rank lives."""
        first = next(ranks[0] for ranks in self.messages("ranks") if ranks)
        return process_state(first["heartbeat"]["pid"]) not in ("", "zombie")

    @property
    def calls(self) -> list[str]:
        """What it has asked of Slurm."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    with contextlib.ExitStack() as stack:
        yield Agent(tmp_path, monkeypatch, stack)


@pytest.mark.parametrize("has_rank", [False, True])
def test_an_agent_whose_torchrun_does_not_return_ends(agent: Agent, has_rank: bool) -> None:
    """At once where no rank has come; where ranks were killed, torchrun may first report how they ended."""
    agent.start(has_rank=has_rank, is_stuck=True, kill=0.3 if has_rank else 30.0)
    agent.hub.send({"order": "kill"})
    assert agent.process.wait(10.0) == 1
    assert agent.calls == [] and not (has_rank and agent.is_rank_there())


def newest(number: int) -> str:
    attempts = [JobAttempt(index, "41", ["a"], 1) for index in range(1, number + 1)]
    return json.dumps({"attempts": [asdict(attempt) for attempt in attempts]})


def test_a_rank_without_a_heartbeat_yet_is_ended_too(agent: Agent, tmp_path: Path) -> None:
    """It is still loading its libraries when the job finds a node with others."""
    started = tmp_path / "started"
    agent.start(play=f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    assert agent.hear_until(lambda: started.exists() and started.read_text())
    agent.hub.send({"order": "kill"})
    assert agent.process.wait(10.0) == 1
    assert all_end([int(started.read_text())], 5.0)


def test_ranks_do_not_outlive_the_job_and_it_is_queued_again(agent: Agent) -> None:
    """They must not meet those of the next attempt; and nobody else would queue it."""
    (agent.attempt.parents[1] / "job.json").write_text(newest(2))
    agent.start()
    agent.hub.close()
    assert eventually(lambda: not agent.is_rank_there(), 2.0)
    assert agent.process.wait(10.0) == 1
    assert agent.calls == ["requeue 41"]


def test_a_silent_job_is_lost(agent: Agent) -> None:
    """Its machine has lost power: no connection breaks."""
    agent.start(lost=1.0)
    assert not agent.hear_until(lambda: not agent.is_rank_there(), 1.5), "it is there"
    started = time.monotonic()
    assert agent.process.wait(10.0) == 1 and time.monotonic() - started > 0.7
    assert not agent.is_rank_there() and agent.calls == ["requeue 41"]


@pytest.mark.parametrize(
    ("job_file", "is_signalled", "calls"),
    [
        ("{", False, ["requeue 41"]),
        (newest(3), False, []),
        (newest(2), True, []),
    ],
    ids=["broken file", "another attempt", "signalled"],
)
def test_a_lost_job_is_queued_again_only_where_it_is_lost(
    agent: Agent, job_file: str, is_signalled: bool, calls: list[str]
) -> None:
    """Not where it continues without this node, nor where Slurm ends this node's part too."""
    (agent.attempt.parents[1] / "job.json").write_text(job_file)
    agent.start()
    agent.hub.close()
    if is_signalled:
        agent.process.terminate()
    assert agent.process.wait(10.0) == 1
    assert agent.calls == calls


def test_ranks_that_wait_leave_a_lost_job_to_those_that_train(agent: Agent) -> None:
    agent.start(has_begun=False, job=60.0)
    agent.hub.close()
    assert agent.process.wait(10.0) == 1
    assert agent.calls == [] and not agent.is_rank_there()


def test_a_later_node_queues_a_lost_job_too(agent: Agent) -> None:
    """The first one, which would do it after half a minute, is the one that was lost."""
    agent.start(node_rank=1, job=0.5)
    agent.hub.close()
    assert agent.process.wait(10.0) == 1
    assert agent.calls == ["requeue 41"]


def test_a_run_directory_that_is_not_shared_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_SECONDS_TO_SEE", 0.0)
    missing = f"does not see {tmp_path}, which the job has made: the run directory must be on a shared file system"
    for content in (None, b"\xff\xfe", b"another"):
        if content is not None:
            (tmp_path / "nonce").write_bytes(content)
        assert folder_fault(tmp_path, "a", "abc") == missing
    (tmp_path / "nonce").write_text("abc")
    assert folder_fault(tmp_path, "a", "abc") == ""
    assert (tmp_path / "nonce-a").read_text() == "abc", "for the first rank"
    (tmp_path / "nonce-b").mkdir()
    assert folder_fault(tmp_path, "b", "abc") == f"cannot write to {tmp_path}: Is a directory"


def test_a_run_directory_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    timer = threading.Timer(0.7, (tmp_path / "nonce").write_text, ("abc",))
    timer.start()
    assert folder_fault(tmp_path, "a", "abc") == ""
    timer.join()


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize(("tensor", "expected"), [(2, "1"), (1, None)])
def test_ranks_get_what_cuda_reads_when_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: int, expected: str | None
) -> None:
    """A rank looks at its device before it reads the configuration."""
    (tmp_path / "nonce").write_text("n")
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    given: list[str | None] = []

    def run_ranks(arguments: argparse.Namespace, latch: Latch, name: str, node_rank: int) -> list[RankFailure]:
        given.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        return []

    monkeypatch.setattr(node, "run_ranks", run_ranks)
    with contextlib.closing(Hub("secret")) as hub:
        is_over = threading.Event()

        def listen() -> None:
            while not is_over.is_set():
                hub.poll(0.02)

        thread = threading.Thread(target=listen)
        thread.start()
        replaced = {"--job": f"127.0.0.1:{hub.port}", "--logs": str(tmp_path), "--nonce": "n", "--device": "cuda"}
        kept = [option for option in OPTIONS if option.split("=")[0] not in replaced]
        options = [*kept, *(f"{name}={value}" for name, value in replaced.items())]
        try:
            assert node.main([*options, "--", "--preset", "debug", f"parallel.tensor={tensor}"]) == 0
        finally:
            is_over.set()
            thread.join()
    assert given == [expected]


def test_an_agent_whose_watch_fails_leaves_no_ranks(agent: Agent) -> None:
    """Nobody would see them stand still, or end them when the job says so."""
    fails = "module.Watch._obey = lambda watch, message: 1 / 0 if message.get('order') == 'stacks' else None"
    agent.start(before=fails)
    agent.hub.send({"order": "stacks"})
    assert agent.process.wait(20.0) == 1
    assert eventually(lambda: not agent.is_rank_there())
    assert agent.calls == []


def ends_after_bad_nodes(site: Site) -> bool:
    keys = [key for heard in site.said for key in heard.message or {} if key in ("bad_nodes", "failures")]
    return keys == ["bad_nodes", "failures"] and site.messages("bad_nodes") == [{"a": "ECC"}]


def test_the_end_is_reported_after_what_the_ranks_reported(make_site: Sites) -> None:
    site = make_site()
    assert site.start_rank("ECC").wait(10.0) == 0
    site.hear_until(lambda: False, 0.3)  # torchrun takes a moment to notice
    end = NodeMessage(failures=[RankFailure(rank=0, code=1, time=0.0, message="odd")])
    ending = threading.Thread(target=site.watch.report_end, args=(end,))
    ending.start()
    assert site.hear_until(lambda: site.messages("failures"))
    assert ends_after_bad_nodes(site) and [
        NodeMessage.of({"failures": failures}) for failures in site.messages("failures")
    ] == [end]


def test_a_report_of_a_rank_just_before_the_end_is_not_lost(make_site: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    receive = site.link.receive

    def receive_late() -> list[dict[str, Any]]:
        """The rank has sent it, and torchrun has reported its end, since the ranks were read."""
        monkeypatch.undo()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as rank:
            rank.sendto(b'{"bad_nodes": {"a": "ECC"}}', f"\0{site.heartbeats.address}")
        site.watch._end = NodeMessage(failures=[])
        return receive()

    monkeypatch.setattr(site.link, "receive", receive_late)
    assert site.hear_until(lambda: site.messages("failures"))
    assert ends_after_bad_nodes(site)
