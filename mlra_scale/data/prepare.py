"""Text to a prepared data set: a folder with Megatron indexed data sets, the tokenizer and a manifest.

The folder's bytes are a function of the documents, the tokenizer and the options alone: not of the number of workers,
of time or of place.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mlra_scale import __version__
from mlra_scale.data.counts import count_lines, source_entry
from mlra_scale.data.encode import encode_in_order
from mlra_scale.data.errors import DataError
from mlra_scale.data.folder import tokenizer_files
from mlra_scale.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    Manifest,
    content_fingerprint,
    manifest_text,
    read_manifest,
)
from mlra_scale.data.output import atomic_folder, check_free
from mlra_scale.data.readers import Document
from mlra_scale.data.sources import Source, open_sources
from mlra_scale.data.tokenizer import LoadedTokenizer, load_tokenizer, save_tokenizer, tokenizer_sha256, train_bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mlra_scale.data.writer import SplitWriter

_ROUND_TRIP_DOCUMENTS = 64


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare.

    Attributes:
        output: Folder to make.
        sources: See mlra_scale.data.sources.open_sources.
        tokenizer: See mlra_scale.data.tokenizer.load_tokenizer; empty: train a BPE.
        train_bpe: Vocabulary size of the BPE to train; None: load `tokenizer`.
        train_bpe_bytes: The BPE is trained on this many bytes of training text from the beginning of the corpus.
        end_of_document: Text of the end-of-document token; None: the tokenizer's own.
        field: Field or column of the text.
        hf_split: Split of Hugging Face data sets.
        hf_config: Configuration of Hugging Face data sets.
        max_bytes: Stop after the document with which this many bytes of text are reached; None: read all.
        validation_fraction: Expected share of documents in the validation split.
        seed: Seed of the split.
        workers: Number of tokenizing processes.
        overwrite: Replace a finished data set at `output`.
        progress: Show progress bars.
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
    """The non-empty documents of all sources, with the split of each.

    Args:
        sources: The sources, in order.
        options: Cap, split and seed.
    """

    def __init__(self, sources: Sequence[Source], options: PrepareOptions) -> None:
        self._sources = sources
        self._options = options
        self.documents_of_source = [0] * len(sources)
        self.empty_documents_of_source = [0] * len(sources)

    def is_validation(self, index: int) -> bool:
        """Tells the split of a document: a hash of (seed, index) against the fraction."""
        digest = hashlib.blake2b(f"{self._options.seed} {index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._options.validation_fraction * 2.0**64

    def documents(self) -> Iterator[Document]:
        """Yields the documents; the position in this sequence is the document's index. Counts anew every time."""
        self.documents_of_source = [0] * len(self._sources)
        self.empty_documents_of_source = [0] * len(self._sources)
        num_bytes = 0
        for number, source in enumerate(self._sources):
            for document in source.documents():
                if not document.text.strip():
                    self.empty_documents_of_source[number] += 1
                    continue
                yield document
                self.documents_of_source[number] += 1
                num_bytes += len(document.text) if document.text.isascii() else len(document.text.encode())
                if self._options.max_bytes is not None and num_bytes >= self._options.max_bytes:
                    return

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
        counts = zip(self._sources, self.documents_of_source, self.empty_documents_of_source, strict=True)
        return [source_entry(s.name, s.kind, documents, empty, s.files()) for s, documents, empty in counts]

    def progress_total(self) -> int | None:
        """Returns what a progress bar counts to: the cap in bytes of text, else the bytes of the sources' files.

        None if neither is known.
        """
        if self._options.max_bytes is not None:
            return self._options.max_bytes
        totals = [source.total_bytes for source in self._sources]
        return None if None in totals else sum(total for total in totals if total is not None)


