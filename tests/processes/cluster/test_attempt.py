"""How an attempt is judged: real connections from processes that play the agents of nodes; see player.py."""

import json
import os
import socket
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mlra_scale.cluster.channel import TOKEN_VARIABLE, Hub
from mlra_scale.cluster.job import attempt as module
from mlra_scale.cluster.job import step
from mlra_scale.cluster.job.attempt import AttemptRunner
from mlra_scale.cluster.job.step import AttemptPlan
from mlra_scale.cluster.node.__main__ import parse
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.config import ClusterConfig
from tests.processes.cluster.player import PLAYS_VARIABLE, RECORD_VARIABLE, SRUN, QuickHub
from tests.support.waiting import all_end

TRAINING = ("--preset", "debug", "--run-dir", "runs/with space", "parallel.world_size=2")

pytestmark = pytest.mark.timeout(60)


@dataclass
class Outcome:
    """What came of an attempt."""

    folder: Path
    kind: str = ""
    reason: str = ""
    bad_nodes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    console: list[bytes] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)

    @property
    def srun(self) -> dict[str, Any]:
        return json.loads((self.folder / "srun.json").read_text())

    def orders(self, node: str) -> list[tuple[str, float]]:
        lines = (self.folder / f"{node}.orders").read_text().splitlines()
        return [(line.split()[0], float(line.split()[1])) for line in lines]


class Stage:
    """Runs attempts on plays.

    Attributes:
        plan: What is started; tests change it.
        is_stop_asked: Whether the job was signalled.
        before: Called with the attempt before it runs.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self.plan = AttemptPlan(
            nodes=("a", "b"),
            here="a",
            addresses=dict.fromkeys("abc", "127.0.0.1"),
            training=TRAINING,
            logs=folder / "attempt-001",
            settings=LauncherSettings(1, "cpu", ("--label",), ("apptainer", "exec", "image.sif", "python3")),
            cluster=ClusterConfig(start_minutes=0.5, stop_minutes=0.5, step_memory="64G"),
            hang_seconds=30.0,
        )
        self.is_stop_asked: Callable[[Outcome], bool] = lambda outcome: False
        self.before: Callable[[AttemptRunner], None] = lambda attempt: None

    def limit(self, **values: float) -> None:
        """Changes fields of the configuration's section `cluster`."""
        self.plan = replace(self.plan, cluster=self.plan.cluster.model_copy(update=values))

    def run(self, **plays: str) -> Outcome:
        """Runs an attempt; a play is given by the node's name."""
        outcome = Outcome(self._folder)
        self._monkeypatch.setenv(
            PLAYS_VARIABLE, json.dumps({node: textwrap.dedent(play) for node, play in plays.items()})
        )
        attempt = AttemptRunner(
            self.plan,
            outcome.console.append,
            outcome.said.append,
            lambda: self.is_stop_asked(outcome),
            lambda: outcome.progress.append(time.monotonic()),
        )
        self.before(attempt)
        started = time.monotonic()
        end = attempt.run()
        outcome.kind, outcome.reason, outcome.bad_nodes = end.kind, end.reason, dict(end.bad_nodes)
        outcome.seconds, outcome.failures = time.monotonic() - started, [*end.failures]
        return outcome


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path))
    monkeypatch.setattr(step, "Hub", QuickHub)
    for name, seconds in (("EVIDENCE", 0.3), ("END", 0.6), ("STACKS", 0.3), ("KILL", 5.0), ("SRUN", 0.5)):
        monkeypatch.setattr(module, f"_{name}_SECONDS", seconds)
    return Stage(tmp_path, monkeypatch)


def has_trained(outcome: Outcome) -> bool:
    """Whether a rank trains; all nodes of these plays have connected before."""
    return bool(outcome.progress)


