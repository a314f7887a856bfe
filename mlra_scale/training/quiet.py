"""Keeps what libraries print, and a user of ours can do nothing about, off the console."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def quiet_libraries(device: str) -> None:
    """Silences loggers and warnings; before DeepSpeed is imported, since it chooses its accelerator then.

    Args:
        device: `cpu` or `cuda`: the accelerator that DeepSpeed is to choose.
    """
    os.environ["DS_ACCELERATOR"] = device
    warnings.filterwarnings("ignore", module=r"(deepspeed|megatron|torch)\b")
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
