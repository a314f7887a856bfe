"""Text to a prepared data set: a folder with Megatron indexed data sets, the tokenizer and a manifest.

The folder's bytes are a function of the documents, the tokenizer and the options alone: not of the number of workers,
of time or of the path.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mlra_scale import __version__
from mlra_scale.config.json_text import printable
from mlra_scale.data import DataError
from mlra_scale.data.encode import EncodedChunk, encode_in_order
from mlra_scale.data.folder import tokenizer_names
from mlra_scale.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    FileSum,
    Manifest,
    content_fingerprint,
    manifest_text,
    read_manifest,
)
from mlra_scale.data.readers import Document
from mlra_scale.data.sources import Source, open_sources
from mlra_scale.data.tokenizer import LoadedTokenizer, load_tokenizer, save_tokenizer, tokenizer_sha256, train_bpe
from mlra_scale.files import new_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mlra_scale.data.writer import SplitWriter

_ROUND_TRIP_DOCUMENTS = 64
_ROUND_TRIP_CHARACTERS = 10_000


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare; `tools/prepare_data.py --help` describes the fields that are its flags.

    Attributes:
        output: Folder to make.
        tokenizer: See load_tokenizer; empty: train a BPE of `train_bpe` tokens.
        train_bpe_bytes: The BPE is trained on this many bytes of training text from the beginning of the corpus.
        max_bytes: Stop after the document with which this many bytes of text are reached; None: read all.
        validation_fraction: Expected share of documents in the validation split.
    """

    output: Path
    sources: Sequence[str]
    tokenizer: Sequence[str] = ()
    train_bpe: int | None = None
    train_bpe_bytes: int = 100_000_000
    end_of_document: str | None = None
    field: str = "text"
    hf_split: str = "train"
    hf_config: str | None = None
    max_bytes: int | None = None
    validation_fraction: float = 0.01
    seed: int = 0
    workers: int = 1
    overwrite: bool = False
    progress: bool = True


