"""Data: text to Megatron indexed datasets (prepare), and from them to batches in a stateless order (open_datasets).

The names below are loaded on first use. The worker processes of tools/prepare_data.py import this package only to
tokenize; torch and Megatron would cost each of them several seconds and hundreds of MB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlra_scale.data.errors import DataError as DataError
    from mlra_scale.data.manifest import Manifest as Manifest
    from mlra_scale.data.mix import DataIdentity as DataIdentity
    from mlra_scale.data.mix import Mix as Mix
    from mlra_scale.data.opening import Datasets as Datasets
    from mlra_scale.data.opening import check_data as check_data
    from mlra_scale.data.opening import identify_data as identify_data
    from mlra_scale.data.opening import open_datasets as open_datasets
    from mlra_scale.data.stream import Batch as Batch
    from mlra_scale.data.stream import SampleStream as SampleStream

_HOME = {
    "Batch": "stream",
    "DataError": "errors",
    "DataIdentity": "mix",
    "Datasets": "opening",
    "Manifest": "manifest",
    "Mix": "mix",
    "SampleStream": "stream",
    "check_data": "opening",
    "identify_data": "opening",
    "open_datasets": "opening",
}

__all__ = [
    "Batch",
    "DataError",
    "DataIdentity",
    "Datasets",
    "Manifest",
    "Mix",
    "SampleStream",
    "check_data",
    "identify_data",
    "open_datasets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
