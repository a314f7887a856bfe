"""What a rank imports until its first step, for one that has time to do so before it is needed."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Sequence

from mlra_scale.config import ConfigError
from mlra_scale.train import build_parser, resolve
from mlra_scale.training.log.console import silence_libraries


def load_libraries(device: str, training: Sequence[str]) -> None:
    """Imports what a training on `cpu` or `cuda` with these arguments needs; CUDA's context is not made."""
    silence_libraries(device)
    # The optimizer's first step loads torch's compiler, whether it compiles or not.
    names = ["mlra_scale.training.loop.trainer", "torch._dynamo"]
    with contextlib.suppress(ConfigError):  # the rank reports it when it begins
        config, _, _ = resolve(build_parser().parse_intermixed_args(training))
        names += ["wandb"] if config.wandb.mode != "disabled" and os.environ["RANK"] == "0" else []
    for name in names:
        importlib.import_module(name)
