"""A sweep with played runs: what it starts, skips and refuses, and what is there after every kind of end."""

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlra_scale.config import ConfigError
from mlra_scale.study import sweep as sweep_module
from mlra_scale.study.grid import Cell, Study, cells_of, load_study
from mlra_scale.study.results import CellFiles, SweepDirectory
from mlra_scale.study.sweep import RunningCell, StopSignals, Sweep
from mlra_scale.study.sweep_text import Progress, plan_text, summary_text
from tests.processes.study.fake_train import (
    BAD_INPUT,
    DIVERGED,
    DONE,
    ENDLESS,
    FAILED,
    GAVE_UP,
    KILLED,
    STOPPED,
    STUBBORN,
)
from tests.support.tools import run_tool
from tests.support.waiting import all_end

PLAYER = Path(__file__).with_name("fake_train.py")
STUDY = """
name: played
preset: debug
base: {{train.steps: 5}}
variants: {{dense: {{model.attention: dense}}, mlra: }}
seeds: {seeds}
"""


@pytest.fixture(autouse=True)
def play_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(sweep: Sweep, files: CellFiles) -> list[str]:
        return [sys.executable, str(PLAYER), str(files.run.path), *files.cell.overrides]

    monkeypatch.setattr(Sweep, "command", command)
    monkeypatch.setattr(sweep_module, "_POLL_SECONDS", 0.02)


class Played:
    """A study and its output folder."""

    def __init__(self, folder: Path, seeds: list[int], text: str = STUDY) -> None:
        self.file = folder / "study.yaml"
        self.file.write_text(text.format(seeds=seeds))
        self.study: Study = load_study(self.file)
        self.cells: list[Cell] = cells_of(self.study)
        self.output = SweepDirectory(folder / "out")
        self.sweep = Sweep(self.study, self.cells, self.output)
        self.seen: list[dict[str, Any]] = []

    def start(self, jobs: int = 1) -> signal.Signals | None:
        to_do = self.sweep.prepare(self.cells, ["sweep"])
        return self.sweep.run(to_do, jobs, lambda result, seconds: self.seen.append(result))

    def results(self) -> dict[str, dict[str, Any]]:
        lines = map(json.loads, self.output.results.read_text().splitlines())
        return {line["cell"]: line for line in lines}

    def starts(self, cell: str) -> int:
        file = self.output.path / "cells" / cell / "events.jsonl"
        return file.read_text().count('"event": "start"') if file.exists() else 0


def test_cells_with_a_result_are_not_run_again(tmp_path: Path) -> None:
    first = Played(tmp_path, [DONE, DIVERGED, GAVE_UP])
    assert first.start(jobs=2) is None
    states = {name: result["state"] for name, result in first.results().items()}
    assert states == {
        f"{variant}-seed{seed}": "done" if seed == DONE else "diverged"
        for seed in (DONE, DIVERGED, GAVE_UP)
        for variant in ("dense", "mlra")
    }
    assert list(states) == [cell.name for cell in first.cells]
    assert first.results()["mlra-seed2"]["diverged_at"] == 3
    assert not list(tmp_path.glob("out/cells/*/checkpoints"))
    about = json.loads(first.output.about.read_text())
    assert set(about) == {"version", "name", "commit", "command", "hardware", "versions", "started", "ended"}
    assert about["ended"] >= about["started"]
    before = first.output.results.read_bytes()
    again = Played(tmp_path, [DONE, DIVERGED, GAVE_UP])
    again.start()
    assert again.seen == [] and first.output.results.read_bytes() == before
    assert json.loads(first.output.about.read_text()) == about
    assert all(again.starts(cell.name) == 1 for cell in again.cells)


def test_a_study_may_grow(tmp_path: Path) -> None:
    Played(tmp_path, [DONE]).start()
    grown = Played(tmp_path, [DIVERGED, DONE])
    grown.start()
    assert [result["cell"] for result in grown.seen] == ["dense-seed2", "mlra-seed2"]
    assert list(grown.results()) == ["dense-seed2", "mlra-seed2", "dense-seed1", "mlra-seed1"]


