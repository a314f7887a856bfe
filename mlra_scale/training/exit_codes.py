"""Exit codes of `python -m mlra_scale.train`: what a launcher may conclude from the process's end."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a training process ended.

    torchrun reports 1 for any failed worker; the code of the worker itself is in torchrun's report and in the run
    directory's events.jsonl. `mlra_scale.cluster` acts on them: see cluster/job/policy.py.
    """

    DONE = 0
    FAILED = 1
    """An error of ours or of a library; Python prints the traceback."""
    BAD_INPUT = 2
    """The message says what to change. Nothing was started and nothing was left behind, unless the fault lies so deep
    in the data that only training found it."""
    NON_FINITE = 3
    """The loss or the gradient norm stopped being a number; running again gives the same end."""
    CHECKPOINT_FAILED = 4
    """A checkpoint could not be written, or another program has taken the run directory or its record away; the earlier
    checkpoints are as they were. Running again continues from the newest."""
    PREEMPTED = 5
    """A signal asked the run to stop: all ranks did after the same step, and its checkpoint is complete, or there was
    nothing to save yet. Running again continues from there."""
    BAD_NODE = 6
    """The checks before the first step found a node that cannot be used; nothing was trained."""
    UNSTABLE = 7
    """The guard has gone back as often as it may, and the run is unstable all the same."""
    INTERRUPTED = 130
    """A second Ctrl-C, as shells report it (128 + SIGINT): nothing was saved."""
