"""The log in wandb: offline where there is no key, and never the end of a run."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlra_scale.config import load_config
from mlra_scale.console import set_up_logging
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.log.wandb_log import WandbLog, open_wandb, wandb_mode
from mlra_scale.training.run_directory import RunDirectory
from tests.support.wandb_reader import history, run_ids

KEY = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from pathlib import Path
from mlra_scale.config import load_config
from mlra_scale.console import set_up_logging
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.log.wandb_log import open_wandb
mode, directory, first = sys.argv[1:]
set_up_logging(0)
config = load_config("debug", overrides=[f"wandb.mode={mode}"])
log = open_wandb(config, RunDirectory(Path(directory)))
print("mode", log.mode)
for step in range(int(first), int(first) + 3):
    log.log(step, {"step": step, "loss": 1.0 / (step + 1), "tev_quantiles": {"0.5": 0.02}})
log.finish(0, {"loss_last": 0.25})
"""


def run_script(
    mode: str, directory: Path, environment: dict[str, str], first: int = 0, script: str = SCRIPT
) -> subprocess.CompletedProcess[str]:
    """Logs three steps in a process of its own, with no terminal, no key and no home but those given."""
    directory.mkdir(exist_ok=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    home = {"HOME": str(directory.parent), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", script, mode, str(directory), str(first)],
        env={**clean, **home, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )


def test_without_a_key_it_logs_offline_and_continues_under_the_same_id(tmp_path: Path) -> None:
    started = time.monotonic()
    run = tmp_path / "run"
    for first in (0, 3):
        result = run_script("auto", run, {}, first)
        assert result.stdout == "mode offline\n" and result.stderr == "", "no banner, no question"
    rows = history(run)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[2]["loss"] == pytest.approx(1 / 3)
    ids = run_ids(run)
    assert len(ids) == 2 and len(set(ids)) == 1
    assert (run / "wandb" / "run_id").read_text().strip() == ids[0]
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_with_a_key_and_no_server_it_falls_back_to_offline(tmp_path: Path) -> None:
    # Port 9 of this machine refuses; a network that swallows packets ends at the same timeout.
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "2"}
    result = run_script("auto", tmp_path / "run", environment)
    assert "WARNING (rank 0): wandb: cannot start online (" in result.stderr and result.stdout == "mode offline\n"
    assert [row["_step"] for row in history(tmp_path / "run")] == [0, 1, 2]


def test_a_key_in_netrc_counts_for_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    settings = SimpleNamespace(api_key=None, base_url="http://127.0.0.1:9")
    monkeypatch.setattr("wandb.setup", lambda: SimpleNamespace(settings=settings))
    for host, mode in (("127.0.0.1:9", "online"), ("elsewhere.example", "offline")):
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
        assert wandb_mode(load_config("debug", overrides=["wandb.mode=auto"])) == mode


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [("disabled", {"WANDB_API_KEY": KEY}, "disabled"), ("auto", {"WANDB_MODE": "disabled"}, "disabled")],
)
def test_off_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, environment: dict[str, str], expected: str
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    log = open_wandb(load_config("debug", overrides=[f"wandb.mode={mode}"]), RunDirectory(tmp_path))
    assert log.mode == expected
    log.log(1, {"loss": 2.0})
    log.finish(ExitCode.DONE)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_may_ask_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for wanted, mode in (("offline", "offline"), ("dryrun", "offline"), ("", "online")):
        monkeypatch.setenv("WANDB_MODE", wanted)
        assert wandb_mode(load_config("debug", overrides=["wandb.mode=auto"])) == mode


STOPPED = "WARNING (rank 0): wandb: stopped logging (the service is gone)\n"


@pytest.fixture(autouse=True)
def log_set_up() -> None:
    set_up_logging(0)


class Recorder:
    """A wandb run that takes a number of values and then breaks, and that cannot finish."""

    def __init__(self, takes: int) -> None:
        self.takes, self.steps, self.summary = takes, list[int](), dict[str, object]()

    def log(self, values: object, step: int) -> None:
        if len(self.steps) == self.takes:
            raise BrokenPipeError("the service is gone")
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        raise ConnectionResetError("Connection lost")