def test_failed_cells_are_errors_that_are_tried_again(tmp_path: Path) -> None:
    played = Played(tmp_path, [DONE, FAILED, KILLED, STOPPED])
    played.start()
    results = played.results()
    errors = {seed: results[f"mlra-seed{seed}"]["error"] for seed in (DONE, FAILED, KILLED, STOPPED)}
    assert errors[DONE] is None
    assert errors[FAILED].startswith("exit code 1: Traceback") and errors[FAILED].endswith(
        "RuntimeError: no such thing"
    )
    assert errors[KILLED] == "killed by SIGKILL: no output"
    assert errors[STOPPED] == "exit code 4: the disk is full"
    assert [results[f"mlra-seed{seed}"]["state"] for seed in errors] == ["done", "failed", "failed", "failed"]
    # They continue from their checkpoints.
    assert (played.output.path / "cells" / "mlra-seed3" / "checkpoints").exists()
    assert not (played.output.path / "cells" / "mlra-seed1" / "checkpoints").exists()
    text = summary_text(played.sweep)
    assert "8 of 8 cells have a result (2 done, 6 failed)" in text and "failed: dense-seed6: see " in text
    Played(tmp_path, [DONE, FAILED, KILLED, STOPPED]).start()
    assert [played.starts(f"mlra-seed{seed}") for seed in errors] == [1, 2, 2, 2]
    # The error holds the output of the newest start only.
    assert played.results()["mlra-seed3"]["error"].count("Traceback") == 1


def test_bad_input_of_the_first_cell_starts_no_more(tmp_path: Path) -> None:
    played = Played(tmp_path, [BAD_INPUT, DONE])
    ran = run_tool("sweep", played.file, "--output", tmp_path / "out")
    assert ran.code == 2 and "no more cells were started" in ran.stderr and "there is no such folder" in ran.stderr
    assert [result["state"] for result in played.results().values()] == ["failed"]
    assert played.starts("dense-seed1") == 0
    # Where others have trained, it is that cell's own.
    later = Played(tmp_path, [DONE, BAD_INPUT])
    later.start()
    assert later.sweep.bad_input is None
    assert [result["state"] for result in later.seen] == ["done", "done", "failed", "failed"]


def test_a_changed_cell_and_another_study_are_refused(tmp_path: Path) -> None:
    Played(tmp_path, [DONE]).start()
    changed = Played(tmp_path, [DONE, DIVERGED], STUDY.replace("steps: 5", "steps: 6"))
    with pytest.raises(ConfigError) as caught:
        changed.start()
    lines = str(caught.value).splitlines()
    # Also where only other cells were asked for: the folder would hold two studies.
    with pytest.raises(ConfigError):
        changed.sweep.prepare(changed.cells[2:], ["sweep"])
    assert [line.partition(" = ")[0] for line in lines] == [
        "cell dense-seed1: train.steps",
        "cell mlra-seed1: train.steps",
    ]
    assert "the cell ran with 5; name another --output, or remove" in lines[0]
    assert changed.starts("dense-seed2") == 0
    assert load_study(changed.output.study).base == {"train.steps": 5}
    other = Played(tmp_path, [DONE], STUDY.replace("name: played", "name: other"))
    with pytest.raises(ConfigError, match="holds the study 'played', and this is 'other'"):
        other.start()


