"""How long the documents of prepared data are, in tokens, the end-of-document token included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.console import table
from mlra_scale.data.folder import open_prepared

_QUANTILES = (0.1, 0.5, 0.9, 0.99)


def lengths_of(folder: Path) -> dict[str, NDArray[np.int32]]:
    """Returns the lengths of all documents of each split of a prepared folder, in tokens.

    Raises:
        DataError: The folder is not what was prepared.
    """
    _, splits = open_prepared(folder)
    return {split: np.asarray(files.sequence_lengths) for split, files in splits.items()}


def length_table(lengths: Mapping[str, Mapping[str, NDArray[np.int32]]]) -> str:
    """Returns a table of lengths by data set and split: tokens per document."""
    shares = ["median" if share == 0.5 else f"{100 * share:.0f} %" for share in _QUANTILES]
    headers = ["data set", "split", "documents", "tokens", "mean", *shares, "longest"]
    rows = []
    for name, splits in lengths.items():
        for split, values in splits.items():
            numbers = [len(values), int(values.sum(dtype=np.int64)), values.mean(), *quantiles_of(values), values.max()]
            rows.append([name, split, *(f"{number:,.0f}" for number in numbers)])
    return table(headers, rows, left=2)


def quantiles_of(values: NDArray[np.int32]) -> list[int]:
    """Returns the lengths which 10, 50, 90 and 99 % of the documents do not exceed."""
    places = [max(0, int(np.ceil(share * len(values))) - 1) for share in _QUANTILES]
    return [int(value) for value in np.partition(values, places)[places]]
