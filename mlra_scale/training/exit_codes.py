"""How a training process ends: its exit codes, and the error that ends a run on all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `python -m mlra_scale.train`.

    torchrun reports 1 for any failed worker; the worker's own code is in torchrun's report and in the run directory's
    events.jsonl. What a cluster job does after each of them is in cluster/job/policy.py.
    """

    DONE = 0
    FAILED = 1
    """An unexpected error; Python prints the traceback."""
    BAD_INPUT = 2
    """The message says what to change. Nothing was written, unless only training could find the fault in the data."""
    NON_FINITE = 3
    """The loss or the gradient norm is not finite; running again ends in the same way."""
    CHECKPOINT_FAILED = 4
    """A checkpoint could not be written, or another program has removed the run directory or its record. Earlier
    checkpoints are unchanged. Running again continues from the newest."""
    PREEMPTED = 5
    """A signal requested a stop: all ranks stopped after the same step. Its checkpoint is complete, unless there was
    nothing to save yet. Running again continues from there."""
    BAD_NODE = 6
    """The checks before the first step found a node that cannot be used, and nothing was trained. Or a step was
    computed wrong (guard.replay_every, guard.checksum_every): running again continues from the checkpoint to which the
    guard has returned."""
    UNSTABLE = 7
    """The run stayed unstable after the largest allowed number of rollbacks."""
    EXPORT_FAILED = 8
    """All steps are done and saved, and the export that the configuration wants (`export.format`) could not be made or
    pushed; the message says why."""
    INTERRUPTED = 130
    """A second Ctrl-C, as shells report it (128 + SIGINT): nothing was saved."""


class TrainingStopped(RuntimeError):
    """The run ends, on all ranks after the same step; the text gives the reason and the remedy.

    Attributes:
        values: The step and its numbers, for the event log.
        exit_code: How the process ends.
    """

    def __init__(
        self, message: str, values: Mapping[str, float | int | str | None], exit_code: ExitCode = ExitCode.NON_FINITE
    ) -> None:
        super().__init__(message)
        self.values = values
        self.exit_code = exit_code