def test_all_end_well(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE", "SLURM_DISTRIBUTION"):
        monkeypatch.setenv(name, "64")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    play = """
        me.join()
        print(f"hello from {me.name}\\n", end="", flush=True)  # in one write: both nodes print into one pipe
        me.report(rank(int(me.name == "b"), step=1, phase="preparing"))
        me.report(rank(int(me.name == "b"), step=7))
        me.connect("x").send({"failures": [failure(5, 2)]})  # of no node of this attempt
        me.wait_for("begin")
        time.sleep(0.3)
        me.end()
    """
    outcome = stage.run(a=play, b=play)
    assert (outcome.kind, outcome.reason, outcome.bad_nodes) == ("done", "all steps are done", {})
    assert outcome.failures == [] and outcome.said == []
    assert outcome.progress
    assert sorted(outcome.console) == [b"hello from a\n", b"hello from b\n"]
    srun = outcome.srun
    assert {"--nodelist=a,b", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--no-kill"} <= set(srun["options"])
    assert {"--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none", "--mem=64G"} <= set(srun["options"])
    assert srun["options"][-1] == "--label", "what the user gives wins"
    assert srun["command"][:7] == [*stage.plan.settings.python, "-u", "-m", "mlra_scale.cluster.node"]
    arguments = parse(srun["command"][7:])
    assert arguments.training == list(TRAINING) and arguments.logs == stage.plan.logs
    assert (stage.plan.logs / "nonce").read_text() == arguments.nonce
    assert (arguments.nodes, arguments.processes, arguments.run_id) == (2, 1, "attempt-001")
    assert (arguments.start_seconds, arguments.lost_seconds, arguments.device) == (30.0, 30.0, "cpu")
    assert arguments.master.startswith("127.0.0.1:") and arguments.job.startswith("127.0.0.1:")
    assert "SLURM_NTASKS" not in srun["environment"] and "SLURM_NNODES" not in srun["environment"]
    assert srun["environment"]["SLURM_JOB_ID"] == "41" and len(srun["environment"][TOKEN_VARIABLE]) == 32
    assert TOKEN_VARIABLE not in os.environ and srun["environment"][TOKEN_VARIABLE] not in str(srun["command"])


def test_nodes_that_have_ipv6_addresses_only(stage: Stage) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    stage.plan = replace(stage.plan, addresses=dict.fromkeys("ab", "::1"))
    outcome = stage.run(a="me.join(); me.end()", b="me.join(); me.end()")
    assert outcome.kind == "done"
    arguments = parse(outcome.srun["command"][7:])
    assert arguments.master.startswith("[::1]:") and arguments.job.startswith("[::1]:")


def test_ranks_do_not_outlive_an_error_of_the_job(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(attempt: AttemptRunner, hub: Hub) -> None:
        if (stage.plan.logs.parent / "b.here").exists():
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(AttemptRunner, "_watch", odd)
    play = """
        with open(f"{os.environ['TEST_RECORD']}/{me.name}.pid", "w") as file:
            file.write(str(os.getpid()))
        me.join()
        time.sleep(30)
    """
    with pytest.raises(OSError, match="Too many open files"):
        stage.run(a=play, b=play)
    assert all_end([int((stage.plan.logs.parent / f"{name}.pid").read_text()) for name in ("a", "b")])


def test_a_killed_rank_is_the_cause_though_others_die_of_it_before_it_is_heard(stage: Stage) -> None:
    outcome = stage.run(
        a='me.join(); me.end(failure(0, 1, 100.0, "Connection reset by peer"))',
        b="me.join(); time.sleep(0.1); me.end(failure(1, -9, 101.0))",
    )
    assert (outcome.kind, outcome.reason) == ("failed", "rank 1 on b was killed by SIGKILL")
    assert outcome.failures == [
        "rank 1 on b was killed by SIGKILL",
        "rank 0 on a ended with exit code 1 (FAILED): Connection reset by peer",
    ]
    assert outcome.bad_nodes == {}


def test_the_earliest_error_is_the_cause(stage: Stage) -> None:
    outcome = stage.run(
        a='me.join(); me.end(failure(0, 1, 101.0, "Connection reset by peer"))',
        b='me.join(); time.sleep(0.2); me.end(failure(1, 1, 100.0, "ValueError: odd"))',
    )
    assert (outcome.kind, outcome.reason) == ("failed", "rank 1 on b ended with exit code 1 (FAILED): ValueError: odd")
    assert "rank 0 on a ended with exit code 1 (FAILED): Connection reset by peer; the attempt ends" in outcome.said


KILLED = 'me.join(); me.report(rank(int(me.name == "b"))); me.obey_kill(int(me.name == "b"))'


def test_ranks_that_wait_for_a_failed_one_are_ended_and_are_not_the_cause(stage: Stage) -> None:
    a = 'me.join(); me.end(failure(0, 1, time.time(), f"at {time.monotonic()}"))'
    outcome = stage.run(a=a, b=KILLED)
    assert outcome.kind == "failed" and outcome.bad_nodes == {}
    ((order, at),) = outcome.orders("b")
    failed_at = float(outcome.failures[0].rsplit(" ", 1)[1])
    assert order == "kill" and at - failed_at > 0.25, "they may report first what they met"
    assert outcome.reason == outcome.failures[0] and outcome.reason.startswith("rank 0 on a ended with exit code 1")


def test_a_node_whose_agent_ends_as_ordered_is_not_lost(stage: Stage) -> None:
    b = "me.join(); me.wait_for('kill'); os._exit(1)"
    outcome = stage.run(a='me.join(); me.end(failure(0, 1, time.time(), "ValueError: odd"))', b=b)
    assert (outcome.kind, outcome.bad_nodes) == ("failed", {})


@pytest.mark.parametrize("way", ["me.link.close(); time.sleep(30)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_node_that_vanishes_is_lost(stage: Stage, way: str) -> None:
    """Though srun still waits for it."""
    b = f"me.join(); me.report(rank(1)); time.sleep(0.3); {way}"
    outcome = stage.run(a=KILLED, b=b)
    assert (outcome.kind, outcome.reason) == ("lost_node", "node b is lost: its connection broke")
    assert outcome.bad_nodes == {"b": "was lost"} and outcome.seconds < 25.0
    assert outcome.failures == ["rank 0 on a was killed by SIGKILL"]
    assert outcome.orders("a")[0][0] == "kill"


def test_an_srun_that_does_not_end_is_killed(stage: Stage) -> None:
    """It waits for a node of which Slurm does not know yet that it is lost."""
    stage.plan = replace(stage.plan, settings=replace(stage.plan.settings, srun=("--test-stubborn",)))
    outcome = stage.run(a=KILLED, b="me.join(); me.link.close(); os.close(1); os.close(2); time.sleep(30)")
    assert (outcome.kind, outcome.bad_nodes) == ("lost_node", {"b": "was lost"})
    assert outcome.seconds < 25.0


REPORTING = "me.connect()\nfor _ in range(7):\n    me.report(rank(0)); time.sleep(0.2)\nme.obey_kill(0)"


def test_a_silent_node_is_lost(stage: Stage) -> None:
    """Its machine has lost power: no connection breaks."""
    stage.limit(lost_node_seconds=1.0)
    outcome = stage.run(a=REPORTING, b="me.connect(); me.report(rank(1)); time.sleep(30)")
    assert (outcome.kind, outcome.reason) == ("lost_node", "node b is lost: nothing was heard of it for 1 s")
    assert outcome.bad_nodes == {"b": "was lost"}


def test_a_node_that_never_connects_is_lost(stage: Stage) -> None:
    """It has five minutes, as a container may have to be fetched."""
    stage.limit(lost_node_seconds=1.0)

    def age(attempt: AttemptRunner) -> None:
        attempt._nodes["b"].heard -= 299.2

    stage.before = age
    outcome = stage.run(a=REPORTING, b="time.sleep(30)")
    assert (outcome.kind, outcome.reason) == ("lost_node", "node b is lost: nothing was heard of it for 300 s")
    assert outcome.bad_nodes == {"b": "was lost"} and outcome.seconds > 0.7


def test_a_hang_names_the_rank_and_asks_for_stacks(stage: Stage) -> None:
    stage.plan = replace(stage.plan, nodes=("a", "b", "c"), hang_seconds=5.0)
    play = """
        number = "abc".index(me.name)
        me.join()
        me.report(rank(number, step=3 - number // 2))
        me.meet("there")
        time.sleep(0.3)
        me.report(rank(number, step=3 - number // 2, seconds=6.0 + number))
        me.wait_for("stacks")
        me.obey_kill(number)
    """
    outcome = stage.run(a=play, b=play, c=play)
    assert outcome.kind == "hung" and outcome.bad_nodes == {}
    where = "rank 2 is at step 2, training, all_reduce (x.py:1) on c, while "
    assert outcome.reason.startswith(f"no progress for 6 s: {where}") and "rank 1" not in outcome.reason
    assert outcome.said[0] == f"hang: {outcome.reason}" and f"{stage.plan.logs}/rank-*.stacks" in outcome.said[1]
    for node in "abc":
        (stacks, asked_at), (kill, killed_at) = outcome.orders(node)
        assert (stacks, kill) == ("stacks", "kill") and killed_at - asked_at > 0.2, "time to write them"


def test_a_hang_before_the_first_step_has_a_limit_of_its_own(stage: Stage) -> None:
    stage.plan = replace(stage.plan, hang_seconds=0.1)
    stage.limit(start_minutes=0.9 / 60)
    play = """
        number = int(me.name == "b")
        me.join()
        me.report(rank(number, step=0, phase=("preparing", "connecting")[number], seconds=100.0))
        me.obey_kill(number)
    """
    outcome = stage.run(a=play, b=play)
    assert outcome.kind == "hung" and outcome.reason.startswith("no first step for 1 s: ")
    assert outcome.seconds > 0.9 and outcome.progress == []


def test_agents_that_end_as_ordered_have_not_done_all_steps(stage: Stage) -> None:
    """No rank has come; there is nothing that torchrun could say."""
    stage.limit(start_minutes=0.8 / 60)
    play = "me.join(); me.wait_for('kill'); os._exit(1)"
    outcome = stage.run(a=play, b=play)
    assert outcome.kind == "hung" and outcome.reason.startswith("no first step for 1 s")


def test_progress_of_one_rank_is_no_hang(stage: Stage) -> None:
    stage.plan = replace(stage.plan, hang_seconds=0.5)
    a = """
        me.connect()
        me.report(rank(0))
        me.meet("there")
        for step in range(6):
            me.report(rank(0, step=step, seconds=0.1))
            time.sleep(0.15)
        me.end()
    """
    b = 'me.connect(); me.meet("there"); time.sleep(0.2); me.report(rank(1, seconds=9.0)); time.sleep(0.7); me.end()'
    outcome = stage.run(a=a, b=b)
    assert outcome.kind == "done"


def test_a_stop_that_ranks_obey(stage: Stage) -> None:
    stage.is_stop_asked = has_trained
    play = """
        number = int(me.name == "b")
        me.join()
        me.report(rank(number))
        me.wait_for("stop")
        time.sleep(0.5 * number)  # longer than the others of a failed rank may take
        is_killed = {"order": "kill"} in me.link.receive()
        me.end(failure(number, -9 if is_killed else 5))
    """
    outcome = stage.run(a=play, b=play)
    assert [text[-11:] for text in outcome.failures] == ["(PREEMPTED)"] * 2
    assert (outcome.kind, outcome.reason) == ("preempted", "stopped by a signal, with a checkpoint")
    assert outcome.said == ["the job was signalled: the ranks save after their step and stop"]
    assert outcome.bad_nodes == {}


def test_a_signal_to_one_node_stops_all(stage: Stage) -> None:
    b = "me.join(); me.report(rank(1)); time.sleep(0.3); me.link.send({'signalled': True})"
    stop = "\nme.wait_for('stop'); me.end(failure(%d, 5))"
    outcome = stage.run(a="me.join(); me.report(rank(0))" + stop % 0, b=b + stop % 1)
    assert outcome.kind == "preempted" and "with a checkpoint" in outcome.reason
    assert outcome.said == ["b was signalled: the ranks save after their step and stop"]


def test_a_stop_reaches_nodes_that_connect_after_it(stage: Stage) -> None:
    stage.is_stop_asked = lambda outcome: True
    stage.limit(stop_minutes=1.5 / 60)
    play = """
        number = int(me.name == "b")
        time.sleep(0.5)
        me.connect()
        me.report(rank(number))
        me.wait_for("stop")
        me.end(failure(number, 5))
    """
    outcome = stage.run(a=play, b=play)
    assert (outcome.kind, outcome.reason) == ("preempted", "stopped by a signal, with a checkpoint")


def test_a_signal_that_ends_ranks_before_they_can_save_is_no_failure(stage: Stage) -> None:
    stage.is_stop_asked = has_trained
    play = """
        number = int(me.name == "b")
        me.join(); me.report(rank(number)); me.wait_for("stop")
        me.end(failure(number, -10, number))
    """
    outcome = stage.run(a=play, b=play)
    reason = "stopped by a signal, without a checkpoint of its last step (rank 0 on a was killed by SIGUSR1)"
    assert (outcome.kind, outcome.reason) == ("preempted", reason)
    assert len(outcome.said) == 1


def test_a_stop_that_takes_too_long(stage: Stage) -> None:
    stage.is_stop_asked = has_trained
    stage.limit(stop_minutes=0.7 / 60)
    outcome = stage.run(a=KILLED, b=KILLED)
    assert outcome.kind == "preempted" and "without a checkpoint of its last step" in outcome.reason
    assert outcome.said[1] == "ranks did not stop within 1 s of the signal; they are ended"
    assert outcome.orders("a")[0][0] == "kill"


def test_a_node_with_other_versions_is_bad(stage: Stage) -> None:
    stage.plan = replace(stage.plan, nodes=("a", "b", "c"))
    right, wrong = "me.join(torch='2.13')", "me.join(torch='2.12')"
    rest = "; me.report(rank(0)); me.obey_kill(0)"
    outcome = stage.run(a=right + rest, b=wrong + rest, c="time.sleep(0.4); " + right + rest)
    assert (outcome.kind, outcome.reason) == ("bad_node", "b: has torch 2.12 instead of 2.13")
    assert outcome.bad_nodes == {"b": "has torch 2.12 instead of 2.13"}
    assert outcome.said == ["bad node b: has torch 2.12 instead of 2.13"]


def test_a_node_that_its_ranks_find_to_be_bad(stage: Stage) -> None:
    """Also where another node reports it, and the job is to stop."""
    stage.is_stop_asked = has_trained
    a = "me.join(); me.report(rank(0)); me.link.send({'bad_nodes': {'b': 'wrong sum'}}); me.end(failure(0, 6))"
    b = "me.join(); me.link.send({'bad_nodes': {'b': 'wrong sum'}}); me.end(failure(1, 6))"
    outcome = stage.run(a=a, b=b)
    assert (outcome.kind, outcome.reason, outcome.bad_nodes) == ("bad_node", "b: wrong sum", {"b": "wrong sum"})
    assert outcome.said.count("bad node b: wrong sum") == 1


@pytest.mark.parametrize(
    ("code", "kind", "name"),
    [
        (2, "bad_input", "BAD_INPUT"),
        (3, "non_finite", "NON_FINITE"),
        (4, "failed", ""),
        (8, "export_failed", "EXPORT_FAILED"),
    ],
)
def test_an_exit_code_decides_the_kind_of_the_end(stage: Stage, code: int, kind: str, name: str) -> None:
    """Running again after bad input or numbers that are none gives the same; a signal does not change that."""
    stage.is_stop_asked = lambda outcome: name != "" and has_trained(outcome)
    a = f"me.join(); me.report(rank(0)); time.sleep(0.3); me.end(failure(0, {code}, 100.0))"
    outcome = stage.run(a=a, b="me.join(); me.report(rank(1)); time.sleep(0.4); me.end(failure(1, 1, 100.5))")
    assert outcome.kind == kind
    assert outcome.reason == f"rank 0 on a ended with exit code {code} ({name or 'CHECKPOINT_FAILED'})"


def test_input_that_is_bad_on_other_nodes_only_is_a_fault_of_these_nodes(stage: Stage) -> None:
    """A file is missing there, say."""
    end = "me.join(); me.report(rank(%d)); me.end(failure(%d, %d))"
    outcome = stage.run(a=end % (0, 0, 1), b=end % (1, 1, 2))
    reason = f"rank 1 on b ended with exit code 2 (BAD_INPUT); see its log in {stage.plan.logs}"
    assert (outcome.kind, outcome.reason, outcome.bad_nodes) == ("bad_node", reason, {"b": reason})


def test_a_node_without_the_run_directory_is_bad(stage: Stage) -> None:
    """Its agent has started no rank; the attempt is not done, even if all agents end like this."""
    b = """
        me.join()
        me.link.send({"failures": [], "bad_nodes": {me.name: "does not see it"}})
        me.link.close()
        sys.exit(1)
    """
    outcome = stage.run(a=KILLED, b=b)
    assert (outcome.kind, outcome.bad_nodes) == ("bad_node", {"b": "does not see it"})
    assert stage.run(a=b, b=b).kind == "bad_node"


def test_the_agent_beside_the_job_is_not_a_lost_node(stage: Stage) -> None:
    outcome = stage.run(a="me.join(); me.report(rank(0)); time.sleep(0.3); os._exit(1)", b=KILLED)
    assert outcome.kind == "failed" and outcome.bad_nodes == {}
    assert outcome.reason == "the agent of a ended without a report (its connection broke)"


def test_an_agent_that_cannot_be_started_is_lost_with_its_node(stage: Stage) -> None:
    """srun ends all others then."""
    outcome = stage.run(a="me.connect(); time.sleep(0.3); os._exit(1)", b="time.sleep(0.6)")
    assert outcome.kind == "lost_node" and outcome.reason == "node b is lost: its agent could not be started"
    assert [*outcome.bad_nodes] == ["b"]


@pytest.mark.parametrize("says", ["b: task 1: Killed", "b: tasks 1-2: Exited with exit code 127"])
def test_an_agent_that_ends_before_it_connects_is_lost_with_its_node(
    says: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection breaks; only srun says that its task has ended. Five minutes are for nodes that still start."""
    monkeypatch.setattr(module, "_BROKEN_SECONDS", 0.2)
    outcome = stage.run(
        a="me.connect(); me.obey_kill()", b=f"time.sleep(0.2); print('srun: error: {says}', flush=True); os._exit(9)"
    )
    reason = says.split(": ", 2)[2]
    assert outcome.kind == "lost_node" and outcome.seconds < 20
    assert outcome.reason == f"node b is lost: its agent ended before it connected ({reason})"
    assert outcome.bad_nodes == {"b": "was lost"}


def test_what_srun_prints_of_an_agent_that_has_connected_is_no_loss(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BROKEN_SECONDS", 0.0)
    says = "print('srun: error: b: task 1: Exited with exit code 1', flush=True)"
    outcome = stage.run(a="me.join(); time.sleep(0.5); me.end()", b=f"me.join(); {says}; time.sleep(0.5); me.end()")
    assert outcome.kind == "done"


def test_a_node_that_dies_while_others_still_start_is_the_lost_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BROKEN_SECONDS", 0.2)
    stage.plan = replace(stage.plan, here="b")
    outcome = stage.run(
        a="me.connect(); time.sleep(0.3); os._exit(1)", b="time.sleep(1.0); me.connect(); me.obey_kill()"
    )
    assert outcome.kind == "lost_node" and outcome.reason == "node a is lost: its connection broke"
    assert [*outcome.bad_nodes] == ["a"]


def test_ranks_that_only_wait_for_the_network_have_less_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEET_SECONDS", 0.5)
    play = "me.join(); me.report(rank(%d, 0, 'connecting', 0.6)); me.obey_kill(%d)"
    outcome = stage.run(a=play % (0, 0), b=play % (1, 1))
    assert outcome.kind == "hung" and outcome.reason.startswith("no first step for 1 s: "), outcome.reason
    slow = "me.join(); me.report(rank(%d, 0, '%s', 0.6)); time.sleep(0.5); me.end()"
    outcome = stage.run(a=slow % (0, "connecting"), b=slow % (1, "starting"))
    assert outcome.kind == "done", "one that still loads its libraries does not"


def test_a_message_that_is_not_understood_ends_nothing(stage: Stage) -> None:
    strange = "me.join(); me.link.send({'ranks': [{'heartbeat': 3}]}); me.link.send({}); me.report(rank(0)); me.end()"
    outcome = stage.run(a=strange, b="me.join(); me.end()")
    assert outcome.kind == "done" and outcome.said[0].startswith("a sent a message that is not understood: ")


def test_an_srun_that_fails_is_a_failure_with_its_code(stage: Stage) -> None:
    outcome = stage.run()
    assert outcome.kind == "failed" and outcome.bad_nodes == {}
    assert outcome.reason == "srun ended with exit code 1 and nothing was heard of a, b"


def test_nodes_that_outlast_the_end_of_others_are_ended(stage: Stage) -> None:
    outcome = stage.run(a="me.join(); me.end()", b=KILLED)
    assert (outcome.kind, outcome.reason) == ("failed", "rank 1 on b was killed by SIGKILL")
    assert outcome.seconds > 0.6


def test_a_torchrun_that_fails_is_a_failure_of_its_node(stage: Stage) -> None:
    play = "me.join(); me.end(failure(None, 1, 100.0, 'torchrun: timed out'))"
    outcome = stage.run(a=play, b=play.replace("100", "101"))
    assert (outcome.kind, outcome.reason) == ("failed", "a: torchrun: timed out")
