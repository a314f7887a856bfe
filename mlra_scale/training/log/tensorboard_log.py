"""TensorBoard: the numbers of the record as event files in the run directory. It never ends a run that has begun."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from mlra_scale.config import Config, Problem
from mlra_scale.training.record import finite_or_none
from mlra_scale.training.run_directory import RunDirectory

_FLUSH_SECONDS = 10
_logger = logging.getLogger(__name__)


class TensorBoardLog:
    """The event files of one start on rank 0; elsewhere, and where it is off, values are dropped.

    Args:
        writer: torch's SummaryWriter; None: values are dropped.
    """

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers of one step; those of a mapping become a group, and all others the group `curves`."""
        if self._writer is None:
            return
        try:
            for tag, value in _scalars(values):
                self._writer.add_scalar(tag if "/" in tag else f"curves/{tag}", value, step)
        except Exception as error:  # the disk may be full; that must not end a training run
            self._stop(error)

    def finish(self) -> None:
        """Writes what is still in memory, and closes the files."""
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:  # as above
                self._stop(error)
            self._writer = None

    def _stop(self, error: Exception) -> None:
        _logger.warning("tensorboard: stopped logging (%s)", " ".join(str(error).split()) or type(error).__name__)
        self._writer = None


def check_tensorboard(config: Config) -> list[Problem]:
    """Finds out whether the package is there, where it is needed; it is an extra."""
    if not config.tensorboard.enabled or find_spec("tensorboard") is not None:
        return []
    remedy = "needs the package tensorboard: pip install 'mlra-scale[tensorboard]'"
    return [Problem("tensorboard.enabled", True, remedy)]


def open_tensorboard(config: Config, run_directory: RunDirectory, first_step: int) -> TensorBoardLog:
    """Starts an event file in the folder tensorboard of the run directory, where the configuration wants it.

    Args:
        config: The configuration of the run.
        run_directory: Where the folder is.
        first_step: The first step that this start, or what follows a rollback, records: TensorBoard drops what earlier
            files have from there on (`purge_step`), as the record does.
    """
    if not config.tensorboard.enabled:
        return TensorBoardLog()
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_directory.tensorboard), purge_step=first_step, flush_secs=_FLUSH_SECONDS)
        indented = "\n".join(f"    {line}" for line in config.to_yaml().splitlines())  # Markdown for code
        writer.add_text("config", indented, first_step)
    except Exception as error:  # libraries of others, and a disk
        _logger.warning("tensorboard: not used in this run (%s)", error)
        return TensorBoardLog()
    return TensorBoardLog(writer)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the finite numbers of nested mappings, each with its path; the step is no value."""
    for key, value in finite_or_none(values).items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and f"{prefix}{key}" != "step":
            yield f"{prefix}{key}", float(value)
