"""From one attempt to the next, with stand-ins for Slurm's commands; tests/slurm has the real ones."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlra_scale.cluster import check, slurm
from mlra_scale.cluster.check import CheckResult
from mlra_scale.cluster.job import __main__ as job
from mlra_scale.cluster.job import attempt, spare, step
from mlra_scale.cluster.job.__main__ import Job, main
from mlra_scale.cluster.job_file import JobAttempt, JobFile
from mlra_scale.cluster.settings import LauncherSettings
from mlra_scale.cluster.slurm import Allocation
from mlra_scale.config import ConfigError, load_config
from tests.processes.cluster.player import CHECK_VARIABLE, PLAYS_VARIABLE, RECORD_VARIABLE, SRUN, QuickHub

SCONTROL = """#!/bin/sh
case "$*" in
*"show hostnames"*) printf 'a\\nb\\n' ;;
*"show node"*) [ ! -e "$TEST_RECORD/silent" ] || exit 1; echo "NodeAddr=127.0.0.1 State=DOWN*" ;;
*"show job"*)
    # Slurm is asked first at the job's start.
    if [ -e "$TEST_RECORD/asked" ]; then restarts=$TEST_RESTARTS; else restarts=2; touch "$TEST_RECORD/asked"; fi
    echo "JobId=41 JobState=$TEST_JOB_STATE Restarts=$restarts EndTime=$TEST_END_TIME ExcNodeList=(null)" ;;
*) echo "$@" >> "$TEST_RECORD/scontrol"
   case "$*" in "$TEST_REFUSED"*) echo "refused" >&2; exit 1 ;; esac ;;
esac
"""
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("own_handlers")]


class Desk:
    """Starts jobs on plays.

    Attributes:
        run: Their run directory.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self.run = folder / "run"

    def job(self, *overrides: str, **plays: str) -> int:
        """Runs a job; returns its exit code."""
        texts = {node: textwrap.dedent(play) for node, play in plays.items()}
        self._monkeypatch.setenv(PLAYS_VARIABLE, json.dumps(texts))
        return main(["--preset", "debug", "--run-dir", str(self.run), "train.device=cpu", *overrides])

    @property
    def file(self) -> JobFile:
        return JobFile.read(self.run / "job.json")

    @property
    def ends(self) -> list[tuple[str | None, list[str]]]:
        return [(attempt.end, attempt.nodes) for attempt in self.file.attempts]

    @property
    def orders(self) -> list[str]:
        path = self._folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        RECORD_VARIABLE: str(tmp_path),
        "TEST_JOB_STATE": "RUNNING",
        "TEST_RESTARTS": "2",
        "TEST_END_TIME": "Unknown",
        "TEST_REFUSED": "nothing",
        "TEST_JOB": str(os.getpid()),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NAME": "deep",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_RESTART_COUNT": "2",
        "SLURMD_NODENAME": "a",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(step, "Hub", QuickHub)
    for name, seconds in (("EVIDENCE", 1.0), ("END", 3.0), ("KILL", 1.5), ("SRUN", 0.5)):
        monkeypatch.setattr(attempt, f"_{name}_SECONDS", seconds)
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN", 0.0)
    yield Desk(tmp_path, monkeypatch)


def test_a_failed_attempt_is_followed_by_another_on_the_same_nodes(desk: Desk) -> None:
    play = """
        number = int(me.name == "b")
        me.join()
        print(f"hello from {me.name}\\n", end="", flush=True)
        me.report(rank(number))
        me.meet(me.run_id)
        if me.run_id == "attempt-001":
            me.end(failure(number, 1, number, "ValueError: odd"))
        me.end()
    """
    assert desk.job(a=play, b=play) == 0
    file = desk.file
    assert (file.state, file.reason) == ("done", "all steps are done")
    assert (file.job_id, file.name, file.num_requeues) == ("41", "deep", 2)
    assert desk.ends == [("failed", ["a", "b"]), ("done", ["a", "b"])] and desk.orders == []
    first, second = file.attempts
    assert first.reason == "rank 0 on a ended with exit code 1 (FAILED): ValueError: odd" and len(first.failures) == 2
    assert (second.number, second.num_ranks, second.failures) == (2, 2, [])
    assert second.first_step_seconds is not None and second.ended is not None
    console = (desk.run / "logs" / "console.log").read_text()
    assert console.count("hello from a\n") == 2 and "attempt 1 ended: failed: rank 0 on a" in console
    assert file.console == str(desk.run / "logs" / "console.log")