def test_a_log_that_breaks_or_cannot_finish_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    log = WandbLog(Recorder(0))
    log.log(1, {"loss": 1.0})
    log.log(2, {"loss": 1.0})
    assert log.mode == "disabled" and capsys.readouterr().err == STOPPED
    log = WandbLog(Recorder(0))
    log.finish(ExitCode.DONE, {"steps": 4})
    log.finish(ExitCode.DONE)
    assert capsys.readouterr().err == "WARNING (rank 0): wandb: could not finish (Connection lost)\n"


def test_a_log_begins_anew_once_with_the_last_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("mlra_scale.training.log.wandb_log.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("mlra_scale.training.log.wandb_log._end_service", lambda: None)
    runs = [Recorder(3), Recorder(6), Recorder(9)]
    log = WandbLog(runs[0], lambda: runs[1])
    for step in range(7):
        clock[0] += 25.0
        log.log(step, {"loss": 1.0})
    # Step 3 broke; 2 and 1 were less than a minute before it.
    assert [run.steps for run in runs] == [[0, 1, 2], [1, 2, 3, 4, 5, 6], []]
    assert capsys.readouterr().err == f"{STOPPED}INFO (rank 0): wandb: started again\n"
    log.log(7, {"loss": 1.0})
    log.log(8, {"loss": 1.0})
    assert capsys.readouterr().err == STOPPED, "no third run"


def test_a_log_that_cannot_begin_anew_forgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mlra_scale.training.log.wandb_log._end_service", lambda: None)
    log = WandbLog(Recorder(0), refuse)
    log.log(0, {"loss": 1.0})
    assert capsys.readouterr().err.endswith("WARNING (rank 0): wandb: cannot be started again (no space left)\n")
    log.log(1, {"loss": 1.0})
    log.finish(0)
    assert capsys.readouterr() == ("", "")


KILL_SERVICE = """
import os, signal
for entry in os.listdir("/proc"):
    if entry.isdecimal():
        try:
            parent = int(open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            os.kill(int(entry), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find wandb's service process")
def test_a_killed_service_changes_neither_the_end_nor_the_exit_code(tmp_path: Path) -> None:
    script = SCRIPT.replace("log.finish", KILL_SERVICE + "log.finish")
    result = run_script("offline", tmp_path / "run", {}, script=script)
    assert result.stdout == "mode offline\n" and "wandb: could not finish (" in result.stderr
    assert "Traceback" not in result.stderr and result.returncode == 0


TERMINATED_SERVICE = (
    SCRIPT.split("log.finish")[0]
    + KILL_SERVICE.replace("SIGKILL", "SIGTERM")
    + """
import time
for step in range(int(first) + 3, int(first) + 8):
    time.sleep(0.3)
    log.log(step, {"step": step, "loss": 1.0 / (step + 1)})
print("mode", log.mode)
log.finish(0, {"loss_last": 0.125})
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find wandb's service process")
def test_a_run_whose_service_is_asked_to_end_continues(tmp_path: Path) -> None:
    """A cluster that asks a job to stop asks all of its processes; the last steps come after that, and none is lost."""
    result = run_script("offline", tmp_path / "run", {}, script=TERMINATED_SERVICE)
    assert result.stdout == "mode offline\n" * 2 and "INFO (rank 0): wandb: started again\n" in result.stderr
    assert "Traceback" not in result.stderr
    rows = {row["_step"]: row["loss"] for row in history(tmp_path / "run")}
    assert rows == {step: pytest.approx(1 / (step + 1)) for step in range(8)}
    assert len(set(run_ids(tmp_path / "run"))) == 1


@pytest.mark.parametrize(
    ("mode", "environment"),
    [
        ("auto", {"WANDB_MODE": "bogus"}),
        ("offline", {"WANDB_BASE_URL": "notaurl"}),
        ("auto", {"WANDB_BASE_URL": "notaurl"}),
        ("online", {"WANDB_BASE_URL": "notaurl", "WANDB_API_KEY": KEY}),
    ],
)
def test_an_environment_that_wandb_refuses_does_not_end_the_run(
    tmp_path: Path, mode: str, environment: dict[str, str]
) -> None:
    result = run_script(mode, tmp_path / "run", environment)
    assert "wandb: not used in this run (" in result.stderr and result.stdout.endswith("mode disabled\n")
    assert "Traceback" not in result.stderr