def prepare(options: PrepareOptions) -> Manifest:
    """Makes the data set.

    Args:
        options: What to prepare.

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
        with atomic_folder(options.output, options.overwrite) as folder:
            tokenizer = _tokenizer(corpus, options)
            save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
            checksum = tokenizer_sha256(tokenizer.tokenizer)
            _check_saved(folder / TOKENIZER_FOLDER, checksum)
            content = _write_splits(folder, corpus, tokenizer, checksum, options)
            content["sources"] = corpus.entries()
            content["files"] |= tokenizer_files(folder)
            (folder / MANIFEST_NAME).write_text(manifest_text(content), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{error.filename or options.output} cannot be written: {error.strerror}") from error
    return read_manifest(options.output)


def _tokenizer(corpus: Corpus, options: PrepareOptions) -> LoadedTokenizer:
    if options.train_bpe is None:
        return load_tokenizer(options.tokenizer, options.end_of_document)
    with _Progress("reading for the BPE", corpus.progress_total(), options.progress) as bar:
        is_capped = options.max_bytes is not None
        texts = (
            bar.passed(document.text, len(document.text) if is_capped else document.consumed)
            for document in corpus.training_texts(options.train_bpe_bytes)
        )
        trained = train_bpe(texts, options.train_bpe)
    if corpus.documents_of_source == [0] * len(corpus.documents_of_source):
        raise _nothing(options)
    return trained


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
    with warnings.catch_warnings():  # Megatron's import tells what only matters for training
        warnings.simplefilter("ignore")
        from mlra_scale.data.writer import SplitWriter, token_dtype

    end, dtype = tokenizer.end_of_document_token, token_dtype(tokenizer.vocabulary_size)
    writers = {split: SplitWriter(folder / split, dtype) for split in SPLITS}
    round_trip = RoundTrip(tokenizer.tokenizer)
    documents = round_trip.watched(corpus.documents())
    text_bytes, without_tokens = 0, 0
    try:
        with _Progress("tokenizing", corpus.progress_total(), options.progress) as bar:
            chunks = encode_in_order(documents, tokenizer.tokenizer.to_str(), end, dtype.name, options.workers)
            for chunk in chunks:
                text_bytes += chunk.text_bytes
                without_tokens += int(np.count_nonzero(chunk.lengths == 1))
                _write_chunk(chunk.tokens, chunk.lengths, corpus, writers)
                is_capped = options.max_bytes is not None
                bar.advance(chunk.text_bytes if is_capped else chunk.consumed, len(chunk.tokens))
        _check_splits(writers, options)
        files = {name: entry for writer in writers.values() for name, entry in writer.finish().items()}
    finally:
        for writer in writers.values():
            writer.close()
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": content_fingerprint(files, checksum, end),
        "documents": sum(writer.documents for writer in writers.values()),
        "tokens": sum(writer.tokens for writer in writers.values()),
        "text_bytes": text_bytes,
        "empty_documents_left_out": sum(corpus.empty_documents_of_source),
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
            "round_trip_is_exact": round_trip.is_exact,
        },
        "splits": {name: {"documents": w.documents, "tokens": w.tokens} for name, w in writers.items()},
        "split_rule": {
            "rule": "validation if blake2b('SEED INDEX', 8 bytes) < validation_fraction * 2^64",
            "seed": options.seed,
            "validation_fraction": options.validation_fraction,
        },
        "max_bytes": options.max_bytes,
        "files": files,
        "made_with": _versions(),
    }


def _write_chunk(tokens: np.ndarray, lengths: np.ndarray, corpus: Corpus, writers: dict[str, SplitWriter]) -> None:
    train, validation = (writers[split] for split in SPLITS)
    first = train.documents + validation.documents
    for offset, document in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        (validation if corpus.is_validation(first + offset) else train).add(document)


def _check_splits(writers: dict[str, SplitWriter], options: PrepareOptions) -> None:
    train, validation = (writers[split].documents for split in SPLITS)
    if not train + validation:
        raise _nothing(options)
    for split, documents in (("train", train), ("validation", validation)):
        if not documents:
            raise DataError(
                f"none of the {train + validation} documents falls into the {split} split "
                f"(--validation-fraction {options.validation_fraction}, --seed {options.seed}); "
                "change one of the two, or give more documents (a .txt file is one document)"
            )


def _nothing(options: PrepareOptions) -> DataError:
    return DataError(f"the corpus is empty: no document with any text in {', '.join(options.sources)}")


class RoundTrip:
    """Checks on the first documents of a stream that decoding their tokens gives back the text.

    Args:
        tokenizer: The tokenizer, with encode_special_tokens set.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_exact = True

    def watched(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Passes the documents through."""
        for index, document in enumerate(documents):
            if index < _ROUND_TRIP_DOCUMENTS and self.is_exact:
                text = document.text[:10_000]
                try:
                    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
                    self.is_exact = self._tokenizer.decode(ids, skip_special_tokens=False) == text
                except Exception:  # the Rust library raises plain Exception; the encoder refuses such a text
                    self.is_exact = False
            yield document


class _Progress:
    """A progress bar over source bytes with MB/s, time left (where the total is known) and tokens/s."""

    def __init__(self, title: str, total: int | None, is_shown: bool) -> None:
        # In a log file a line every 15 seconds is enough.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=total,
            desc=title,
            unit="B",
            unit_scale=True,
            disable=not is_shown,
            mininterval=interval,
            dynamic_ncols=True,
        )
        self._started = time.monotonic()
        self._tokens = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def passed(self, text: str, size: int) -> str:
        """Counts a document and returns its text."""
        self._bar.update(size)
        return text

    def advance(self, consumed: int, tokens: int) -> None:
        """Counts a chunk of tokens."""
        self._tokens += tokens
        rate = self._tokens / max(1e-9, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{self._tokens / 1e6:.1f} M tokens, {rate / 1e3:.0f} k tokens/s", refresh=False)
        self._bar.update(consumed)


def _versions() -> dict[str, str]:
    names = ("tokenizers", "transformers", "datasets", "pyarrow", "megatron-core", "numpy")
    versions = {"mlra-scale": __version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in names}


def summary(manifest: Manifest) -> list[str]:
    """Returns the lines that tell a user what was made."""
    content: dict[str, Any] = manifest.content
    tokenizer = content["tokenizer"]
    lines = [f"{manifest.folder}: {content['documents']:,} documents, {content['tokens']:,} tokens, {content['dtype']}"]
    for split in SPLITS:
        entry = content["splits"][split]
        lines.append(f"  {split:<11} {entry['documents']:>12,} documents {entry['tokens']:>16,} tokens")
    lines.append(
        f"  {'tokenizer':<11} {tokenizer['name']}: {tokenizer['vocabulary_size']} tokens, documents end with "
        f"{tokenizer['end_of_document_text']} = {tokenizer['end_of_document_token']}, "
        f"{content['text_bytes'] / content['tokens']:.2f} bytes per token"
    )
    lines += count_lines(content)
    if not tokenizer["round_trip_is_exact"]:
        lines.append("  note        this tokenizer changes text: decoding does not give it back exactly")
    lines.append(f"  fingerprint {manifest.fingerprint}")
    return lines
