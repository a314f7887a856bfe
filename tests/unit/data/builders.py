"""Small data sets and configurations for the tests of the data room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mlra_scale.config import Config, load_config
from mlra_scale.data.indexed import SequenceRange, open_indexed
from mlra_scale.data.prepare import PrepareOptions, prepare


def write_documents(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> Path:
    """Writes documents with Megatron's own builder, as Megatron-LM's tools do."""
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(prefix) + ".idx")
    return prefix


def random_documents(count: int, mean: int, seed: int = 0, vocabulary: int = 500, end: int = 0) -> list[list[int]]:
    """Documents of random length and content that end with the token `end`, which is nowhere else in them."""
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(1.0 / mean, size=count)
    return [[*rng.integers(1, vocabulary, size=length - 1).tolist(), end] for length in lengths]


def whole_range(prefix: Path, cache: Path | None = None) -> SequenceRange:
    """All sequences of a data set."""
    files = open_indexed(str(prefix))
    return SequenceRange(files, 0, len(files.sequence_lengths), cache or Path(f"{prefix}.cache"))


def config_for(path: Path | None, *overrides: str, **fields: Any) -> Config:
    """The debug preset on some data; keyword arguments are written as data.NAME=VALUE."""
    named = [] if path is None else [f"data.path={path}"]
    named += [f"data.{name}={value}" for name, value in fields.items()]
    return load_config("debug", None, None, ["train.sequence_length=16", *named, *overrides])


def prepare_texts(output: Path, texts: Sequence[str], **options: Any) -> Path:
    """Prepares a data set of texts, a document each, with their JSON lines beside it; returns its folder."""
    source = output.with_suffix(".jsonl")
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return prepare(PrepareOptions(output, [str(source)], progress=False, **options)).folder
