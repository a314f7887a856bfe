"""The checkpoints of a run: what they hold beside weights and moments, and what follows when one cannot be saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.loading import adam_begun_for, load_checkpoint, open_on_all_ranks
from mlra_scale.checkpoint.other_optimizer import notice_of_change
from mlra_scale.checkpoint.retention import checkpoint_name, set_aside_after, set_latest
from mlra_scale.checkpoint.saver import FinishedSave, Saver
from mlra_scale.config import Config, Problem
from mlra_scale.data import OpenData
from mlra_scale.parallel import Engine
from mlra_scale.stability.watcher import Watchers
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.log.console import suppressed_output
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.agreement import checkpoint_faults, on_rank_0
from mlra_scale.training.start.request import ResolvedRun
from mlra_scale.training.start.resume_choice import DataHistory


class Checkpoints:
    """Saves and loads the checkpoints of a run; a context manager, since a save may be in progress at the end.

    Args:
        run: The run.
        engine: The model.
        datasets: The data that it reads.
        watchers: Their state is saved too.
        on_saved: Called with every completed save, on every rank.

    Attributes:
        newest: The checkpoint of this run that was completed last, or that it resumed from; None: there is none.

    Every method but `point_to_start` is collective. They raise TrainingStopped, on all ranks, where a checkpoint cannot
    be saved or read.
    """

    def __init__(
        self,
        run: ResolvedRun,
        engine: Engine,
        datasets: OpenData,
        watchers: Watchers,
        on_saved: Callable[[FinishedSave], None],
    ) -> None:
        self._config, self._resume, self._history = run.config, run.resume, run.resume.history
        self._engine, self._datasets, self._watchers, self._on_saved = engine, datasets, watchers, on_saved
        self._folder = run.directory.checkpoints
        self.newest = run.resume.checkpoint if run.resume.is_in_place else None
        settings = run.config.checkpoint
        self._saver = Saver(
            self._folder,
            engine.topology,
            settings.keep_last,
            settings.keep_every,
            settings.asynchronous,
            may_copies_differ=settings.differing_copies == "report",
        )

    def load(self) -> None:
        """Loads the checkpoint that the run starts from, if there is one, whose checksums were compared before."""
        if self._resume.checkpoint is not None:
            has_watchers = self._resume.kind == "training"
            self._load(self._resume.checkpoint, self._resume.progress.step, has_watchers)

    def check_rollback_to(self, step: int) -> None:
        """Makes sure that a checkpoint of this run is not older than two changes of the optimizer."""
        try:
            adam_begun_for(self._engine, open_on_all_ranks(self._folder / checkpoint_name(step), self._engine.topology))
        except CheckpointError as error:
            remedy = f"the guard could not roll back: {error}, or from {self._resume.checkpoint} in a new --run-dir"
            problem = Problem("optim.name", self._config.optim.name, remedy)
            raise TrainingStopped(str(problem), {"step": self._resume.progress.step}, ExitCode.BAD_INPUT) from error

    def turn_back(self, step: int) -> None:
        """Makes `latest` name an earlier checkpoint of this run; a save in progress is cancelled.

        A start after a kill then continues from there, or from an earlier one where that is damaged.
        """
        self._saver.cancel()
        checkpoint, topology = self._folder / checkpoint_name(step), self._engine.topology
        on_rank_0(partial(set_latest, self._folder, checkpoint), topology, step, ExitCode.CHECKPOINT_FAILED)

    def roll_back(
        self, step: int, heartbeat: Callable[[], None], are_later_suspect: bool = False
    ) -> tuple[Progress, str | None]:
        """Loads the checkpoint to which the run has turned back.

        If it is damaged the run ends, and a start continues from an earlier one. Later ones which `are_later_suspect`
        are then set aside, so that no start takes them.

        Returns:
            The counters to continue with, and a line about what another optimizer does not take over, if there is one.
        """
        checkpoint, topology = self._folder / checkpoint_name(step), self._engine.topology
        if faults := checkpoint_faults(checkpoint, topology):
            if are_later_suspect:
                set_aside = partial(set_aside_after, self._folder, step)
                on_rank_0(set_aside, topology, step, ExitCode.CHECKPOINT_FAILED)
                faults.append("later checkpoints may hold wrong numbers and are now named suspect-step-...")
            raise TrainingStopped("; ".join(faults), {"step": step}, ExitCode.CHECKPOINT_FAILED)
        heartbeat()
        store = self._load(checkpoint, step)
        self.newest = checkpoint
        self._history = self._history.after_rollback_to(step)
        heartbeat()
        return Progress(**store.state["progress"]), notice_of_change(store, self._engine.rules)

    def _load(self, checkpoint: Path, step: int, has_watchers: bool = True) -> Store:
        try:
            with suppressed_output():
                store = open_on_all_ranks(checkpoint, self._engine.topology)
                state = load_checkpoint(self._engine, store)
        except CheckpointError as error:
            raise TrainingStopped(str(error), {"step": step}, ExitCode.CHECKPOINT_FAILED) from error
        if has_watchers:
            try:
                self._watchers.load_state(state["windows"])
            except ValueError as error:
                message = f"state.json of {checkpoint}: the state of {error}; resume from another checkpoint"
                raise TrainingStopped(message, {"step": step}, ExitCode.CHECKPOINT_FAILED) from error
        return store

    def point_to_start(self) -> None:
        """Makes `latest` name the checkpoint that the run resumes from, which need not be its last one; for rank 0."""
        if self.newest is not None:
            set_latest(self._folder, self.newest)

    def save(
        self,
        progress: Progress,
        learning_rate: float,
        measured: Mapping[str, Any],
        is_last: bool = False,
        pinned: int | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """Begins to save a checkpoint; the last one is complete when this returns.

        Args:
            progress: The counters.
            learning_rate: Of the last step.
            measured: After that step, of which the model card of an export has validation loss, texts and tasks.
            is_last: Whether the run ends here.
            pinned: Step of an earlier checkpoint that must be kept.
            left_out: Measurements that a stop request has left out after that step.
        """
        state = {
            "progress": asdict(progress),
            "learning_rate": learning_rate,
            "validation_loss": measured.get("validation_loss"),
            "engine": self._engine.training_state(),
            "windows": self._watchers.state(),
            "data_fingerprints": self._datasets.identity.fingerprints,
            "data": DataHistory.of(self._datasets.identity, self._datasets.mixes).to_dict(),
            "history": self._history.to_dict(),
        }
        state |= {name: measured[name] for name in ("tasks", "harness") if name in measured}
        if left_out:
            state["left_out"] = list(left_out)
        with self._failures_stop(progress.step):
            # The one before may be complete: it is reported even if this one fails.
            self._report(self._saver.finish())
            self._saver.save(
                self._engine,
                progress.step,
                state,
                self._engine.buffers(),
                self._config.to_yaml(),
                tokenizer_folder(self._config, self._datasets),
                synchronous=is_last,
                pinned=pinned,
            )
            self._report(self._saver.finish() if is_last else [])

    def finish(self, step: int) -> None:
        """Waits for the save in progress, if there is one."""
        with self._failures_stop(step):
            self._report(self._saver.finish())

    def poll(self, step: int) -> None:
        """Advances a save in progress and reports those that are complete; called after every step."""
        with self._failures_stop(step):
            self._report(self._saver.poll())

    def _report(self, finished: list[FinishedSave]) -> None:
        for save in finished:
            self.newest = save.path
            self._on_saved(save)

    @contextlib.contextmanager
    def _failures_stop(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            message = (
                f"step {step}: {error}. The run stops on all ranks, because it could not be resumed from here on; the "
                "checkpoints before this one are as they were. Mend the cause and continue with --resume auto."
            )
            raise TrainingStopped(message, {"step": step}, ExitCode.CHECKPOINT_FAILED) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends with no save in progress.

        A stop that all ranks make together lets it complete: it may be the newest checkpoint. After any other error the
        other ranks may be gone.
        """
        is_common = isinstance(error, TrainingStopped) and error.exit_code != ExitCode.CHECKPOINT_FAILED
        if not is_common:
            self._saver.abandon()
            return
        try:
            self._report(self._saver.finish())
        except CheckpointError as fault:
            assert error is not None
            error.add_note(f"a save in progress failed as well: {fault}")


def tokenizer_folder(config: Config, datasets: OpenData) -> Path | None:
    """Returns the folder of the data's tokenizer, which an export needs when the data are out of reach."""
    folders = [manifest.tokenizer_folder for manifest in datasets.manifests[:1]]
    folders += [] if config.data.tokenizer is None else [Path(config.data.tokenizer)]
    return next((folder for folder in folders if folder.is_dir()), None)
