"""Runs the cells of a study, several at once, each in processes of its own.

Several sweeps, on one machine or as the tasks of a Slurm array, may work on the same output: a cell belongs to whoever
holds its lock, such as a run whose sweep was killed. A sweep waits for the cells that others hold and takes over what
they leave: their result, or a run that has not ended. A sweep that is asked to stop asks its runs to, which then finish
their step and save; started again, it continues from there. A cell with a result is not run again, unless it failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import IO, Any

from mlra_scale.config import ConfigError, Problem
from mlra_scale.study.grid import Cell, Study
from mlra_scale.study.provenance import gpu_names, note_start
from mlra_scale.study.results import (
    CellFiles,
    State,
    SweepDirectory,
    changes_of,
    claim,
    ending_of,
    num_events,
    result_of,
    state_of,
    write_result,
)
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.interruption import OFTEN_IGNORED, STOP_SIGNALS
from mlra_scale.training.record import ROOT, commit

_POLL_SECONDS = 0.5
_ERROR_CHARACTERS = 2000


@dataclass
class Running:
    """A cell at work.

    Attributes:
        files: The cell.
        process: Its process: the training itself, or the torchrun of its ranks.
        lock: Keeps other sweeps from it; the process holds it too, in case this one is killed.
        slot: Its place among the cells that are run at once.
        num_events: Events of earlier starts.
        log_size: Size of its log when it began.
        started: The clock then.
        is_ending: Whether a second signal asked it to end at once.
    """

    files: CellFiles
    process: subprocess.Popen[bytes]
    lock: IO[Any]
    slot: int
    num_events: int
    log_size: int
    started: float = field(default_factory=time.monotonic)
    is_ending: bool = False


class StopAsked:
    """Notes the signals that end a sweep: Ctrl-C, and those of a cluster; a second Ctrl-C is in a hurry."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_urgent = False
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_urgent = self.is_urgent or (self.signal is not None and number == signal.SIGINT)
        self.signal = self.signal or signal.Signals(number)

    def __enter__(self) -> StopAsked:
        for number in STOP_SIGNALS:
            # Not SIGUSR1: slurm/sweep.sh ignores it until this process listens.
            if number in OFTEN_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                continue  # a parent wants it so: nohup, a shell's background job
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Sweep:
    """A study at work in its output folder.

    Args:
        study: The study.
        cells: Its whole grid.
        directory: Its output folder.

    Attributes:
        held_elsewhere: Cells that another sweep runs, or a run that has outlived its sweep; they are waited for.
        unwritten: Cells that could not be started, or whose result could not be written, with the reason.
        interrupted: Cells that were stopped before their end.
        bad_input: Why no further cell was started: what the first run has said about its input.
    """

    def __init__(self, study: Study, cells: Sequence[Cell], directory: SweepDirectory) -> None:
        self._study, self._cells, self._directory = study, cells, directory
        self._commit = commit()
        self._waiting: list[Cell] = []
        self._running: list[Running] = []
        self._tell: Callable[[dict[str, Any], float], None] = lambda result, seconds: None
        self._has_trained = False
        self.held_elsewhere: dict[str, dict[str, Any] | None] = {}
        """Each with the result that it had when it was first found to be held."""
        self.unwritten: dict[str, str] = {}
        self.interrupted: list[str] = []
        self.bad_input: str | None = None

    def prepare(self, chosen: Sequence[Cell], command: Sequence[str]) -> list[Cell]:
        """Checks the output folder against the study, and notes this start in it.

        Args:
            chosen: Cells that are to be run.
            command: The command line, for study.json.

        Returns:
            Those of them that have no result yet, or failed.

        Raises:
            ConfigError: The folder is another study's, or cells were run with another configuration.
        """
        with self._directory.locked():
            self._check(chosen, self._directory.read_study())
            to_do = [cell for cell in chosen if not self._directory.files(cell).is_done()]
            self._directory.write_study(self._study)
            if to_do:
                note_start(self._directory.about, self._study.name, command)
        return to_do

    def _check(self, chosen: Sequence[Cell], stored: Study | None) -> None:
        """Raises ConfigError if what is in the folder is another study, or this one with other values."""
        if stored is not None and stored.name != self._study.name:
            remedy = f"holds the study '{stored.name}', and this is '{self._study.name}'; name another folder"
            raise ConfigError([Problem("--output", str(self._directory.path), remedy)])
        # Of a study that is as it was, the others have been looked at before.
        looked_at = chosen if stored == self._study else self._cells
        problems = [problem for cell in looked_at for problem in changes_of(self._directory.files(cell))]
        if problems:
            raise ConfigError(problems)

    def run(
        self,
        cells: Sequence[Cell],
        jobs: int,
        tell: Callable[[dict[str, Any], float], None] = lambda result, seconds: None,
        watch: Callable[[Sequence[Running]], None] = lambda running: None,
    ) -> signal.Signals | None:
        """Runs cells.

        Args:
            cells: What `prepare` returned.
            jobs: How many are run at once.
            tell: Called with every new result, and the seconds that this start of the cell took.
            watch: Called again and again with the cells at work.

        Returns:
            The signal that has stopped it, or None.
        """
        self._waiting, self._tell = list(cells), tell
        gpus = _gpus() if jobs > 1 else []
        with StopAsked() as stop:
            try:
                while self._waiting or self._running:
                    if stop.signal is None and self.bad_input is None:
                        self._start_more(jobs, gpus)
                    else:
                        self._waiting = []
                    self._pass_on(stop)
                    watch(self._running)
                    if self._running or self._waiting:
                        time.sleep(_POLL_SECONDS)
                    for running in [one for one in self._running if one.process.poll() is not None]:
                        self._ended(running, is_stopping=stop.signal is not None)
            finally:
                # Only after an error of this loop are there any left.
                for running in self._running:
                    running.process.terminate()
                with contextlib.suppress(OSError, ConfigError):
                    self._directory.collect(self._cells)
        return stop.signal

    def _start_more(self, jobs: int, gpus: Sequence[str]) -> None:
        held = []
        while self._waiting and len(self._running) < jobs:
            cell, slot = self._waiting.pop(0), min(set(range(jobs)) - {running.slot for running in self._running})
            try:
                if not self._start(self._directory.files(cell), slot, gpus):
                    held.append(cell)
            except OSError as error:
                # A full disk, perhaps: other cells may lie elsewhere, and the next start tries this one again.
                self.unwritten[cell.name] = f"cannot be started: {error.strerror or error}"
        self._waiting += held  # to be tried again, after those that nobody is at

    def _start(self, files: CellFiles, slot: int, gpus: Sequence[str]) -> bool:
        """Starts a cell if it needs that; returns False where somebody else is at it."""
        name, lock = files.cell.name, claim(files)
        if lock is None:
            self.held_elsewhere.setdefault(name, files.read_result())
            return False
        was_held, result_before = name in self.held_elsewhere, self.held_elsewhere.pop(name, None)
        result = files.read_result()
        if result is not None and (files.is_done() or (was_held and result != result_before)):
            # By another sweep, since this one has looked; what failed there is tried again by the next start.
            lock.close()
            self._tell(result, 0.0)
            return True
        ending = ending_of(files.run)
        if (state := state_of(ending)) is not None:
            # Whoever ran it was killed before it could write the result.
            self._write(files, result_of(files, state, ending, None, self._commit), 0.0)
            lock.close()
            return True
        before = num_events(files.run)
        with files.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(files),
                env=_environment(slot, self._study.ranks, gpus, 60.0 * files.cell.config.cluster.stop_minutes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches this process alone, which asks its runs to stop.
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
            log_size = log.tell()
        self._running.append(Running(files, process, lock, slot, before, log_size))
        return True

    def command(self, files: CellFiles) -> list[str]:
        """Returns the command line of a cell: what a person would type to run it by hand."""
        module = ["-m", "mlra_scale.train", "--preset", self._study.preset]
        if self._study.ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self._study.ranks}"]
            module = launcher + module
        return [sys.executable, *module, "--run-dir", str(files.run.path), "--resume", "auto", *files.cell.overrides]

    def _pass_on(self, stop: StopAsked) -> None:
        """Asks every run to stop, once; a second Ctrl-C ends them at once."""
        for running in self._running:
            name = running.files.cell.name
            if stop.signal is not None and name not in self.interrupted:
                self.interrupted.append(name)
                running.process.send_signal(signal.SIGTERM if self._study.ranks == 1 else signal.SIGINT)
            elif stop.is_urgent and not running.is_ending:
                running.is_ending = True
                # torchrun would leave its ranks behind if it were killed. After SIGINT it ends them when SIGTERM comes:
                # for a rank that is the second Ctrl-C.
                running.process.send_signal(signal.SIGKILL if self._study.ranks == 1 else signal.SIGTERM)

    def _ended(self, running: Running, is_stopping: bool) -> None:
        """Writes down how a cell ended, if that is a result."""
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
        if state is None:
            if files.cell.name not in self.interrupted:
                self.interrupted.append(files.cell.name)
        else:
            if files.cell.name in self.interrupted:
                self.interrupted.remove(files.cell.name)
            result = result_of(files, state, ending, error, self._commit)
            self._write(files, result, time.monotonic() - running.started)
        running.lock.close()

    def _write(self, files: CellFiles, result: dict[str, Any], seconds: float) -> None:
        try:
            write_result(files, result, keep_checkpoints=self._study.checkpoints == "keep")
            self._directory.collect(self._cells)
        except (OSError, ConfigError) as error:
            # The record of the run has it all: the next start makes the result from it.
            self.unwritten[files.cell.name] = (
                f"its result cannot be written: {getattr(error, 'strerror', None) or error}"
            )
        self._tell(result, seconds)


def _error_text(running: Running, ending: dict[str, Any], code: int) -> str:
    """Says why a cell failed: in the words of the run or, where it had no time for any, with the end of its log."""
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    reason = ending.get("reason")
    if reason is None:
        with running.files.log.open("rb") as log:
            log.seek(running.log_size)
            text = log.read().decode("utf-8", errors="replace")
        reason = "\n".join(line for line in text.splitlines() if line.strip()) or "it has printed nothing"
    return f"{how}: {reason[-_ERROR_CHARACTERS:]}"


def _gpus() -> list[str]:
    """Returns the GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(len(gpu_names()))]


def _environment(slot: int, ranks: int, gpus: Sequence[str], stop_seconds: float) -> dict[str, str]:
    """Returns the environment of a cell: one thread a process, this very code, and GPUs of its own if there are enough.

    Args:
        slot: Its place among the cells that are run at once.
        ranks: Its processes.
        gpus: All that there are; with fewer than twice the ranks there is nothing to share out.
        stop_seconds: How long ranks may take to save before torchrun kills them.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(max(1, round(stop_seconds))))
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if len(gpus) >= 2 * ranks:
        first = slot * ranks % (len(gpus) - len(gpus) % ranks)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + ranks])
    return environment