class Corpus:
    """The non-empty documents of all sources, with the split of each."""

    def __init__(self, sources: Sequence[Source], options: PrepareOptions) -> None:
        self._sources = sources
        self._options = options
        self.num_documents = [0] * len(sources)
        self.num_empty = [0] * len(sources)

    def is_validation(self, index: int) -> bool:
        """Returns whether a document is in the validation split: a hash of (seed, index) against the fraction."""
        digest = hashlib.blake2b(f"{self._options.seed} {index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._options.validation_fraction * 2.0**64

    def documents(self) -> Iterator[Document]:
        """Yields the documents; the position in this sequence is the document's index. Counts anew every time.

        Raises:
            DataError: There is none.
        """
        self.num_documents = [0] * len(self._sources)
        self.num_empty = [0] * len(self._sources)
        num_bytes = 0
        for number, source in enumerate(self._sources):
            for document in source.documents():
                if not document.text.strip():
                    self.num_empty[number] += 1
                    continue
                yield document
                self.num_documents[number] += 1
                num_bytes += document.num_bytes
                if self._options.max_bytes is not None and num_bytes >= self._options.max_bytes:
                    return
        if not num_bytes:
            names = ", ".join(self._options.sources)
            raise DataError(f"the corpus is empty: no document with any text in {names}")

    def training_texts(self, max_bytes: int) -> Iterator[Document]:
        """Yields documents of the training split until they have `max_bytes` characters, to train a tokenizer on."""
        size = 0
        for index, document in enumerate(self.documents()):
            if self.is_validation(index):
                continue
            yield document
            size += len(document.text)
            if size >= max_bytes:
                return

    def entries(self) -> list[dict[str, Any]]:
        """Returns the manifest's entries of the sources after a pass."""
        entries = []
        for source, documents, empty in zip(self._sources, self.num_documents, self.num_empty, strict=True):
            entry: dict[str, Any] = {"name": printable(source.name), "kind": source.kind}
            entry |= {"documents": documents, "empty_documents": empty}
            files = source.files()
            entries.append(entry if files is None else entry | {"files": files})
        return entries

    def progress_bar(self, title: str) -> tqdm:
        """Returns a progress bar over bytes of text up to the cap, else over the bytes of the sources' files."""
        total, totals = self._options.max_bytes, [source.total_bytes for source in self._sources]
        if total is None and None not in totals:
            total = sum(filter(None, totals))
        # In a log file a line every 15 seconds is enough.
        interval, is_off = 0.2 if sys.stderr.isatty() else 15.0, not self._options.progress
        return tqdm(
            total=total, desc=title, unit="B", unit_scale=True, disable=is_off, mininterval=interval, dynamic_ncols=True
        )

    def progress_of(self, text_bytes: int, consumed: int) -> int:
        """Returns how far a text, or the bytes of files that it stands for, moves the progress bar on."""
        return consumed if self._options.max_bytes is None else text_bytes


def prepare(options: PrepareOptions) -> Manifest:
    """Makes the data set.

    Returns:
        The manifest of the finished folder.

    Raises:
        DataError: A source, the tokenizer or the output cannot be used; nothing is left behind.
    """
    if not 0.0 < options.validation_fraction < 1.0:
        raise DataError(f"--validation-fraction {options.validation_fraction} is not between 0 and 1")
    check_free(options.output, options.overwrite)
    sources = open_sources(options.sources, options.field, options.hf_split, options.hf_config)
    corpus = Corpus(sources, options)
    try:
        with output_folder(options.output, options.overwrite) as folder:
            tokenizer = _tokenizer(corpus, options)
            save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
            checksum = tokenizer_sha256(tokenizer.tokenizer)
            _check_saved(folder / TOKENIZER_FOLDER, checksum)
            content = _write_splits(folder, corpus, tokenizer, checksum, options)
            content["sources"] = corpus.entries()
            content["files"] |= {name: FileSum.of(folder / name).model_dump() for name in tokenizer_names(folder)}
            (folder / MANIFEST_NAME).write_text(manifest_text(content), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{error.filename or options.output} cannot be written: {error.strerror}") from error
    return read_manifest(options.output)


@contextlib.contextmanager
def output_folder(final: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty temporary folder, which becomes `final` at the end and is removed after an error.

    Raises:
        DataError: `final` exists and may not be replaced, or another run is building it.
    """
    final = final.absolute()
    check_free(final, overwrite)
    with new_folder(final, busy=DataError(f"another run is building {final.name} right now")) as partial:
        check_free(final, overwrite)  # another run may have made it meanwhile
        yield partial


def check_free(final: Path, overwrite: bool) -> None:
    """Raises DataError if the folder cannot be made; a cheap check before any work."""
    if not final.exists():
        return
    if not final.is_dir():
        raise DataError(f"{final} exists and is not a folder; choose another --output")
    if (final / MANIFEST_NAME).is_file():
        if not overwrite:
            raise DataError(f"{final} holds a finished data set; give --overwrite to replace it")
    elif any(final.iterdir()):
        raise DataError(f"{final} exists and was not made by this tool (no {MANIFEST_NAME}); choose another --output")


def _tokenizer(corpus: Corpus, options: PrepareOptions) -> LoadedTokenizer:
    if options.train_bpe is None:
        return load_tokenizer(options.tokenizer, options.end_of_document)

    def texts() -> Iterator[str]:
        for document in corpus.training_texts(options.train_bpe_bytes):
            bar.update(corpus.progress_of(len(document.text), document.consumed))
            yield document.text

    with corpus.progress_bar("reading for the BPE") as bar:
        return train_bpe(texts(), options.train_bpe)


def _check_saved(folder: Path, checksum: str) -> None:
    """Raises DataError unless the tokenizer beside the data is the one that makes the tokens."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file() or tokenizer_sha256(Tokenizer.from_file(str(path))) != checksum:
        raise DataError("this tokenizer does not survive being saved as tokenizer.json; convert it first")


def _write_splits(
    folder: Path, corpus: Corpus, tokenizer: LoadedTokenizer, checksum: str, options: PrepareOptions
) -> dict[str, Any]:
    """Tokenizes the corpus into the folder and returns the manifest's content (without the sources)."""
    with warnings.catch_warnings():  # Megatron's import warns of what matters for training only
        warnings.simplefilter("ignore")
        from mlra_scale.data.writer import SplitWriter, token_dtype

    end, dtype = tokenizer.end_of_document_token, token_dtype(tokenizer.vocabulary_size)
    writers: dict[str, SplitWriter] = {split: SplitWriter(folder / split, dtype) for split in SPLITS}
    documents = corpus.documents()
    first_documents = list(islice(documents, _ROUND_TRIP_DOCUMENTS))
    is_exact = all(_survives_round_trip(tokenizer.tokenizer, document.text) for document in first_documents)
    text_bytes, without_tokens, num_tokens = 0, 0, 0
    try:
        with corpus.progress_bar("tokenizing") as bar:
            everything = chain(first_documents, documents)
            for chunk in encode_in_order(everything, tokenizer.tokenizer.to_str(), end, dtype.name, options.workers):
                text_bytes += chunk.text_bytes
                without_tokens += int(np.count_nonzero(chunk.lengths == 1))
                num_tokens += len(chunk.tokens)
                _write_chunk(chunk, corpus, writers)
                rate = num_tokens / max(1e-9, bar.format_dict["elapsed"])
                bar.set_postfix_str(f"{num_tokens / 1e6:.1f} M tokens, {rate / 1e3:.0f} k tokens/s", refresh=False)
                bar.update(corpus.progress_of(chunk.text_bytes, chunk.consumed))
        _check_splits(writers, options)
        sums = {name: entry for writer in writers.values() for name, entry in writer.finish().items()}
    finally:
        for writer in writers.values():
            writer.close()
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": content_fingerprint(sums, checksum, end),
        "documents": sum(writer.documents for writer in writers.values()),
        "tokens": sum(writer.tokens for writer in writers.values()),
        "text_bytes": text_bytes,
        "empty_documents_left_out": sum(corpus.num_empty),
        "documents_without_tokens": without_tokens,
        "dtype": dtype.name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "name": tokenizer.name,
            "folder": TOKENIZER_FOLDER,
            "sha256": checksum,
            "vocabulary_size": tokenizer.vocabulary_size,
            "end_of_document_token": end,
            "end_of_document_text": tokenizer.end_of_document,
            "round_trip_is_exact": is_exact,
        },
        "splits": {name: {"documents": w.documents, "tokens": w.tokens} for name, w in writers.items()},
        "split_rule": {
            "rule": "validation if blake2b('SEED INDEX', 8 bytes) < validation_fraction * 2^64",
            "seed": options.seed,
            "validation_fraction": options.validation_fraction,
        },
        "max_bytes": options.max_bytes,
        "files": {name: entry.model_dump() for name, entry in sums.items()},
        "made_with": _versions(),
    }


def _survives_round_trip(tokenizer: Tokenizer, text: str) -> bool:
    """Returns whether decoding the tokens of a text, or of its beginning, gives back the text."""
    text = text[:_ROUND_TRIP_CHARACTERS]
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return bool(tokenizer.decode(ids, skip_special_tokens=False) == text)
    except Exception:  # the Rust library raises plain Exception; the encoder refuses such a text
        return False


def _write_chunk(chunk: EncodedChunk, corpus: Corpus, writers: dict[str, SplitWriter]) -> None:
    train, validation = (writers[split] for split in SPLITS)
    first = train.documents + validation.documents
    for offset, document in enumerate(np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1])):
        (validation if corpus.is_validation(first + offset) else train).add(document)


def _check_splits(writers: dict[str, SplitWriter], options: PrepareOptions) -> None:
    for split, writer in writers.items():
        if not writer.documents:
            num_documents = sum(writer.documents for writer in writers.values())
            raise DataError(
                f"none of the {num_documents} documents falls into the {split} split "
                f"(--validation-fraction {options.validation_fraction}, --seed {options.seed}); "
                "change one of the two, or give more documents (a .txt file is one document)"
            )


def _versions() -> dict[str, str]:
    names = ("tokenizers", "transformers", "datasets", "pyarrow", "megatron-core", "numpy")
    versions = {"mlra-scale": __version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in names}