SPARES = """
number, console = int(me.name == "b"), me.logs.parent / "console.log"
me.join()
if me.is_spare:
    if me.run_id == "attempt-002":
        DOES
    me.report(rank(number, phase="waiting"))
    me.wait_to_begin()
me.report(rank(number))
if me.run_id == "attempt-001":
    while UNTIL not in console.read_text():
        time.sleep(0.02)
    me.end(failure(number, 1, number, "odd"))
print(f"{me.run_id} {me.is_spare}\\n", end="", flush=True)  # in one write: two nodes share the output
me.end()
"""


@pytest.mark.parametrize(
    ("does", "until", "is_taken"),
    [
        ("pass", "spare ranks have loaded their libraries and wait", True),
        ("me.end(failure(number, 1))", "the spare ranks have failed (", False),
        pytest.param(
            *("me.report(rank(number, phase='starting')); me.wait_to_begin()", "attempt 1: training since", False),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["waits", "fails", "loads still"],
)
def test_an_attempt_is_made_ready_while_the_one_before_it_runs(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, does: str, until: str, is_taken: bool
) -> None:
    """What comes of it is only whether the next one starts from nothing."""
    monkeypatch.setattr(spare, "_DELAY_SECONDS", 0.0)
    play = SPARES.replace("DOES", does).replace("UNTIL", repr(until))
    assert desk.job("cluster.spares=true", a=play, b=play) == 0
    assert desk.ends == [("failed", ["a", "b"]), ("done", ["a", "b"])]
    console = (desk.run / "logs" / "console.log").read_text()
    assert console.count(f"attempt-002 {is_taken}\n") == 2
    assert console.count("the spare ranks begin") == is_taken
    logs = sorted(path.name for path in (desk.run / "logs").iterdir() if path.is_dir())
    assert logs == ["attempt-001", "attempt-002"], "nothing is left of one that did not begin"


def test_spare_ranks_begin_while_the_controller_does_not_answer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes' addresses are known since the first attempt, and srun has its step already."""
    monkeypatch.setattr(spare, "_DELAY_SECONDS", 0.0)
    silent = (
        f"import pathlib; pathlib.Path(os.environ[{RECORD_VARIABLE!r}], 'silent').touch(); me.end(failure(number, 1"
    )
    play = SPARES.replace("DOES", "pass").replace("UNTIL", "'loaded their libraries and wait'")
    play = play.replace("me.end(failure(number, 1", silent)
    assert desk.job("cluster.spares=true", a=play, b=play) == 0
    assert desk.ends == [("failed", ["a", "b"]), ("done", ["a", "b"])]
    assert "the spare ranks begin" in (desk.run / "logs" / "console.log").read_text()


def test_spare_ranks_that_loaded_other_versions_do_not_begin(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of the package while the job runs: the next attempt has it on all ranks."""
    monkeypatch.setattr(spare, "_DELAY_SECONDS", 0.0)
    console = desk.run / "logs" / "console.log"
    monkeypatch.setattr(attempt, "versions", lambda: {"torch": "2" if "and wait" in console.read_text() else "1"})
    monkeypatch.setattr(attempt, "odd_ones", lambda *arguments: {})
    play = SPARES.replace("DOES", "pass").replace("UNTIL", "'loaded their libraries and wait'")
    assert desk.job("cluster.spares=true", a=play, b=play) == 0
    said = console.read_text()
    assert said.count("attempt-002 False\n") == 2 and "the spare ranks begin" not in said


@pytest.mark.timeout(30)  # less than the player's own limit
@pytest.mark.parametrize("is_elastic", [True, False])
def test_spare_ranks_on_a_lost_node_are_not_waited_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, is_elastic: bool
) -> None:
    monkeypatch.setattr(spare, "_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(attempt, "_DISCARD_SECONDS", 1e6)
    does = "me.report(rank(number, phase='waiting'))\n        while number: time.sleep(1.0)"
    play = SPARES.replace("DOES", does).replace("UNTIL", "'loaded their libraries and wait'")
    play = play.replace('me.end(failure(number, 1, number, "odd"))', "os._exit(1) if number else me.obey_kill(0)")
    assert desk.job("cluster.spares=true", f"cluster.elastic={is_elastic}", a=play, b=play) == 0
    assert desk.ends == [("lost_node", ["a", "b"]), *([("done", ["a"])] if is_elastic else [])]
    assert "the spare ranks begin" not in (desk.run / "logs" / "console.log").read_text()


def test_a_stop_ends_the_spare_ranks_and_the_ranks_that_train(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "_DELAY_SECONDS", 0.0)
    play = """
        number, console = int(me.name == "b"), me.logs.parent / "console.log"
        me.join()
        if me.is_spare:
            me.report(rank(number, phase="waiting"))
            me.wait_for("kill")
            me.end()
        me.report(rank(number))
        while number and "loaded their libraries and wait" not in console.read_text():
            time.sleep(0.02)
        if number:
            os.kill(int(os.environ["TEST_JOB"]), signal.SIGUSR1)
        me.wait_for("stop")
        me.end(failure(number, 5))
    """
    assert desk.job("cluster.spares=true", a=play, b=play) == 0
    assert desk.ends == [("preempted", ["a", "b"])] and desk.file.state == "preempted"
    assert [path.name for path in (desk.run / "logs").iterdir() if path.is_dir()] == ["attempt-001"]


CHECKPOINT = """
import datetime
with open(me.logs.parent.parent / "events.jsonl", "a") as file:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    file.write('{"time": "%s", "event": "checkpoint", "step": 10}\\n' % time)
"""
FAIL = "me.connect(); me.end(failure(0, 1, 0, 'odd'))"


def test_a_checkpoint_begins_the_count_of_failures_anew(desk: Desk) -> None:
    indented = textwrap.indent(CHECKPOINT, "    ")
    assert desk.job("cluster.max_failures=2", a=f"if me.run_id == 'attempt-002':\n{indented}\n{FAIL}") == 1
    assert [attempt.has_progressed for attempt in desk.file.attempts] == [False, True, False, False]
    assert desk.file.state == "failed" and desk.file.reason.startswith("2 failures in a row") and desk.orders == []


def test_a_signal_to_the_job_sends_it_back_to_the_queue(desk: Desk) -> None:
    play = """
        number = int(me.name == "b")
        me.join()
        me.report(rank(number))
        if number:
            time.sleep(0.5)
            os.kill(int(os.environ["TEST_JOB"]), signal.SIGUSR1)
        me.wait_for("stop")
        me.end(failure(number, 5))
    """
    assert desk.job(a=play, b=play) == 0
    assert desk.file.state == "preempted" and desk.ends == [("preempted", ["a", "b"])]
    assert desk.orders == ["requeue 41"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "it is Slurm's way of ending the script now"


ENDED = "me.connect(); me.report(rank(1)); me.obey_kill(1)"
BAD = "me.connect(); me.link.send({'bad_nodes': {'b': 'wrong sum'}}); me.end(failure(0, 6))"


@pytest.mark.parametrize("layout", ["manual", "auto"])
def test_an_elastic_job_continues_without_a_bad_node(
    desk: Desk, capfdbinary: pytest.CaptureFixture[bytes], layout: str
) -> None:
    """With parallel.layout=auto on the layout that a check has chosen for the nodes that are left."""
    a = f"if me.num_nodes == 1:\n    me.connect(); me.end()\n{BAD}"
    assert desk.job("cluster.elastic=true", f"parallel.layout={layout}", a=a, b=ENDED) == 0
    assert desk.ends == [("bad_node", ["a", "b"]), ("done", ["a"])]
    command = json.loads((desk.run.parent / "srun.json").read_text())["command"]
    assert "parallel.world_size=1" in command
    if layout == "auto":
        assert "train.micro_batch_size=1" in command and "train.micro_batch_size=2" not in command
        assert capfdbinary.readouterr().out.count(b"the plan") == 2


def test_a_check_that_refuses_fewer_nodes_sends_the_job_back_to_the_queue(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits the memory of all nodes need not fit that of those that are left: the input is not bad."""
    monkeypatch.setenv(CHECK_VARIABLE, "too few")
    assert desk.job("cluster.elastic=true", "parallel.layout=auto", a=BAD, b=ENDED) == 0
    assert desk.file.state == "requeued" and [end for end, _ in desk.ends] == ["bad_node", "lost_node"]
    assert "data.path = None" in desk.file.reason


@pytest.mark.parametrize(
    ("device", "gib", "expected"),
    [("NVIDIA A100-SXM4-40GB", 39.4, []), ("NVIDIA H100 80GB HBM3", 79.1, [2]), ("NVIDIA H200", 139.8, [1, 2])],
)
def test_fewer_nodes_are_judged_by_the_devices_that_the_check_has_seen(
    desk: Desk, device: str, gib: float, expected: list[int]
) -> None:
    allocation = Allocation("41", "deep", ("a", "b", "c"), "a", 1)
    arguments = ["--run-dir", str(desk.run), "--preset", "gpt2-mlra-72l-wide", "parallel.layout=auto"]
    it = Job(arguments, allocation, LauncherSettings(4, "cuda", (), ("python",)))
    it._checks[3] = CheckResult(device=device, memory=gib * 2**30)
    assert [number for number in (1, 2) if it._divides_over(number)] == expected


@pytest.mark.parametrize(("names", "is_accepted"), [("embedding.*", True), ("nothing.*", False)])
def test_a_rule_that_matches_nothing_is_refused_on_any_number_of_nodes(
    desk: Desk, names: str, is_accepted: bool
) -> None:
    rule = f"optim.rules=[{{names: '{names}', lr_factor: 2}}]"
    arguments = ["--run-dir", str(desk.run), "--preset", "debug", rule]
    it = Job(arguments, Allocation("41", "deep", ("a",), "a", 1), LauncherSettings(1, "cpu", (), ("python",)))
    assert it._divides_over(1) == is_accepted


@pytest.mark.parametrize(
    ("printed", "is_result"),
    [
        ('{"plan": "p", "overrides": ["a=1"], "device": "NVIDIA H200", "memory": 1e9}\nslurm: job ends', True),
        ('["a=1"]', False),
        ('{"overrides": "a=1"}', False),
        ('{"overrides": [1]}', False),
        ('{"device": 3}', False),
        ('{"memory": "much"}', False),
        ('{"kind": "odd"}', False),
        ("", False),
    ],
)
@pytest.mark.parametrize("label", ["", "0: ", "a banner without an end"])
def test_the_line_of_the_result_is_read_alone_and_its_shape_is_checked(
    printed: str, is_result: bool, label: str
) -> None:
    """srun writes the rank before every line if MLRA_SRUN_ARGUMENTS has --label."""
    found = check.read_output(f"of a container\n{label}result of the check: {printed}\n")
    assert found is not None and check.read_output("the plan\n") is None
    if is_result:
        assert found == CheckResult(plan="p", overrides=["a=1"], device="NVIDIA H200", memory=1e9)
    else:
        assert found.kind == "failed" and "is not understood" in found.message


def test_a_check_without_a_result_counts_as_a_failure_and_starts_no_ranks(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, "silent")
    assert desk.job("parallel.layout=auto", "cluster.max_failures=1", a=DONE, b=DONE) == 1
    assert desk.file.state == "failed" and desk.ends == [("failed", ["a"])]
    assert "ended with exit code 1" in desk.file.reason


def test_a_lost_node_is_given_back_before_the_job_is_queued_again(desk: Desk) -> None:
    play = "me.join(); me.report(rank(0)); time.sleep(0.3); os._exit(1)"
    assert desk.job(a="me.join(); me.report(rank(1)); me.obey_kill(1)", b=play) == 0
    assert desk.ends == [("lost_node", ["a", "b"])] and desk.file.state == "requeued"
    assert desk.orders == ["update JobId=41 NodeList=a", "requeue 41"] and desk.file.excluded == {}


def test_a_job_that_the_check_refuses_starts_no_ranks(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, "2")
    assert desk.job() == 2
    assert "data.path" in capsys.readouterr().err
    assert not desk.run.exists(), "a submission that was refused leaves nothing"
    desk.run.mkdir()
    assert desk.job() == 2
    assert desk.file.state == "failed" and desk.file.attempts == [] and desk.orders == []


DONE = "me.connect(); me.end()"


def test_a_check_that_takes_too_long_is_a_failure_and_no_bad_input(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_CHECK_SECONDS", 0.001)
    assert desk.job(a=DONE, b=DONE) == 0
    assert desk.ends == [("failed", ["a"]), ("done", ["a", "b"])]


def test_a_check_hears_the_stop_signal(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's KillWait is over long before the check's own limit."""
    monkeypatch.setenv(CHECK_VARIABLE, "slow")
    began = time.monotonic()
    assert desk.job() == 0
    assert time.monotonic() - began < 30
    assert desk.file.state == "preempted" and desk.ends == [("preempted", ["a"])] and desk.orders == ["requeue 41"]


def signal_once_handled(number: signal.Signals) -> threading.Thread:
    """Sends this process a signal as soon as a job listens to it."""
    before = signal.getsignal(number)

    def send() -> None:
        while signal.getsignal(number) is before:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_the_wait_for_another_job_hears_the_stop_signal(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes back to the queue, and leaves the other one's job.json alone."""
    desk.run.mkdir()
    with (desk.run / ".job.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sender = signal_once_handled(signal.SIGUSR1)
        assert desk.job() == 0
        sender.join()
    assert desk.orders == ["requeue 41"] and not (desk.run / "job.json").exists()
    assert "stopped by a signal before it began" in capsys.readouterr().err


def test_the_wait_for_slurm_hears_the_stop_signal(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Its controller does not answer at the job's start."""
    scontrol = desk.run.parent / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    sender = signal_once_handled(signal.SIGUSR1)
    assert desk.job() == 1
    sender.join()
    assert "Unable to contact" in capsys.readouterr().err and not desk.run.exists()


def test_a_run_that_is_resumed_alone_has_its_own_configuration(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As train.py resolves it: neither a preset nor a file is named."""
    desk.run.mkdir()
    overrides = ["train.steps=77", "train.device=cpu"]
    (desk.run / "config.yaml").write_text(load_config("debug", overrides=overrides).to_yaml())
    monkeypatch.setenv(PLAYS_VARIABLE, json.dumps({"a": DONE, "b": DONE}))
    assert main(["--run-dir", str(desk.run), "--resume", "auto"]) == 0
    assert desk.ends == [("done", ["a", "b"])] and desk.file.steps == 77


class Full:
    """A standard output on a disk that is full."""

    buffer = property(lambda self: self)

    def write(self, text: object) -> None:
        raise OSError(28, "No space left on device")

    def flush(self) -> None: ...


def test_a_full_disk_under_the_output_does_not_end_the_job(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    play = "me.connect(); print('hello', flush=True); me.end()"
    assert desk.job(a=play, b=play) == 0
    assert desk.file.state == "done"


@pytest.fixture
def small_disk(desk: Desk) -> Iterator[Path]:
    """The run directory on a disk of its own."""
    desk.run.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(desk.run)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield desk.run
    subprocess.run(["umount", "--lazy", str(desk.run)], check=True)


FILL = """
from mlra_scale.cluster.job_file import now
stopped = '{"time": "%s", "event": "stopped", "step": 1, "reason": "the save failed"}' % now().replace("+", ".999+")
(me.logs.parent.parent / "events.jsonl").write_text(stopped + chr(10))
with open(me.logs.parent.parent / "filler", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
me.connect(); me.end(failure(0, 1, 0, 'odd'))
"""


def test_a_full_disk_at_a_restart_is_a_failure_that_counts(
    desk: Desk, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And job.json, for which there is no room either, says how the job has ended."""
    assert desk.job("cluster.max_failures=2", a=FILL, b="me.connect(); me.end()") == 1
    file = desk.file
    assert file.state == "failed" and file.reason.startswith("2 failures in a row")
    assert desk.ends == [("failed", ["a", "b"]), ("failed", ["a", "b"])] and desk.orders == []
    assert file.attempts[0].reason == "the save failed"  # recorded in the second in which the next attempt begins
    reason = file.attempts[1].reason or ""
    assert reason.startswith(f"the job's own process failed: {small_disk}/logs/attempt-002"), reason
    assert reason.endswith("No space left on device; make room there") and file.attempts[1].ended is not None
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_full_disk_at_the_start_of_a_requeued_job_is_waited_for(
    desk: Desk, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = "2026-01-01T00:00:00+00:00"
    before = [JobAttempt(1, "41", ["a", "b"], 2, started=started, ended=started, end="preempted", has_progressed=True)]
    JobFile(desk.run / "job.json", "41", state="preempted", attempts=before).write()
    filler = desk.run / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    waits: list[float] = []
    monkeypatch.setattr(job, "wait_for_stop", lambda seconds, is_stop_asked: waits.append(seconds))
    assert desk.job() == 2
    assert waits == [10.0, 60.0, 300.0] and "No space left on device" in capsys.readouterr().err
    assert desk.file.state == "failed" and "No space left on device" in desk.file.reason
    JobFile(desk.run / "job.json", "41", state="preempted", attempts=before).write()
    monkeypatch.setattr(job, "wait_for_stop", lambda seconds, is_stop_asked: filler.unlink(missing_ok=True))
    assert desk.job(a=DONE, b=DONE) == 0
    assert desk.file.state == "done"


def test_what_the_operating_system_refuses_is_a_failure_that_counts(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt's folder is a file; then Slurm has no srun."""
    (desk.run / "logs").mkdir(parents=True)
    (desk.run / "logs" / "attempt-001").write_text("")
    assert desk.job(a=DONE, b=DONE) == 0
    assert desk.ends == [("failed", ["a", "b"]), ("done", ["a", "b"])]
    (desk.run.parent / "bin" / "srun").unlink()
    monkeypatch.setenv("PATH", str(desk.run.parent / "bin") + os.pathsep + "/bin")
    assert desk.job("cluster.max_failures=1") == 1
    assert desk.file.state == "failed" and "srun" in desk.file.reason


def test_an_error_of_ours_leaves_no_running_job_behind(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(running: attempt.AttemptRunner, meanwhile: object) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(attempt.AttemptRunner, "run", odd)
    assert desk.job(a=DONE, b=DONE) == 1
    assert desk.file.state == "failed" and desk.file.reason == "KeyError: 'odd'"
    assert [(item.end, item.reason) for item in desk.file.attempts] == [("failed", "KeyError: 'odd'")]
    monkeypatch.setattr(attempt.AttemptRunner, "run", lambda running, meanwhile: sys.exit(3))
    with pytest.raises(SystemExit):
        desk.job(a=DONE, b=DONE)
    assert desk.file.state == "failed" and desk.file.reason == "SystemExit: 3"


@pytest.mark.parametrize(
    ("slurms", "refused", "code", "state", "orders"),
    [
        ("COMPLETING 3 Unknown", "nothing", 0, "requeued", []),
        ("COMPLETING 3 2999-11-29T04:51:39", "nothing", 0, "requeued", []),  # when it would end
        ("COMPLETING 3 2020-01-01T04:51:39", "nothing", 0, "cancelled", []),  # requeued, then cancelled
        ("CANCELLED 3 2020-01-01T04:51:39", "nothing", 0, "cancelled", []),
        ("COMPLETING 2 2020-01-01T04:51:39", "nothing", 0, "cancelled", []),
        ("RUNNING 2 Unknown", "nothing", 0, "requeued", ["requeue 41", "update JobId=41 ExcNodeList=b"]),
        ("RUNNING 2 Unknown", "requeue", 1, "failed", ["requeue 41"]),
        ("RUNNING 2 Unknown", "update", 0, "requeued", ["requeue 41", "update JobId=41 ExcNodeList=b"]),
        ("TIMEOUT 2 Unknown", "nothing", 0, "requeued", ["requeue 41", "update JobId=41 ExcNodeList=b"]),
    ],
)
def test_a_job_without_its_bad_node_goes_back_to_the_queue_unless_slurm_ends_it_or_refuses(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, slurms: str, refused: str, code: int, state: str, orders: list[str]
) -> None:
    for name, value in zip(("JOB_STATE", "RESTARTS", "END_TIME"), slurms.split(), strict=True):
        monkeypatch.setenv(f"TEST_{name}", value)
    monkeypatch.setenv("TEST_REFUSED", refused)
    assert desk.job(a=BAD, b=ENDED) == code
    assert desk.file.state == state and desk.orders == orders and desk.file.excluded == {"b": "wrong sum"}


def test_attempts_that_were_killed_with_their_job_get_an_end(desk: Desk) -> None:
    """Two have completed a checkpoint, as the run's record says."""
    desk.run.mkdir()
    times = [f"2026-01-0{day}T00:00:00+00:00" for day in (1, 3, 5)]
    attempts = [JobAttempt(number, "41", ["a"], 1, started=time) for number, time in enumerate(times, 1)]
    JobFile(desk.run / "job.json", "41", attempts=attempts).write()
    event = '{"time": "2026-01-04T00:00:00.5+00:00", "event": "checkpoint", "step": 10}\n'
    (desk.run / "events.jsonl").write_text(event)
    assert desk.job(a=DONE, b=DONE) == 0
    settled = desk.file.attempts
    assert [attempt.end for attempt in settled] == ["failed"] * 3 + ["done"]
    assert settled[0].reason == "killed together with its job"
    assert [attempt.has_progressed for attempt in settled[1:3]] == [True, False]


def test_a_new_job_counts_its_own_failures(desk: Desk) -> None:
    desk.run.mkdir()
    time = "2026-01-01T00:00:00+00:00"
    attempts = [JobAttempt(number, "40", ["a"], 1, started=time, ended=time, end="failed") for number in (1, 2, 3)]
    JobFile(desk.run / "job.json", "40", attempts=attempts).write()
    a = f"if me.run_id == 'attempt-005':\n    me.connect(); me.end()\n{FAIL}"
    assert desk.job(a=a, b="me.connect(); me.end()") == 0
    assert [end for end, _ in desk.ends] == ["failed"] * 4 + ["done"]


def test_an_allocation_without_a_usable_node_goes_back(desk: Desk) -> None:
    desk.run.mkdir()
    JobFile(desk.run / "job.json", "41", excluded={"a": "ECC", "b": "ECC"}).write()
    assert desk.job() == 0
    assert desk.file.state == "requeued" and desk.orders[:1] == ["requeue 41"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, LauncherSettings(1, "cpu", (), (sys.executable,))),
        ({"SLURM_GPUS_ON_NODE": "0"}, LauncherSettings(1, "cpu", (), (sys.executable,))),
        ({"SLURM_GPUS_ON_NODE": "8"}, LauncherSettings(8, "cuda", (), (sys.executable,))),
        ({"SLURM_JOB_GPUS": "0,1,5"}, LauncherSettings(3, "cuda", (), (sys.executable,))),
        ({"SLURM_GPUS_ON_NODE": "8", "PROCESSES_PER_NODE": "4"}, LauncherSettings(4, "cuda", (), (sys.executable,))),
        ({"PROCESSES_PER_NODE": "4"}, LauncherSettings(4, "cpu", (), (sys.executable,))),
        (
            {"MLRA_PYTHON": "apptainer exec --nv 'my image.sif' python3", "MLRA_SRUN_ARGUMENTS": "--mem=0 -v"},
            LauncherSettings(1, "cpu", ("--mem=0", "-v"), ("apptainer", "exec", "--nv", "my image.sif", "python3")),
        ),
    ],
)
def test_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: LauncherSettings
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # also where this machine has GPUs
    assert LauncherSettings.of(environment) == expected


def test_gpus_that_slurm_does_not_count_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: x (UUID: 1)'\necho '  MIG'\necho 'GPU 1: x'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert LauncherSettings.of({}).processes == 2 and LauncherSettings.of({}).device == "cuda"
    assert LauncherSettings.of({"SLURM_GPUS_ON_NODE": "0"}).device == "cpu"


@pytest.mark.parametrize("value", ["0", "-1", "all", "1.5"])
def test_a_wrong_number_of_processes_is_bad_input(value: str) -> None:
    with pytest.raises(ConfigError, match="PROCESSES_PER_NODE"):
        LauncherSettings.of({"PROCESSES_PER_NODE": value})


@pytest.mark.parametrize(
    "arguments", [["--preset", "debug"], ["--preset", "nothing", "--run-dir", "x"], ["--run-dir", "x", "train.stops=1"]]
)
def test_bad_input_is_reported_before_anything_is_made(
    desk: Desk, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.run.parent)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("mlra_scale.cluster.job: bad input\n  ")
    assert not (desk.run.parent / "x").exists()


def test_outside_of_a_job_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["--preset", "debug", "--run-dir", "x"]) == 2
    assert "this is no Slurm job" in capsys.readouterr().err
