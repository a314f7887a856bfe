"""What a run tells of its saves; that they are whole is for tests/unit/checkpoint and tests/faults to show."""

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
from mlra_scale.training import checkpoints
from mlra_scale.training.candidates import Choice
from mlra_scale.training.exit_codes import ExitCode
from mlra_scale.training.finite import FiniteCheck, TrainingStopped
from mlra_scale.training.progress import Progress
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start import Start


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


def test_a_save_that_is_complete_is_told_even_if_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "Saver", FullDisk)
    config = load_config("debug")
    start = Start(config, batch_plan(config, 1), RunDirectory(tmp_path), Choice(None))
    mix = Mix(("a",), ("1",), (1.0,))
    datasets: Any = SimpleNamespace(identity=DataIdentity(mix, None, None, False), mixes=(mix,), manifests=())
    engine: Any = SimpleNamespace(topology=None, training_state=dict, buffers=dict)
    told: list[int] = []
    with (
        pytest.raises(TrainingStopped, match="step 2: no space left") as stopped,
        checkpoints.Checkpoints(
            start, engine, datasets, {"finite": FiniteCheck(config.train)}, lambda save: told.append(save.step)
        ) as saved,
    ):
        saved.save(Progress(2, 16, 1024), 1e-3, None, is_last=False)
    assert stopped.value.exit_code == ExitCode.CHECKPOINT_FAILED and told == [1]


BAD: tuple[Any, ...] = (1, "x", [], {}, None, {"loss_olmo2": {}}, {"loss_olmo2": {"window": "x", "count": 1}})


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("name", ["finite", "spikes", "guard"])
def test_a_window_that_cannot_be_read_names_the_checkpoint(tmp_path: Path, name: str, bad: Any) -> None:
    """The ranks have agreed on the checkpoint by then: the run stops, and never with another exception."""
    config = load_config("debug", overrides=["guard.enabled=true", "checkpoint.every=1"])
    folder = tmp_path / "checkpoints" / "step-00000001"
    start = Start(config, batch_plan(config, 1), RunDirectory(tmp_path), Choice(folder))
    engine: Any = SimpleNamespace(topology=None)
    datasets: Any = None
    guard = Guard(config.guard, config.train.global_batch_size)
    windows: Any = {"finite": FiniteCheck(config.train), "spikes": SpikeScores(), "guard": guard}
    loader = checkpoints.Checkpoints(start, engine, datasets, windows, lambda save: None)
    try:
        loader._load_windows({"windows": {name: bad}})
    except TrainingStopped as stopped:
        assert str(folder) in str(stopped) and f"its window `{name}`" in str(stopped)
        assert stopped.exit_code == ExitCode.CHECKPOINT_FAILED
    else:
        assert bad is None or bad == {} or (name == "spikes" and bad in ([], "x")), "what an older checkpoint may have"
