"""The checkpoints of a run: what goes in beside weights and moments, when one is done, and how a run ends without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from mlra_scale.checkpoint import CheckpointError
from mlra_scale.checkpoint.loading import load_checkpoint, open_on_all_ranks
from mlra_scale.checkpoint.retention import checkpoint_name, remove_after, set_latest, step_named
from mlra_scale.checkpoint.saver import FinishedSave, Saver
from mlra_scale.config import Config
from mlra_scale.data import Datasets
from mlra_scale.parallel.interface import Engine
from mlra_scale.training.agreement import faults_of, on_rank_0
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import TrainingStopped
from mlra_scale.training.progress import Progress
from mlra_scale.training.quiet import muted
from mlra_scale.training.resumed_data import DataHistory
from mlra_scale.training.start import Start


class Stateful(Protocol):
    """Something that looks back over steps: a checkpoint keeps what it has seen."""

    def state(self) -> Any:
        """Returns it, fit for JSON."""
        ...

    def load(self, state: Any) -> None:
        """Goes on from it."""
        ...


class Checkpoints:
    """Saves and loads the checkpoints of a run; a context manager, since a save may be in flight at the end.

    Args:
        start: The run.
        engine: What is saved.
        datasets: The data that it reads.
        windows: What else goes in, by name; a checkpoint from before one of them was invented leaves it as it is.
        told: Called with every completed save, on every rank.

    Attributes:
        newest: The checkpoint of this run that was completed last, or that it is resumed from; None: there is none.
    """

    def __init__(
        self,
        start: Start,
        engine: Engine,
        datasets: Datasets,
        windows: Mapping[str, Stateful],
        told: Callable[[FinishedSave], None],
    ) -> None:
        self._start, self._engine, self._datasets, self._windows, self._told = start, engine, datasets, windows, told
        self._history = start.history
        settings = start.config.checkpoint
        self._folder = start.run.checkpoints
        self.newest = start.checkpoint if start.goes_on_in_place else None
        self._saver = Saver(
            self._folder,
            engine.topology,
            settings.keep_last,
            settings.keep_every,
            settings.asynchronous,
            may_copies_differ=settings.differing_copies == "report",
        )

    def load(self) -> None:
        """Puts the checkpoint of the start, if there is one, into the engine; collective.

        Its checksums have been compared (agreement.settle).

        Raises:
            TrainingStopped: It cannot be read any more; on all ranks.
        """
        checkpoint = self._start.checkpoint
        if checkpoint is None:
            return
        state = self._load(checkpoint, self._start.progress.step)
        if self._start.kind == "training":
            self._load_windows(state)

    @property
    def newest_step(self) -> int | None:
        """Step of the newest checkpoint of this run."""
        return None if self.newest is None else step_named(self.newest)

    def go_back_to(self, step: int, beat: Callable[[], None]) -> Progress:
        """Puts an earlier checkpoint of this run into the engine, and makes `latest` name it; collective.

        Args:
            step: Of the checkpoint.
            beat: Called between the parts of it that take time.

        Raises:
            TrainingStopped: It cannot be read, or the save in flight failed; on all ranks.
        """
        self.finish(step)
        beat()
        checkpoint, topology = self._folder / checkpoint_name(step), self._engine.topology
        if faults := faults_of(checkpoint, topology):
            raise TrainingStopped("; ".join(faults), {"step": step}, ExitCode.CHECKPOINT_FAILED)
        beat()
        state = self._load(checkpoint, step)
        self._load_windows(state)
        self.newest = checkpoint
        self._history = self._history.gone_back_to(step)
        on_rank_0(partial(set_latest, self._folder, checkpoint), topology, step, ExitCode.CHECKPOINT_FAILED)
        beat()
        return Progress(**state["progress"])

    def remove_after(self, step: int) -> None:
        """Removes what was saved of steps that are undone, when the run has gone back to a checkpoint; for rank 0.

        Raises:
            CheckpointError: That cannot be done.
        """
        remove_after(self._folder, step)

    def _load(self, checkpoint: Path, step: int) -> dict[str, Any]:
        try:
            with muted():
                return load_checkpoint(self._engine, open_on_all_ranks(checkpoint, self._engine.topology))
        except CheckpointError as error:
            raise TrainingStopped(str(error), {"step": step}, ExitCode.CHECKPOINT_FAILED) from error

    def _load_windows(self, state: Mapping[str, Any]) -> None:
        for name, window in self._windows.items():
            if name in state["windows"]:
                try:
                    window.load(state["windows"][name])
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                    where = f"state.json of {self._start.checkpoint}: its window `{name}` cannot be read"
                    message = f"{where} ({type(error).__name__}: {error}); resume from another checkpoint"
                    values = {"step": self._start.progress.step}
                    raise TrainingStopped(message, values, ExitCode.CHECKPOINT_FAILED) from error

    def point_to_start(self) -> None:
        """Makes `latest` name the checkpoint that the run goes on from, whatever later ones it once had; for rank 0."""
        checkpoint = self._start.checkpoint
        if checkpoint is not None and self._start.goes_on_in_place:
            set_latest(self._folder, checkpoint)

    def save(
        self,
        progress: Progress,
        learning_rate: float,
        validation_loss: float | None,
        is_last: bool = False,
        pinned: int | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """Begins to save a checkpoint, or saves it at once where it is the last; collective.

        Args:
            progress: The counters.
            learning_rate: Of the step that was just done.
            validation_loss: After that step, if it was measured; a note for the model card of an export.
            is_last: Whether the run ends here.
            pinned: Step of an earlier checkpoint that is kept.
            left_out: What was due after that step and was not measured, because a signal asked for a stop.

        Raises:
            TrainingStopped: It failed, or the one before did; on all ranks.
        """
        config = self._start.config
        state = {
            "progress": asdict(progress),
            "learning_rate": learning_rate,
            "validation_loss": validation_loss,
            "engine": self._engine.training_state(),
            "windows": {name: window.state() for name, window in self._windows.items()},
            "data_fingerprints": self._datasets.identity.fingerprints,
            "data": DataHistory.of(self._datasets.identity, self._datasets.mixes).to_dict(),
            "history": self._history.to_dict(),
        }
        if left_out:
            state["left_out"] = list(left_out)
        try:
            # The one before may be complete: that is told even if this one fails.
            self._tell(self._saver.finish())
            self._saver.save(
                self._engine,
                progress.step,
                state,
                self._engine.buffers(),
                config.to_yaml(),
                self._tokenizer(config),
                synchronous=is_last,
                pinned=pinned,
            )
            self._tell(self._saver.finish() if is_last else [])
        except CheckpointError as error:
            raise self._failed(error, progress.step) from error

    def finish(self, step: int) -> None:
        """Waits for the save in flight, if there is one; collective.

        Raises:
            TrainingStopped: It failed; on all ranks.
        """
        try:
            self._tell(self._saver.finish())
        except CheckpointError as error:
            raise self._failed(error, step) from error

    def poll(self, step: int) -> None:
        """Brings a save in flight forward and tells of those that are complete; collective, after every step.

        Raises:
            TrainingStopped: The save failed; on all ranks on the same step.
        """
        try:
            self._tell(self._saver.poll())
        except CheckpointError as error:
            raise self._failed(error, step) from error

    def _tell(self, finished: list[FinishedSave]) -> None:
        for save in finished:
            self.newest = save.path
            self._told(save)

    def _failed(self, error: CheckpointError, step: int) -> TrainingStopped:
        message = (
            f"step {step}: {error}. The run stops on all ranks, since it would go on without a way back; the "
            "checkpoints before this one are as they were. Mend the cause and continue with --resume auto."
        )
        return TrainingStopped(message, {"step": step}, ExitCode.CHECKPOINT_FAILED)

    def _tokenizer(self, config: Config) -> Path | None:
        """The folder of the data's tokenizer, which an export needs when the data are out of reach."""
        folders = [manifest.tokenizer_folder for manifest in self._datasets.manifests[:1]]
        folders += [] if config.data.tokenizer is None else [Path(config.data.tokenizer)]
        return next((folder for folder in folders if folder.is_dir()), None)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends with no save in flight.

        A stop that all ranks make together lets it complete: it may be the best way back. After any other error the
        other ranks cannot be counted on.
        """
        is_common = isinstance(error, TrainingStopped) and error.exit_code != ExitCode.CHECKPOINT_FAILED
        if not is_common:
            self._saver.abandon()
            return
        try:
            self._tell(self._saver.finish())
        except CheckpointError as fault:
            assert error is not None
            error.add_note(f"a save in flight failed as well: {fault}")
