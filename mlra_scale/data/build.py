"""Tokenizes a corpus into the folder of one data set."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlra_scale import __version__
from mlra_scale.data import DataError
from mlra_scale.data.corpus import Corpus, Position
from mlra_scale.data.encode import EncodedChunk, Placed, encode_in_order, is_empty
from mlra_scale.data.folder import tokenizer_names
from mlra_scale.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    FileSum,
    content_fingerprint,
    manifest_text,
)
from mlra_scale.data.options import PrepareOptions
from mlra_scale.data.tally import Place
from mlra_scale.data.tokenizer import LoadedTokenizer, save_tokenizer, tokenizer_sha256
from mlra_scale.data.unfinished import Progress, read_progress
from mlra_scale.data.writer import SplitWriter, token_dtype
from mlra_scale.files import sync_tree, write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROUND_TRIP_DOCUMENTS = 64
_ROUND_TRIP_CHARACTERS = 10_000
SECONDS_BETWEEN_COMMITS = 60.0
"""How much work a kill loses at most; a preparation that takes less keeps nothing."""
_logger = logging.getLogger(__name__)


def build_data_set(
    folder: Path, corpus: Corpus, tokenizer: LoadedTokenizer, options: PrepareOptions, identity: str
) -> None:
    """Makes the data set in a folder, or what an interrupted preparation left to do there.

    Args:
        folder: Where.
        corpus: The documents.
        tokenizer: Makes the tokens.
        options: Of the preparation.
        identity: Of the preparation (`identity_of`).

    Raises:
        DataError: A source or the tokenizer cannot be used.
    """
    progress = read_progress(folder)
    if progress is not None and (folder / MANIFEST_NAME).is_file():
        return
    folder.mkdir(exist_ok=True)
    if progress is None:  # a manifest beside new progress would say that the data set is whole
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    checksum = tokenizer_sha256(tokenizer.tokenizer)
    if progress is None or not _is_saved(folder / TOKENIZER_FOLDER, checksum):
        shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
        save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER)
    if not _is_saved(folder / TOKENIZER_FOLDER, checksum):
        raise DataError("this tokenizer does not survive being saved as tokenizer.json; convert it first")
    content = _Building(folder, corpus, tokenizer, options, identity, checksum, progress).run()
    content["sources"] = corpus.entries()
    content["files"] |= {name: FileSum.of(folder / name).model_dump() for name in tokenizer_names(folder)}
    sync_tree(folder)  # what the manifest says is there, also after a power failure
    write_atomically(folder / MANIFEST_NAME, manifest_text(content))


class _Building:
    """One data set while it is made."""

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        tokenizer: LoadedTokenizer,
        options: PrepareOptions,
        identity: str,
        checksum: str,
        progress: Progress | None,
    ) -> None:
        self._folder, self._corpus, self._tokenizer, self._options = folder, corpus, tokenizer, options
        self._identity, self._checksum = identity, checksum
        self._dtype = token_dtype(tokenizer.vocabulary_size)
        try:
            self._writers = self._open_writers(progress)
        except ValueError as error:
            _logger.warning("%s; starting over", error)
            progress = None
            self._writers = self._open_writers(progress)
        self._position = None if progress is None else progress.position
        self._without_tokens = 0 if progress is None else progress.without_tokens
        self._is_exact = progress is None or progress.is_exact
        self._has_committed = progress is not None
        if progress is not None:
            corpus.tallies = progress.tallies
            _logger.info("continuing after %s documents of an interrupted preparation", f"{self._documents:,}")

    def _open_writers(self, progress: Progress | None) -> dict[str, SplitWriter]:
        written = dict.fromkeys(SPLITS) if progress is None else progress.splits
        return {split: SplitWriter(self._folder / split, self._dtype, written[split]) for split in SPLITS}

    @property
    def _documents(self) -> int:
        return sum(writer.documents for writer in self._writers.values())

    def run(self) -> dict[str, Any]:
        """Tokenizes what is left of the corpus; returns the manifest's content without the sources."""
        loaded, corpus = self._tokenizer, self._corpus
        end = loaded.end_of_document_token
        try:
            portions = corpus.portions(self._position)
            ahead, texts = _first_documents(portions)
            if self._position is None:
                self._is_exact = all(_survives_round_trip(loaded.tokenizer, text) for text in texts)
            everything, json = chain(ahead, portions), loaded.tokenizer.to_str()
            with corpus.progress_bar("tokenizing", self._position) as bar:
                committed, num_tokens = time.monotonic(), 0
                for chunk in encode_in_order(everything, json, end, self._dtype.name, self._options.workers):
                    self._add(chunk)
                    num_tokens += len(chunk.tokens)
                    rate = num_tokens / max(1e-9, bar.format_dict["elapsed"])
                    bar.set_postfix_str(f"{num_tokens / 1e6:.1f} M tokens, {rate / 1e3:.0f} k tokens/s", refresh=False)
                    bar.update(corpus.progress_of(chunk.text_bytes, chunk.counts))
                    if time.monotonic() - committed >= SECONDS_BETWEEN_COMMITS:
                        self._commit()
                        committed = time.monotonic()
            self._check_splits()
            if self._options.is_mixture:  # kept, should the preparation of another data set be interrupted
                self._commit()
            sums = {name: entry for writer in self._writers.values() for name, entry in writer.finish().items()}
        finally:
            for writer in self._writers.values():
                writer.close()
        return self._content(sums, end)

    def _add(self, chunk: EncodedChunk) -> None:
        train, validation = (self._writers[split] for split in SPLITS)
        first, lengths = self._documents, chunk.lengths
        is_validation = np.fromiter(map(self._corpus.is_validation, range(first, first + len(lengths))), np.bool_)
        # Runs of documents of one split: their borders among the documents, and among the tokens.
        borders = np.flatnonzero(np.diff(is_validation)) + 1
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        runs = [0, *borders.tolist(), len(lengths)]
        for begin, stop in pairwise(runs):
            if begin < stop:
                writer = validation if is_validation[begin] else train
                writer.add(chunk.tokens[offsets[begin] : offsets[stop]], lengths[begin:stop])
        self._corpus.count(chunk.counts)
        self._without_tokens += int(np.count_nonzero(lengths == 1))
        last, before = chunk.counts[-1], self._position or Position(0, Place(0, 0), 0, 0)
        consumed = before.consumed + sum(count.consumed for count in chunk.counts)
        self._position = Position(last.source, last.place, before.text_bytes + chunk.text_bytes, consumed)

    def _commit(self) -> None:
        assert self._position is not None
        if not self._has_committed:
            sync_tree(self._folder / TOKENIZER_FOLDER)
        Progress(
            identity=self._identity,
            tokenizer=self._checksum,
            end_of_document_token=self._tokenizer.end_of_document_token,
            position=self._position,
            without_tokens=self._without_tokens,
            is_exact=self._is_exact,
            tallies=self._corpus.tallies,
            splits={split: self._writers[split].commit() for split in SPLITS},
        ).write(self._folder)
        self._has_committed = True

    def _check_splits(self) -> None:
        if not self._documents:
            raise self._corpus.without_documents()
        for split, writer in self._writers.items():
            if not writer.documents:
                raise DataError(
                    f"none of the {self._documents} documents falls into the {split} split "
                    f"(--validation-fraction {self._options.validation_fraction}, --seed {self._options.seed}); "
                    "change one of the two, or give more documents (a .txt file is one document)"
                )

    def _content(self, sums: dict[str, FileSum], end: int) -> dict[str, Any]:
        loaded, options = self._tokenizer, self._options
        assert self._position is not None
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": content_fingerprint(sums, self._checksum, end),
            "documents": self._documents,
            "tokens": sum(writer.tokens for writer in self._writers.values()),
            "text_bytes": self._position.text_bytes,
            "empty_documents_left_out": sum(tally.empty for tally in self._corpus.tallies),
            "documents_without_tokens": self._without_tokens,
            "dtype": self._dtype.name,
            "tokenizer": {
                "kind": loaded.kind,
                "name": loaded.name,
                "folder": TOKENIZER_FOLDER,
                "sha256": self._checksum,
                "vocabulary_size": loaded.vocabulary_size,
                "end_of_document_token": end,
                "end_of_document_text": loaded.end_of_document,
                "round_trip_is_exact": self._is_exact,
            },
            "splits": {name: {"documents": w.documents, "tokens": w.tokens} for name, w in self._writers.items()},
            "split_rule": {
                "rule": "validation if blake2b('SEED INDEX', 8 bytes) < validation_fraction * 2^64",
                "seed": options.seed,
                "validation_fraction": options.validation_fraction,
            },
            "max_bytes": options.max_bytes,
            "files": {name: entry.model_dump() for name, entry in sums.items()},
            "made_with": versions(),
        }


