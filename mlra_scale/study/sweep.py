"""Runs the cells of a study, several at once, each in processes of its own.

Several sweeps, on one machine or as the tasks of a Slurm array, may share an output folder: a cell is run by the
process that holds its lock. A run keeps the lock if its sweep is killed. A sweep waits for cells that other processes
hold, and then takes over their results, or their runs if these have not ended. A sweep that is asked to stop asks its
runs to stop; each finishes its step and saves, and the next sweep continues it. Failed cells are run again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any

from mlra_scale.config import ConfigError, Problem
from mlra_scale.process_tree import kill_with_descendants
from mlra_scale.study.grid import Cell, Study
from mlra_scale.study.provenance import gpu_names, note_start
from mlra_scale.study.results import (
    CellFiles,
    Record,
    State,
    SweepDirectory,
    changes_of,
    ending_of,
    events_of,
    result_of,
    state_of,
    write_result,
)
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import OFTEN_IGNORED, STOP_SIGNALS
from mlra_scale.training.record import ROOT, commit

_POLL_SECONDS = 0.5
_TRAIN = ("mlra_scale.train",)
_ERROR_CHARACTERS = 2000


@dataclass
class RunningCell:
    """A cell that is being run.

    Attributes:
        files: The cell.
        process: The training, or the launcher of its ranks.
        lock: The lock of the cell; the process inherits it.
        slot: Its number among the cells that are run at once.
        num_events, log_size: Events of earlier starts, and bytes of its log at this start.
        started: Time of the start, in seconds (time.monotonic).
        is_killed: Whether a second Ctrl-C has ended it.
    """

    files: CellFiles
    process: subprocess.Popen[bytes]
    lock: IO[Any]
    slot: int
    num_events: int
    log_size: int
    started: float = field(default_factory=time.monotonic)
    is_killed: bool = False


class StopSignals:
    """Records the signals that stop a sweep, Ctrl-C and those of a cluster; a second Ctrl-C is urgent."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_urgent = False
        self._handlers: dict[int, Any] = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.is_urgent = self.is_urgent or (self.signal is not None and number == signal.SIGINT)
        self.signal = self.signal or signal.Signals(number)

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            # A parent such as nohup or a shell with background jobs has it ignored on purpose. SIGUSR1 is another case:
            # slurm/sweep.sh ignores it until this process has its handlers.
            if number not in OFTEN_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class Sweep:
    """Runs a study in its output folder.

    Attributes:
        study: The study.
        cells: Its whole grid.
        directory: Its output folder.
        entry: What python runs for a cell of one process, after -m.
        locked_elsewhere: Cells that another process holds, each with its result at that time.
        unwritten: Cells that could not be started, or whose result could not be written, with the reason.
        interrupted: Cells that were stopped before their end.
        bad_input: Why no further cell was started: the first run refused its input.
    """

    def __init__(
        self,
        study: Study,
        cells: list[Cell],
        directory: SweepDirectory,
        entry: Sequence[str] = _TRAIN,
    ) -> None:
        self.study, self.cells, self.directory, self.entry = study, cells, directory, entry
        self._commit = commit()
        self._waiting: list[Cell] = []
        self._running: list[RunningCell] = []
        self._on_result: Callable[[dict[str, Any], float], None] = lambda result, seconds: None
        self._has_trained = False
        self.locked_elsewhere: dict[str, dict[str, Any] | None] = {}
        self.unwritten: dict[str, str] = {}
        self.interrupted: list[str] = []
        self.bad_input: str | None = None

    def prepare(self, chosen: Sequence[Cell], command: Sequence[str]) -> list[Cell]:
        """Checks the output folder against the study, and records this start and its command line in study.json.

        Returns:
            The chosen cells that have no result, or failed.

        Raises:
            ConfigError: The folder is another study's, or cells were run with another configuration.
        """
        with self.directory.locked():
            stored = self.directory.read_study()
            if stored is not None and stored.name != self.study.name:
                remedy = f"holds the study '{stored.name}', and this is '{self.study.name}'; name another folder"
                raise ConfigError([Problem("--output", str(self.directory.path), remedy)])
            # If the study has not changed, the other cells were checked when they were run.
            checked = chosen if stored == self.study else self.cells
            if problems := [problem for cell in checked for problem in changes_of(self.directory.files(cell))]:
                raise ConfigError(problems)
            to_do = [cell for cell in chosen if not self.directory.files(cell).is_done()]
            self.directory.write_study(self.study)
            if to_do:
                note_start(self.directory.about, self.study.name, command)
        return to_do

    def run(
        self,
        cells: Sequence[Cell],
        jobs: int,
        on_result: Callable[[dict[str, Any], float], None] = lambda result, seconds: None,
        on_poll: Callable[[Sequence[RunningCell], Collection[str]], None] = lambda running, locked: None,
    ) -> signal.Signals | None:
        """Runs cells that `prepare` returned, some at once; returns the signal that stopped the sweep, or None.

        Args:
            cells: The cells.
            jobs: Number of cells that are run at once.
            on_result: Called with every new result, and the seconds that this start of the cell took.
            on_poll: Called every _POLL_SECONDS with the running cells and the names of those locked elsewhere.
        """
        self._waiting, self._on_result = list(cells), on_result
        gpus = _gpus() if jobs > 1 else []
        with StopSignals() as stop:
            try:
                while self._waiting or self._running:
                    if stop.signal is None and self.bad_input is None:
                        self._start_more(jobs, gpus)
                    else:
                        self._waiting = []
                    self._forward(stop)
                    on_poll(self._running, self.locked_elsewhere)
                    if self._running or self._waiting:
                        time.sleep(_POLL_SECONDS)
                    for running in [one for one in self._running if one.process.poll() is not None]:
                        self._finish(running, is_stopping=stop.signal is not None)
            finally:
                # Cells are still running only after an error in this loop.
                for running in self._running:
                    running.process.terminate()
                with contextlib.suppress(OSError, ConfigError):
                    self.directory.collect(self.cells)
        return stop.signal

    def _start_more(self, jobs: int, gpus: Sequence[str]) -> None:
        locked = []
        while self._waiting and len(self._running) < jobs:
            cell, slot = self._waiting.pop(0), min(set(range(jobs)) - {running.slot for running in self._running})
            try:
                if not self._start(self.directory.files(cell), slot, gpus):
                    locked.append(cell)
            except OSError as error:
                # A full disk, perhaps: other cells may be on another one, and the next sweep tries this cell again.
                self.unwritten[cell.name] = f"cannot be started: {error.strerror or error}"
        self._waiting += locked  # tried again after the others

    def _start(self, files: CellFiles, slot: int, gpus: Sequence[str]) -> bool:
        """Starts a cell unless it has a result by now; returns False if another process holds it."""
        name, lock = files.cell.name, files.lock()
        if lock is None:
            self.locked_elsewhere.setdefault(name, files.read_result())
            return False
        was_locked, earlier = name in self.locked_elsewhere, self.locked_elsewhere.pop(name, None)
        result = files.read_result()
        if result is not None and (files.is_done() or (was_locked and result != earlier)):
            # Written by another sweep in the meantime; if the cell failed there, the next start runs it again.
            lock.close()
            self._on_result(result, 0.0)
            return True
        ending = ending_of(files.run)
        if (state := state_of(ending)) is not None:
            # Its sweep was killed before it could write the result.
            self._write(files, result_of(files, state, ending, None, self._commit), 0.0)
            lock.close()
            return True
        num_events = len(events_of(files.run))
        with files.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(files),
                env=_environment(slot, self.study.ranks, gpus),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches this process only, which forwards it.
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
            self._running.append(RunningCell(files, process, lock, slot, num_events, log.tell()))
        return True

    def command(self, files: CellFiles) -> list[str]:
        """Returns the command line of a cell, as a person would type it."""
        ranks = self.study.ranks
        assert ranks == 1 or tuple(self.entry) == _TRAIN, "another entry point is for runs of one rank"
        entry = ["mlra_scale.cli.main", "train", f"--nproc={ranks}"] if ranks > 1 else self.entry
        run = ["--preset", self.study.preset, "--run-dir", str(files.run.path), "--resume", "auto"]
        return [sys.executable, "-m", *entry, *run, *files.cell.overrides]

    def _forward(self, stop: StopSignals) -> None:
        """Asks every run to stop, once; a second Ctrl-C kills it with its ranks."""
        for running in self._running:
            name = running.files.cell.name
            if stop.signal is not None and name not in self.interrupted:
                self.interrupted.append(name)
                running.process.terminate()
            elif stop.is_urgent and not running.is_killed:
                running.is_killed = True
                kill_with_descendants(running.process)

    def _finish(self, running: RunningCell, is_stopping: bool) -> None:
        """Writes the result of a cell whose process has ended, unless it was interrupted."""
        self._running.remove(running)
        files, code = running.files, running.process.returncode
        ending = ending_of(files.run, running.num_events)
        state: State | None = state_of(ending)
        error = None
        is_interrupted = is_stopping or code == ExitCode.PREEMPTED or ending.get("event") == "preempted"
        if state is not None:
            self._has_trained = True
        elif not is_interrupted:
            state, error = "failed", _error_text(running, ending, code)
            if code == ExitCode.BAD_INPUT and not self._has_trained:
                self.bad_input = error
        self.interrupted = [name for name in self.interrupted if name != files.cell.name]
        if state is None:
            self.interrupted.append(files.cell.name)
        else:
            result = result_of(files, state, ending, error, self._commit)
            self._write(files, result, time.monotonic() - running.started)
        running.lock.close()

    def _write(self, files: CellFiles, result: dict[str, Any], seconds: float) -> None:
        try:
            write_result(files, result, keep_checkpoints=self.study.checkpoints == "keep")
            self.directory.collect(self.cells)
        except (OSError, ConfigError) as error:
            # The next sweep makes the result from the record of the run.
            reason = getattr(error, "strerror", None) or error
            self.unwritten[files.cell.name] = f"its result cannot be written: {reason}"
        self._on_result(result, seconds)


def _error_text(running: RunningCell, ending: Record, code: int) -> str:
    """Returns why a cell failed: the reason of its last event, or the end of its log."""
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    reason = ending.get("reason")
    if reason is None:
        with running.files.log.open("rb") as log:
            log.seek(running.log_size)
            text = log.read().decode("utf-8", errors="replace")
        reason = "\n".join(line for line in text.splitlines() if line.strip()) or "no output"
    return f"{how}: {reason[-_ERROR_CHARACTERS:]}"


def _gpus() -> list[str]:
    """Returns the GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(number) for number in range(len(gpu_names()))]


def _environment(slot: int, ranks: int, gpus: Sequence[str]) -> dict[str, str]:
    """Returns the environment of a cell: one thread per process, this very code, GPUs of its own if there are enough.

    Runs are uploaded to wandb only where the study (`wandb.mode`) or the environment (`WANDB_MODE`) asks for it.
    Each running cell has a slot of its own. If there are fewer GPUs than two cells have ranks, all cells share them.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("WANDB_MODE", "offline")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if len(gpus) >= 2 * ranks:
        first = slot * ranks % (len(gpus) - len(gpus) % ranks)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + ranks])
    return environment
