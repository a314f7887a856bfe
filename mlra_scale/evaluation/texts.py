"""Streams of documents for the perplexity, from text files and from prepared data.

A long text file is read and tokenized in pieces, which gives the tokens of the whole text: a byte-level tokenizer
(GPT-2's kind) splits every text before white space that follows a word, so a cut there changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data import DataError
from mlra_scale.data.files import describe, kind_of
from mlra_scale.data.folder import check_contents, notices_of, open_prepared
from mlra_scale.data.indexed import IndexedFiles
from mlra_scale.data.manifest import SPLITS
from mlra_scale.data.readers import characters, texts_of_file
from mlra_scale.data.sources import LocalFiles, SourceName, open_sources, texts_of
from mlra_scale.data.tokenizer import LoadedTokenizer, tokenizer_sha256
from mlra_scale.evaluation.perplexity import Document, Piece

_PIECE_BYTES = 1 << 18
# The longest beginning of a text that ends with a word, followed by a blank or a line's end.
_BEFORE_SPACE = re.compile(r"(?s).*\S(?=[ \n])")


class PieceEncoder:
    """Tokenizes texts into pieces, with at most `max_tokens` tokens over all texts."""

    def __init__(self, loaded: LoadedTokenizer, max_tokens: int | None = None) -> None:
        self.end_of_document = loaded.end_of_document_token
        self._tokenizer = loaded.tokenizer
        self._left = max_tokens
        content = json.loads(loaded.tokenizer.to_str())
        splitter = content["pre_tokenizer"] or {}
        # Other tokenizers get whole texts: those that split nothing, put a space before each piece, or first look for
        # tokens of their own, which may contain white space.
        self.can_cut = (
            content["normalizer"] is None
            and splitter.get("type") == "ByteLevel"
            and splitter.get("use_regex", True)
            and not splitter["add_prefix_space"]
            and all(token["special"] for token in content["added_tokens"])
        )

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached."""
        return self._left == 0

    def piece(self, text: str) -> Piece:
        """Tokenizes a text that begins a document or was cut before white space."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = encoding.ids
        if self._left is not None and len(tokens) > self._left:
            tokens = tokens[: self._left]
            text = text[: encoding.offsets[self._left - 1][1]] if tokens else ""
        return self._counted(tokens, text)

    def piece_of_tokens(self, tokens: Sequence[int]) -> Piece:
        """Counts the words and bytes of a tokenized document."""
        tokens = tokens[: self._left]
        return self._counted(tokens, self._tokenizer.decode(tokens, skip_special_tokens=False))

    def _counted(self, tokens: Sequence[int], text: str) -> Piece:
        if self._left is not None:
            self._left -= len(tokens)
        return Piece(tokens, len(text.split()), len(text.encode("utf-8")))


def documents_of_sources(
    names: Sequence[str],
    encoder: PieceEncoder,
    field: str = "text",
    split: str = "test",
    config_name: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[Document]:
    """Yields the documents of text: every .txt file is one, and so is every line or row of other files.

    Each must be read before the next one is requested.

    Args:
        names: Sources as of mlra-scale prepare: files, folders, globs, python-docs, hf:NAME.
        encoder: Makes the pieces, up to its limit.
        field: Field or column of the text, for files that have fields.
        split: Split of Hugging Face data sets.
        config_name: Configuration of Hugging Face data sets.
        note: Called with a line about matching files that cannot be read.

    Raises:
        DataError: A source cannot be read.
    """
    for source in open_sources([SourceName(name, field, split, config_name) for name in names]):
        if not isinstance(source, LocalFiles):
            yield from _whole(texts_of(source), encoder)
            continue
        if source.not_read:
            note(f"{source.name}: {describe(source.not_read)}")
        for file in source.paths:
            if kind_of(file) != ".txt":
                yield from _whole(texts_of_file(file, field), encoder)
            elif not encoder.is_full:
                yield pieces(characters(file, _PIECE_BYTES), encoder)


def documents_of_data(
    folder: Path,
    split: str,
    encoder: PieceEncoder,
    loaded: LoadedTokenizer,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[Document]:
    """Yields the documents of a split of prepared data, without the token that ends each, up to the encoder's limit.

    `note` is called with a line about data of an earlier version.

    Raises:
        DataError: The folder is not whole, or was made with another tokenizer.
    """
    if split not in SPLITS:
        raise DataError(f"{folder} has no split {split!r}; it has {' and '.join(SPLITS)}")
    manifest, opened = open_prepared(folder)
    check_contents(manifest, opened)
    files = opened[split]
    if manifest.tokenizer.sha256 != tokenizer_sha256(loaded.tokenizer):
        raise DataError(f"{folder} was made with another tokenizer than the model's; evaluate the text itself (--text)")
    for line in notices_of(manifest):
        note(line)
    stored = files.tokens()
    for number in range(files.num_documents):
        if encoder.is_full:
            return
        tokens = document_tokens(files, stored, number)
        if tokens and tokens[-1] == manifest.tokenizer.end_of_document_token:
            tokens = tokens[:-1]
        yield [encoder.piece_of_tokens(tokens)]


def joined(documents: Iterable[Document], end_of_document: int) -> Iterator[Piece]:
    """Joins documents, each followed by the token that ends documents, as in training."""
    end = Piece([end_of_document], 0, 0)
    for document in documents:
        yield from document
        yield end


def document_tokens(files: IndexedFiles, stored: NDArray, number: int) -> list[int]:
    """Returns the ids of a document, with the token that ends it; `stored` is what `files.tokens()` returns."""
    first, stop = (int(border) for border in files.document_borders[number : number + 2])
    tokens: list[int] = []
    for sequence in range(first, stop):
        start = int(files.sequence_pointers[sequence]) // files.dtype.itemsize
        stop = start + int(files.sequence_lengths[sequence])
        if files.checked is not None:
            files.checked.check(np.array([start]) * files.dtype.itemsize, np.array([stop]) * files.dtype.itemsize)
        tokens += stored[start:stop].tolist()
    return tokens


def _whole(texts: Iterable[str], encoder: PieceEncoder) -> Iterator[Document]:
    for text in texts:
        if encoder.is_full:
            return
        yield pieces([text], encoder)


def pieces(texts: Iterable[str], encoder: PieceEncoder) -> Iterator[Piece]:
    """Encodes a document that arrives in parts cut anywhere."""
    held = ""
    for text in texts:
        held += text
        if encoder.can_cut and len(held) >= _PIECE_BYTES and (match := _BEFORE_SPACE.match(held)):
            yield encoder.piece(held[: match.end()])
            held = held[match.end() :]
            if encoder.is_full:
                return
    if held:
        yield encoder.piece(held)
