"""Data: text to Megatron indexed datasets (prepare), and from them to batches in a stateless order (open_datasets).

The names below, `DataError` apart, are loaded on first use. The worker processes of tools/prepare_data.py import this
package only to tokenize; torch and Megatron would cost each of them several seconds and hundreds of MB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlra_scale.console import InputError

if TYPE_CHECKING:
    from mlra_scale.data.manifest import Manifest as Manifest
    from mlra_scale.data.mix import DataIdentity as DataIdentity
    from mlra_scale.data.mix import Mix as Mix
    from mlra_scale.data.opening import Datasets as Datasets
    from mlra_scale.data.opening import check_data as check_data
    from mlra_scale.data.opening import identify_data as identify_data
    from mlra_scale.data.opening import open_datasets as open_datasets
    from mlra_scale.data.stream import Batch as Batch
    from mlra_scale.data.stream import SampleStream as SampleStream

_MODULES = {
    "manifest": ("Manifest",),
    "mix": ("DataIdentity", "Mix"),
    "opening": ("Datasets", "check_data", "identify_data", "open_datasets"),
    "stream": ("Batch", "SampleStream"),
}


class DataError(InputError, ValueError):
    """A source, a data set or a tokenizer cannot be used; the message names it and says what to do."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