def test_a_stop_asks_the_runs_and_the_next_start_goes_on(tmp_path: Path) -> None:
    played = Played(tmp_path, [ENDLESS, DONE])

    def stop_when_both_wait() -> None:
        wanted = [played.output.path / "cells" / f"{variant}-seed{ENDLESS}" / "waits" for variant in ("dense", "mlra")]
        while not all(file.exists() for file in wanted):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop_when_both_wait)
    thread.start()
    assert played.start(jobs=2) is signal.SIGINT
    thread.join()
    assert sorted(played.sweep.interrupted) == [f"dense-seed{ENDLESS}", f"mlra-seed{ENDLESS}"]
    assert played.seen == [] and played.results() == {}
    for variant in ("dense", "mlra"):
        events = (played.output.path / "cells" / f"{variant}-seed{ENDLESS}" / "events.jsonl").read_text()
        assert '"preempted"' in events, "it was asked, not killed"
    assert "the same command continues them" in summary_text(played.sweep)
    assert json.loads(played.output.about.read_text())["ended"] is None
    assert [cell.seed for cell in played.sweep.prepare(played.cells, ["sweep"])] == [ENDLESS, ENDLESS, DONE, DONE]
    # Handlers are those of before.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_kills_the_runs_with_their_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where /proc hides the processes of others, so that psutil itself finds no children."""

    def hide(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "children", hide)
    played = Played(tmp_path, [STUBBORN])
    pids = [played.output.path / "cells" / f"{variant}-seed{STUBBORN}" / "waits" for variant in ("dense", "mlra")]

    def press(running: Sequence[RunningCell], locked: Collection[str]) -> None:
        if all(file.exists() and file.read_text().endswith("\n") for file in pids):
            os.kill(os.getpid(), signal.SIGINT)

    to_do = played.sweep.prepare(played.cells, ["sweep"])
    assert played.sweep.run(to_do, 2, on_poll=press) is signal.SIGINT
    assert len(played.sweep.interrupted) == 2 and played.results() == {}
    assert all_end([int(file.read_text()) for file in pids])


def test_what_was_not_written_down_is_made_from_the_record(tmp_path: Path) -> None:
    """The sweep was killed between the end of a run and its result."""
    played = Played(tmp_path, [DONE])
    played.start()
    before = played.results()
    for file in tmp_path.glob("out/cells/*/result.json"):
        file.unlink()
    played.output.results.unlink()
    again = Played(tmp_path, [DONE])
    again.start()
    assert again.results() == before
    assert all(again.starts(cell.name) == 1 for cell in again.cells)


