"""Keeps what libraries print, and a user of ours can do nothing about, off the console."""

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
"""What these libraries warn of in every run. Any other warning is shown: it may be the first sign of a fault."""


def quiet_libraries(device: str) -> None:
    """Silences loggers and warnings; before DeepSpeed is imported, since it chooses its accelerator then.

    Args:
        device: `cpu` or `cuda`: the accelerator that DeepSpeed is to choose.
    """
    os.environ["DS_ACCELERATOR"] = device
    for message, category in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    import deepspeed  # noqa: F401  (creates the logger that is quietened here)

    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Holds back what is printed inside (DeepSpeed prints memory reports and file names); shows it if it fails."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stdout(captured):
            yield
    except BaseException:
        print(captured.getvalue(), file=sys.stderr, end="", flush=True)
        raise
