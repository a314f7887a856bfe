"""What a run does about its saves; that they are complete is tested in tests/unit/checkpoint and tests/faults."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlra_scale.checkpoint import CheckpointError
from mlra_scale.checkpoint.saver import FinishedSave
from mlra_scale.config import batch_plan, load_config
from mlra_scale.data.mix import DataIdentity, Mix
from mlra_scale.stability.guard import Guard
from mlra_scale.stability.spikes import SpikeScores
from mlra_scale.stability.watcher import Watchers
from mlra_scale.training.exit_codes import ExitCode, TrainingStopped
from mlra_scale.training.loop import checkpoints
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.schedule import Progress
from mlra_scale.training.start.request import ResolvedRun
from mlra_scale.training.start.resume_choice import ResumePoint
from mlra_scale.training.watch.step_watchers import FiniteCheck


class FullDisk:
    """A saver whose first save has just become complete, and that has no room for the second."""

    def __init__(self, folder: Path, *settings: Any, **more: Any) -> None:
        self._first: list[FinishedSave] = [FinishedSave(1, folder / "step-00000001", 9, 0.1, 0.2)]

    def finish(self) -> list[FinishedSave]:
        finished, self._first = self._first, []
        return finished

    def save(self, *arguments: Any, **options: Any) -> None:
        raise CheckpointError("no space left")

    def abandon(self) -> None:
        pass


def test_a_complete_save_is_reported_even_if_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "Saver", FullDisk)
    config = load_config("debug")
    run = ResolvedRun(config, batch_plan(config, 1), RunDirectory(tmp_path))
    mix = Mix(("a",), ("1",), (1.0,))
    datasets: Any = SimpleNamespace(identity=DataIdentity(mix, None, None, False), mixes=(mix,), manifests=())
    engine: Any = SimpleNamespace(topology=None, training_state=dict, buffers=dict)
    saves: list[int] = []
    with (
        pytest.raises(TrainingStopped, match="step 2: no space left") as stopped,
        checkpoints.Checkpoints(
            run, engine, datasets, Watchers(FiniteCheck(config.train)), lambda save: saves.append(save.step)
        ) as saving,
    ):
        saving.save(Progress(2, 16, 1024), 1e-3, {}, is_last=False)
    assert stopped.value.exit_code == ExitCode.CHECKPOINT_FAILED and saves == [1]


BAD: tuple[Any, ...] = (1, "x", [], {}, None, {"loss_olmo2": {}}, {"loss_olmo2": {"window": "x", "count": 1}})


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("name", ["finite", "spikes", "guard"])
def test_a_state_that_cannot_be_read_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bad: Any
) -> None:
    """The ranks have agreed on the checkpoint by then: the run stops, and never with another exception."""
    config = load_config("debug", overrides=["guard.enabled=true", "checkpoint.every=1"])
    folder = tmp_path / "checkpoints" / "step-00000001"
    run = ResolvedRun(config, batch_plan(config, 1), RunDirectory(tmp_path), ResumePoint(folder, kind="training"))
    engine: Any = SimpleNamespace(topology=None)
    datasets: Any = None
    guard = Guard(config.guard, config.train.global_batch_size)
    watchers = Watchers(FiniteCheck(config.train), SpikeScores(), guard)
    monkeypatch.setattr(checkpoints, "open_on_all_ranks", lambda *_: None)
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda *_: {"windows": {name: bad}})
    try:
        checkpoints.Checkpoints(run, engine, datasets, watchers, lambda save: None).load()
    except TrainingStopped as stopped:
        assert str(folder) in str(stopped) and f"the state of `{name}`" in str(stopped)
        assert stopped.exit_code == ExitCode.CHECKPOINT_FAILED
    else:
        assert bad is None or bad == {} or (name == "spikes" and bad in ([], "x")), "what an older checkpoint may have"