def _first_documents(portions: Iterable[Placed]) -> tuple[list[Placed], list[str]]:
    """Takes the first portions, with the texts of up to 64 documents in them."""
    ahead: list[Placed] = []
    texts: list[str] = []
    for placed in portions:
        ahead.append(placed)
        texts += (text for text in placed.portion.texts() if not is_empty(text))
        if len(texts) >= _ROUND_TRIP_DOCUMENTS or len(ahead) >= _ROUND_TRIP_DOCUMENTS:
            break
    return ahead, texts[:_ROUND_TRIP_DOCUMENTS]


def _survives_round_trip(tokenizer: Tokenizer, text: str) -> bool:
    """Returns whether decoding the tokens of a text, or of its beginning, gives back the text."""
    text = text[:_ROUND_TRIP_CHARACTERS]
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return bool(tokenizer.decode(ids, skip_special_tokens=False) == text)
    except Exception:  # the Rust library raises plain Exception; the encoder refuses such a text
        return False


def _is_saved(folder: Path, checksum: str) -> bool:
    """Returns whether the tokenizer beside the data is the one that makes the tokens."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    return path.is_file() and tokenizer_sha256(Tokenizer.from_file(str(path))) == checksum


def versions() -> dict[str, str]:
    """Returns the versions of what may change the tokens."""
    names = ("tokenizers", "transformers", "datasets", "pyarrow", "numpy")
    found = {"mlra-scale": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in names}
