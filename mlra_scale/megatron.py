"""What this package uses of Megatron-core, and the only place that imports it.

Megatron marks fused kernels, none of them used here, with torch.compile, which loads the whole compiler at import: 40 %
of the time in which a rank starts. While it is imported the mark does nothing.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch


def _unmarked(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    return function if function is not None else _unmarked


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    with mock.patch.object(torch, "compile", _unmarked):
        yield


with _without_compiler(), warnings.catch_warnings():
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
