"""What is read from Slurm's commands, with small stand-ins for them on PATH."""

import contextlib
import gzip
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mlra_scale.cluster import slurm
from mlra_scale.cluster.slurm import Allocation, SlurmError
from mlra_scale.config import ConfigError

JOB = (
    "JobId=41 JobName=mlra UserId=me(1) Restarts=2 JobState=RUNNING Reason=None Requeue=1 ExcNodeList={excluded} "
    "NodeList=n[1-2] Command=/x/train.sh --preset debug train.steps=8 TRES=cpu=2,node=2 Power="
)
Scontrol = Callable[[str], Path]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    """Puts a shell script on PATH as scontrol; returns the file in which it notes its arguments."""

    def make(body: str) -> Path:
        calls = tmp_path / "calls"
        script = tmp_path / "bin" / "scontrol"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
        return calls

    return make


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(slurm, "_PATIENCE_SECONDS", 2.0)


def cases(**answers: str) -> str:
    """A body that answers by the second word: `show hostnames ...`, `--oneliner show job`, ..."""
    lines = [f"*'{key.replace('_', ' ')}'*) cat <<'END'\n{text}\nEND\n;;" for key, text in answers.items()]
    return 'case "$*" in\n' + "\n".join(lines) + "\nesac"


def test_node_lists_are_expanded_by_slurm(scontrol: Scontrol) -> None:
    calls = scontrol(cases(show_hostnames="n1\nn2\nn7"))
    assert slurm.hostnames("n[1-2,7]") == ["n1", "n2", "n7"]
    assert calls.read_text() == "show hostnames n[1-2,7]\n"


@pytest.mark.parametrize(
    ("line", "address"),
    [
        ("NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=h1 OS=Linux 5.15.0 #1 SMP a=b", "10.0.0.1"),
        ("NodeName=n1 Arch=x86_64", "n1"),
        ("", "n1"),
    ],
)
def test_the_address_of_a_node(scontrol: Scontrol, line: str, address: str) -> None:
    scontrol(cases(show_node=line))
    assert slurm.address("n1") == address


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [("(null)", "n2,n3"), ("n[1-2]", "n1,n2,n3")],
)
def test_excluded_nodes_are_added_to_those_of_the_user(scontrol: Scontrol, excluded: str, expected: str) -> None:
    calls = scontrol(cases(show_hostnames="n1\nn2", show_job=JOB.format(excluded=excluded)))
    slurm.exclude("41", ["n3", "n2"])
    assert calls.read_text().splitlines()[-1] == f"update JobId=41 ExcNodeList={expected}"


def test_a_job_is_shrunk_to_the_nodes_that_are_left(
    scontrol: Scontrol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's command leaves a script where it is called."""
    calls = scontrol("touch slurm_job_41_resize.sh")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    slurm.shrink("41", ["n1", "n3"])
    assert calls.read_text() == "update JobId=41 NodeList=n1,n3\n"
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 3),
        ("slurm_update error: Socket timed out on send/recv operation", 3),
        ("slurm_update error: Invalid job id specified", 1),
    ],
)
def test_only_a_busy_controller_is_asked_again(scontrol: Scontrol, tmp_path: Path, said: str, number: int) -> None:
    calls = scontrol(f'[ "$(wc -l < {tmp_path}/calls)" -ge 3 ] && echo n1 && exit\necho "{said}" >&2\nexit 1')
    with contextlib.suppress(SlurmError):
        assert slurm.hostnames("n1") == ["n1"]
    assert calls.read_text() == "show hostnames n1\n" * number


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("IDLE", False),
        ("MIXED+CLOUD", False),
        ("DOWN", True),
        ("DOWN*", True),
        ("IDLE+NOT_RESPONDING", True),
        ("ALLOCATED*", True),
    ],
)
def test_nodes_that_slurm_has_given_up(scontrol: Scontrol, state: str, expected: bool) -> None:
    scontrol(cases(show_node=f"NodeName=n1 State={state} Reason=a"))
    assert slurm.is_given_up("n1") == expected


def input_variables() -> list[str]:
    """Every variable that srun's manual names as an input; where there is no manual, those that were met."""
    manual = Path("/usr/share/man/man1/srun.1.gz")
    if not manual.exists():
        return ["SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_NTASKS_PER_GPU", "SLURM_CPU_BIND", "SRUN_CONTAINER"]
    text = gzip.decompress(manual.read_bytes()).decode(errors="replace")
    section = text.split("INPUT ENVIRONMENT VARIABLES", 1)[1].split("OUTPUT ENVIRONMENT VARIABLES", 1)[0]
    found = re.findall(r"^\\fB((?:SLURM|SLURMD|SRUN|PMI)_[A-Z0-9_]+)", section.replace("\\_", "_"), re.MULTILINE)
    assert len(found) > 80
    return found