def test_a_cell_that_another_sweep_runs_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And left to it where it ends with a result, a failure too."""
    played = Played(tmp_path, [DONE, FAILED])
    files = {cell.name: played.output.files(cell) for cell in played.cells}
    locks = {name: files[name].lock() for name in (f"dense-seed{DONE}", f"dense-seed{FAILED}")}
    progress = Progress(played.cells, played.output)

    def watch(running: Sequence[RunningCell], locked: Collection[str]) -> None:
        """The other sweep ends its cells when this one has nothing else to do: one by a result, one by being killed."""
        progress.on_poll(running, locked)
        if len(played.seen) >= 2 and locks:
            (name, lock) = locks.popitem()
            assert lock is not None and name in played.sweep.locked_elsewhere
            if name == f"dense-seed{FAILED}":
                files[name].result.write_text(json.dumps({"cell": name, "state": "failed", "error": "there"}))
            lock.close()

    to_do = played.sweep.prepare(played.cells, ["sweep"])
    assert played.sweep.run(to_do, 1, lambda result, seconds: played.seen.append(result), watch) is None
    assert played.sweep.locked_elsewhere == {} and not locks
    states = {name: result["state"] for name, result in played.results().items()}
    assert states == {
        f"dense-seed{DONE}": "done",
        f"mlra-seed{DONE}": "done",
        f"dense-seed{FAILED}": "failed",
        f"mlra-seed{FAILED}": "failed",
    }
    assert played.starts(f"dense-seed{DONE}") == 1 and played.starts(f"dense-seed{FAILED}") == 0
    assert f"waiting for dense-seed{DONE}" in capsys.readouterr().out


def test_a_sweep_that_waits_can_be_stopped(tmp_path: Path) -> None:
    played = Played(tmp_path, [DONE])
    lock = played.output.files(played.cells[0]).lock()
    assert lock is not None

    def watch(running: Sequence[RunningCell], locked: Collection[str]) -> None:
        if played.seen and played.sweep.locked_elsewhere:
            os.kill(os.getpid(), signal.SIGTERM)

    with lock:
        to_do = played.sweep.prepare(played.cells, ["sweep"])
        stopped = played.sweep.run(to_do, 1, lambda result, seconds: played.seen.append(result), watch)
    assert stopped is signal.SIGTERM
    assert list(played.results()) == ["mlra-seed1"] and [*played.sweep.locked_elsewhere] == ["dense-seed1"]
    assert "still run by another process: dense-seed1" in summary_text(played.sweep)


def test_the_run_of_a_killed_sweep_is_taken_over(tmp_path: Path) -> None:
    """Its sweep is gone, and its process keeps the cell until it ends."""
    first = Played(tmp_path, [DONE])
    first.sweep.prepare(first.cells, ["sweep"])
    assert first.sweep._start(first.output.files(first.cells[0]), 0, [])
    (running,) = first.sweep._running
    running.process.send_signal(signal.SIGSTOP)
    running.lock.close()
    second = Played(tmp_path, [DONE])

    def watch(running_cells: Sequence[RunningCell], locked: Collection[str]) -> None:
        if second.sweep.locked_elsewhere:
            running.process.send_signal(signal.SIGCONT)
            running.process.poll()

    to_do = second.sweep.prepare(second.cells, ["sweep"])
    assert second.sweep.run(to_do, 1, lambda result, seconds: second.seen.append(result), watch) is None
    assert running.process.wait(30.0) == 0
    assert {name: result["state"] for name, result in second.results().items()} == {
        "dense-seed1": "done",
        "mlra-seed1": "done",
    }
    assert second.starts("dense-seed1") == 1, "its result is made from its record"


def test_a_result_that_cannot_be_written_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played(tmp_path, [DONE])
    write = sweep_module.write_result

    def refuse(files: CellFiles, *rest: Any, **more: Any) -> None:
        if files.cell.name == "dense-seed1":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(files, *rest, **more)

    monkeypatch.setattr(sweep_module, "write_result", refuse)
    (tmp_path / "out").mkdir()
    assert played.start() is None
    assert list(played.results()) == ["mlra-seed1"] and played.sweep.interrupted == []
    summary = summary_text(played.sweep)
    assert "not written: dense-seed1: its result cannot be written: No space left on device" in summary
    monkeypatch.undo()
    again = Sweep(played.study, played.cells, played.output)
    again.run(again.prepare(played.cells, ["sweep"]), 1)
    assert sorted(played.results()) == ["dense-seed1", "mlra-seed1"] and played.starts("dense-seed1") == 1


def test_a_cell_whose_folder_cannot_be_made_is_named_and_the_others_run(tmp_path: Path) -> None:
    played = Played(tmp_path, [DONE])
    (tmp_path / "out" / "cells").mkdir(parents=True)
    (tmp_path / "out" / "cells" / "dense-seed1").write_text("")
    ran = run_tool("sweep", played.file, "--output", tmp_path / "out")
    assert ran.code == 1 and "not written: dense-seed1: cannot be started" in ran.stdout
    assert list(played.results()) == ["mlra-seed1"]


@pytest.mark.parametrize(
    ("number", "is_heard"), [(signal.SIGUSR1, True), (signal.SIGTERM, True), (signal.SIGHUP, False)]
)
def test_only_what_a_terminal_sends_stays_ignored(number: signal.Signals, is_heard: bool) -> None:
    """slurm/sweep.sh ignores SIGUSR1, Slurm's word before the time limit, until this process listens."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(number)
            assert stop.signal == (number if is_heard else None)
    finally:
        signal.signal(number, before)


