"""What this package uses of Megatron-core, and the only place that imports it.

Its import is made cheap for a start of ranks. Megatron marks fused kernels, none of them used here, with torch.compile,
which loads the whole compiler: while Megatron is imported, the mark does nothing. For timers and an inference engine
that are not used here it looks for wandb and TensorBoard, which take a third of its time: it finds none. The logs of
this package import them afterwards, where a run uses them.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch


def _unmarked(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    return function if function is not None else _unmarked


_UNUSED = ("wandb", "torch.utils.tensorboard")


@contextlib.contextmanager
def _imported_cheaply() -> Iterator[None]:
    modules: dict[str, Any] = sys.modules
    absent = [name for name in _UNUSED if name not in modules]
    modules |= dict.fromkeys(absent)  # None: to import it is an ImportError
    try:
        with mock.patch.object(torch, "compile", _unmarked):
            yield
    finally:
        for name in absent:
            del modules[name]


with _imported_cheaply(), warnings.catch_warnings():
    # It looks for optional kernels that this package does not use.
    warnings.filterwarnings("ignore", r"Transformer Engine and Apex are not installed", UserWarning)
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.datasets.helpers import build_sample_idx
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        reduce_from_tensor_model_parallel_region,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "build_sample_idx",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
]
