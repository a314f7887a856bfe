"""Keeps messages of libraries that a user cannot act on off the console."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

_EXPECTED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # DeepSpeed calls collectives by their names of before torch 2.13.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    # DeepSpeed broadcasts parameters, which need a gradient, when it starts an engine; nothing is differentiated there.
    (r"c10d::broadcast_: an autograd kernel was not registered", UserWarning),
    # Megatron-core looks for optional kernels that this package does not use.
    (r"Transformer Engine and Apex are not installed", UserWarning),
)
"""Warnings of every run. Any other warning is shown: it may be the first sign of a fault."""


def silence_libraries(device: str) -> None:
    """Silences loggers and warnings; to be called before DeepSpeed is imported, which then chooses its accelerator.

    Args:
        device: `cpu` or `cuda`: DeepSpeed's accelerator.
    """
    os.environ["DS_ACCELERATOR"] = device
    for message, category in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    import deepspeed  # noqa: F401  (creates the logger that is silenced here)

    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def suppressed_output() -> Iterator[None]:
    """Suppresses what the block prints, such as DeepSpeed's memory reports; an error in the block prints it."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stdout(captured):
            yield
    except BaseException:
        print(captured.getvalue(), file=sys.stderr, end="", flush=True)
        raise