def test_the_environment_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(slot: int, ranks: int, gpus: list[str]) -> str | None:
        return sweep_module._environment(slot, ranks, gpus).get("CUDA_VISIBLE_DEVICES")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [given(slot, 1, ["0", "1", "2"]) for slot in range(4)] == ["0", "1", "2", "0"]
    assert [given(slot, 2, ["0", "1", "2", "3", "4"]) for slot in range(3)] == ["0,1", "2,3", "0,1"]
    assert given(1, 1, ["0"]) is None and given(1, 2, ["0", "1", "2"]) is None and given(0, 1, []) is None
    assert sweep_module._environment(0, 1, [])["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert sweep_module._environment(0, 1, [])["WANDB_MODE"] == "online"
    monkeypatch.delenv("WANDB_MODE")
    assert sweep_module._environment(0, 1, [])["WANDB_MODE"] == "offline", "a grid is not uploaded unasked"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    assert sweep_module._gpus() == ["GPU-a", "GPU-b"]


def test_the_command_of_a_cell_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for ranks in (1, 2):
        played = Played(tmp_path, [1], STUDY + f"ranks: {ranks}\n")
        command = played.sweep.command(played.output.files(played.cells[0]))
        run = str(tmp_path / "out" / "cells" / "dense-seed1")
        entry = ["mlra_scale.cli.main", "train", "--nproc=2"] if ranks == 2 else ["mlra_scale.train"]
        assert command == [
            *(sys.executable, "-m", *entry, "--preset", "debug", "--run-dir", run),
            *("--resume", "auto", "train.steps=5", "model.attention=dense", "train.seed=1"),
        ]


def test_the_plan_lists_cells_and_estimates_what_is_left(tmp_path: Path) -> None:
    played = Played(tmp_path, [DONE, ENDLESS])
    text = plan_text(played.sweep, played.cells[:1], jobs=1)
    assert not played.output.path.exists()
    assert "4 cells = 2 variant(s) x 2 seed(s)" in text and "to do: 1 of 1 cells, 2,560 tokens" in text
    assert "time: unknown" in text
    played.sweep.run(played.sweep.prepare(played.cells[:2], ["sweep"]), 1)
    # A played cell trains for 2.5 s: two are left, one after the other or both at once.
    text = plan_text(played.sweep, played.cells, jobs=1)
    assert "to do: 2 of 4 cells" in text and "time: about 5 s with --jobs 1" in text
    assert "time: about 2 s with --jobs 8" in plan_text(played.sweep, played.cells, jobs=8)
    assert [line.split()[-1] for line in text.splitlines() if "-seed" in line] == ["done", "done", "do", "do"]


def test_every_ended_cell_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played = Played(tmp_path, [DONE, DIVERGED, FAILED])
    progress = Progress(played.cells, played.output)
    played.sweep.run(played.sweep.prepare(played.cells, ["sweep"]), 1, progress.on_result, progress.on_poll)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("[1/6] dense-seed1: done, loss 6.5000, ") and lines[0].endswith(" left")
    assert lines[3].startswith("[4/6] mlra-seed2: diverged at step 3, loss ")
    assert lines[5].startswith("[6/6] mlra-seed3: failed: RuntimeError: no such thing, ")
    assert not lines[5].endswith("left")


def test_the_tool_runs_one_cell_or_some(tmp_path: Path) -> None:
    played = Played(tmp_path, [DONE, FAILED])
    start = (played.file, "--output", tmp_path / "out")
    assert run_tool("sweep", *start, "--dry-run").stdout.count("to do") == 5
    assert not (tmp_path / "out").exists()
    one = run_tool("sweep", *start, "--cell", 1)
    assert (one.code, list(played.results())) == (0, ["mlra-seed1"])
    assert "1 of 4 cells have a result (1 done)" in one.stdout
    assert run_tool("sweep", *start, "--cell", "mlra-seed1").stdout.startswith("played: 0 of 1 cells to do")
    some = run_tool("sweep", *start, "--only", "dense-*", "--jobs", 2)
    assert some.code == 1 and list(played.results()) == ["dense-seed1", "mlra-seed1", "dense-seed3"]
    assert json.loads(played.output.about.read_text())["command"][:3] == ["mlra-scale", "sweep", str(played.file)]
    for arguments, message in (
        (("--cell", 4), "--cell = '4': is no cell of this study; the indices are 0 to 3"),
        (("--cell", "mlra-seed2"), "did you mean 'mlra-seed3'?"),
        (("--only", "x*"), "--only = 'x*': matches none of the 4 cells"),
        (("train.steps=7",), "cell mlra-seed1: train.steps = 7: the cell ran with 5"),
        (("train.stepz=7",), "did you mean 'steps'?"),
    ):
        ran = run_tool("sweep", *start, *arguments)
        assert ran.code == 2 and message in ran.stderr and "sweep: error: " in ran.stderr
    (tmp_path / "file").touch()
    assert "cannot be written" in run_tool("sweep", played.file, "--output", tmp_path / "file").stderr
    assert run_tool("sweep", played.file, "--jobs", 0).code == 2
