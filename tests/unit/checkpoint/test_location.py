"""Which checkpoint a path means."""

import shutil
from pathlib import Path

import pytest

from mlra_scale.checkpoint.files import CheckpointError
from mlra_scale.checkpoint.huggingface.importing import import_gpt2
from mlra_scale.checkpoint.retention import checkpoint_at
from tests.support.gpt2_folders import gpt2_folder


def test_a_run_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    model = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    run = tmp_path / "run"
    for step in (5, 10):
        import_gpt2(model, run / "checkpoints" / f"step-{step:08d}")
    older, newer = (run / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    for path in (run, run / "checkpoints", newer):
        assert checkpoint_at(path) == newer
    assert checkpoint_at(older) == older
    # What is not complete is passed over, under its own name as well as under that of a save in progress.
    shutil.copytree(newer, run / "checkpoints" / ".unfinished-step-00000015")
    (newer / "manifest.json").unlink()
    assert checkpoint_at(run) == older


def test_paths_without_a_checkpoint_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint_at(tmp_path / "nothing")
    (tmp_path / "checkpoints").mkdir()
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
            checkpoint_at(path)
