"""Data: text to Megatron indexed data sets (prepare), and from them to batches in a stateless order (open_datasets).

All names but `DataError` are loaded on first use: the worker processes of mlra-scale prepare import this package to
tokenize only, and torch and Megatron would cost each of them several seconds and hundreds of MB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlra_scale.console import InputError

if TYPE_CHECKING:
    from mlra_scale.data.mix import Mix
    from mlra_scale.data.opening import OpenData, check_data, identify_data, open_datasets
    from mlra_scale.data.stream import Batch, SampleStream

_MODULES = {"Batch": "stream", "SampleStream": "stream", "Mix": "mix", "OpenData": "opening"}
_MODULES |= dict.fromkeys(("check_data", "identify_data", "open_datasets"), "opening")


class DataError(InputError, ValueError):
    """A source, a data set or a tokenizer cannot be used; the message names it and says what to do."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