def test_srun_finds_no_options_in_its_environment() -> None:
    """Neither of the allocation as it was nor of the shell that the job was submitted from."""
    kept = {"PATH": "/bin", "SLURM_JOB_ID": "41", "SLURM_CONF": "/x", "SLURM_WORKING_CLUSTER": "c:h:1:2"}
    names = set(input_variables()) - set(kept)
    more = {"SLURM_TRES_PER_TASK", "SLURM_CPU_BIND_LIST", "SLURM_MEM_BIND_TYPE", "SLURM_CPUS_PER_TASK", "SBATCH_QOS"}
    theirs = {"NPROCS": "4", "NCCL_DEBUG": "INFO", "MLRA_PYTHON": "python3", "WANDB_MODE": "offline"}
    assert slurm.slurm_environment(kept | theirs | dict.fromkeys(names | more, "64")) == kept | theirs


def test_the_command_line_of_a_step() -> None:
    command = slurm.step_command(["n2", "n7"], "400G", "mask_cpu:0xff", ["--mem=1G", "-v"])
    assert command[:5] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n2,n7"]
    assert {"--mem=400G", "--cpu-bind=mask_cpu:0xff", "--overlap"} <= set(command)
    assert command[-2:] == ["--mem=1G", "-v"], "what the user gives wins"


def test_formats_of_the_user_do_not_reach_the_commands(scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCONTROL_ALL", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    scontrol('echo "a=${SCONTROL_ALL:-unset} b=$SLURM_CONF"')
    assert slurm.show("job", "41") == {"a": "unset", "b": "/etc/x"}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("echo 'slurm_requeue error: Requested operation is presently disabled' >&2; exit 1", "presently disabled"),
        ("echo 'said elsewhere'; exit 1", "said elsewhere"),
    ],
)
def test_what_slurm_refuses_is_an_error_with_its_words(scontrol: Scontrol, body: str, text: str) -> None:
    scontrol(body)
    with pytest.raises(SlurmError, match=f"^scontrol requeue 41: .*{text}$"):
        slurm.requeue("41")


def test_a_missing_command_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"scontrol requeue 41: .*No such file"):
        slurm.requeue("41")


def test_a_controller_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, float(str(options["timeout"])))

    monkeypatch.setattr(slurm, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(subprocess, "run", wait)
    with pytest.raises(SlurmError, match="timed out after 60"):
        slurm.requeue("41")


ENVIRONMENT = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]"}


def test_the_allocation_is_read(scontrol: Scontrol) -> None:
    """How often it was started is Slurm's word: the shell that it was submitted from may have a count of its own."""
    scontrol(cases(show_hostnames="n1\nn2", show_job=JOB.format(excluded="(null)")))
    assert slurm.show("job", "41")["TRES"] == "cpu=2,node=2", "only the first = counts"
    assert Allocation.of(ENVIRONMENT) == Allocation("41", "mlra-scale", ("n1", "n2"), "n1", 2)
    more = {**ENVIRONMENT, "SLURM_JOB_NAME": "deep", "SLURMD_NODENAME": "n2", "SLURM_RESTART_COUNT": "7"}
    assert Allocation.of(more) == Allocation("41", "deep", ("n1", "n2"), "n2", 2)


@pytest.mark.parametrize("present", [set(), {"SLURM_JOB_ID"}, {"SLURM_JOB_NODELIST"}])
def test_outside_of_a_job_all_missing_variables_are_named(present: set[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Allocation.of({name: ENVIRONMENT[name] for name in present})
    assert {problem.field for problem in caught.value.problems} == set(ENVIRONMENT) - present
    assert "sbatch" in str(caught.value)


def test_a_stop_ends_the_wait_for_a_busy_controller(scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question that a job asks before its ranks are at work."""
    monkeypatch.setattr(slurm, "_PATIENCE_SECONDS", 30.0)
    calls = scontrol("echo 'Unable to contact slurm controller' >&2; exit 1")

    def is_third() -> bool:
        return len(calls.read_text().splitlines()) % 3 == 0

    questions: list[Callable[[], object]] = [
        lambda: Allocation.of(ENVIRONMENT, is_third),
        lambda: slurm.hostnames("n1", is_third),
        lambda: slurm.address("n1", is_third),
        lambda: slurm.show("job", "41", is_third),
    ]
    for number, ask in enumerate(questions, start=1):
        with pytest.raises(SlurmError, match="Unable to contact"):
            ask()
        assert len(calls.read_text().splitlines()) == 3 * number
