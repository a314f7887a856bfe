"""Saving, keeping and loading checkpoints, so that nothing half-written is ever visible."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from mlra_scale.config import Config
from mlra_scale.parallel.engine import Engine
from mlra_scale.training.progress import Progress
from mlra_scale.training.quiet import muted
from mlra_scale.training.record import write_atomically
from mlra_scale.training.resume import Origin
from mlra_scale.training.run_directory import RunDirectory, checkpoint_name

_UNFINISHED = ".unfinished-"


class Checkpoints:
    """The checkpoints of a run.

    The engine writes into a folder with a name that no reader looks for; when every rank is done it is renamed, and
    only then `latest` moves. A crash at any moment leaves the previous checkpoint as the latest.
    """

    def __init__(self, run: RunDirectory, config: Config, data_fingerprints: dict[str, str]) -> None:
        self._folder = run.checkpoints
        self._config = config
        self._data_fingerprints = data_fingerprints

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Writes a checkpoint and removes those beyond `checkpoint.keep_last`; collective.

        Args:
            engine: Its weights and optimizer go in.
            progress: The counters; they go in.

        Returns:
            The checkpoint's folder.
        """
        is_main = engine.topology.rank == 0
        final = self._folder / checkpoint_name(progress.step)
        unfinished = self._folder / (_UNFINISHED + final.name)
        if is_main:
            for leftover in self._folder.glob(_UNFINISHED + "*"):
                shutil.rmtree(leftover)
            unfinished.mkdir(parents=True)
        dist.barrier()
        with muted():
            engine.save(unfinished, asdict(progress))
        dist.barrier()
        if is_main:
            write_atomically(unfinished / "config.yaml", self._config.to_yaml())
            topology = engine.topology
            origin = Origin(progress.step, topology.world_size, topology.data, self._data_fingerprints)
            origin.write(unfinished)
            if final.exists():
                # Left by a run that went on from an earlier checkpoint; the newer one is this.
                shutil.rmtree(final)
            os.replace(unfinished, final)
            write_atomically(self._folder / "latest", final.name + "\n")
            self._retire(final)
        dist.barrier()
        return final

    def load(self, engine: Engine, checkpoint: Path) -> Progress:
        """Puts a checkpoint into the engine; collective.

        Args:
            engine: Built under the same layout.
            checkpoint: A folder that `save` returned, and that the checks of resume.py have let pass.

        Returns:
            The counters of that moment.
        """
        with muted():
            state = engine.load(checkpoint)
        if engine.topology.rank == 0 and checkpoint.parent.resolve() == self._folder.resolve():
            # The run goes on from here, whatever later checkpoints it once had.
            write_atomically(self._folder / "latest", checkpoint.name + "\n")
        return Progress(**state)

    def _retire(self, newest: Path) -> None:
        """Removes all but the last few checkpoints, and later ones than `newest`: they are of an abandoned branch."""
        found = sorted(path for path in self._folder.glob("step-*") if path.is_dir())
        kept = [path for path in found if path.name <= newest.name][-self._config.checkpoint.keep_last :]
        for path in found:
            if path not in kept:
                shutil.rmtree(path)
