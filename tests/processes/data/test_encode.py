"""Encoding in processes: the same chunks in the same order for any number of workers, and nobody stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import numpy as np
import pytest

from mlra_scale.data import DataError
from mlra_scale.data.encode import encode_in_order
from mlra_scale.data.readers import Document
from mlra_scale.data.tokenizer import LoadedTokenizer, train_bpe

Children = Callable[[], list[BaseProcess]]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def children() -> Children:
    """Gives the child processes that are new since the test began: the suite keeps pools of workers."""
    before = {process.pid for process in multiprocessing.active_children()}
    return lambda: [process for process in multiprocessing.active_children() if process.pid not in before]


@pytest.fixture(scope="module")
def tokenizer() -> LoadedTokenizer:
    return train_bpe(["some words to train on, and some more words"] * 20, 280)


def documents(count: int, words: int = 1) -> Iterator[Document]:
    for index in range(count):
        yield Document(f"document {index} <|endoftext|> \u00e4 " + "word " * (index % 50 * words), 10)


def test_chunks_hold_the_documents_in_order(tokenizer: LoadedTokenizer) -> None:
    source = list(documents(1300))
    chunks = list(encode_in_order(iter(source), tokenizer.tokenizer.to_str(), 0, "uint16", workers=1))
    assert [len(chunk.lengths) for chunk in chunks] == [512, 512, 276]
    assert sum(chunk.text_bytes for chunk in chunks) == sum(len(d.text.encode()) for d in source)
    assert sum(chunk.consumed for chunk in chunks) == 13_000
    pieces = [p for c in chunks for p in np.split(c.tokens, np.cumsum(c.lengths)[:-1])]
    for piece, document in zip(pieces, source, strict=True):
        # One end-of-document token, at the end, whatever the text spells.
        assert piece.dtype == np.uint16 and (np.flatnonzero(piece == 0) == [len(piece) - 1]).all()
        assert tokenizer.tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) == document.text


def test_workers_do_not_change_the_result_and_do_not_run_ahead(tokenizer: LoadedTokenizer, children: Children) -> None:
    taken = 0

    def counted() -> Iterator[Document]:
        nonlocal taken
        for document in documents(20_000):
            taken += 1
            yield document

    ahead = []
    stream = encode_in_order(counted(), tokenizer.tokenizer.to_str(), 0, "uint16", workers=2)
    alone = encode_in_order(documents(20_000), tokenizer.tokenizer.to_str(), 0, "uint16", workers=1)
    done = 0
    for chunk, wanted in zip(stream, alone, strict=True):
        assert chunk.tokens.tobytes() == wanted.tokens.tobytes() and (chunk.lengths == wanted.lengths).all()
        ahead.append(taken - done)
        done += len(chunk.lengths)
    assert max(ahead) <= 512 * (4 * 2 + 1)
    assert not children()


@pytest.mark.parametrize("words", [1, 20], ids=["small results", "results larger than a pipe"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_is_an_error(
    tokenizer: LoadedTokenizer, children: Children, victim: int, words: int
) -> None:
    stream = encode_in_order(documents(10**9, words), tokenizer.tokenizer.to_str(), 0, "uint16", workers=2)
    next(stream)
    time.sleep(0.02)  # results that nobody reads: large ones are caught half written
    os.kill(children()[victim].pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="a worker process died"):
        for _ in stream:
            time.sleep(0.01)
    assert not children()


def test_an_error_in_a_worker_is_raised_here(tokenizer: LoadedTokenizer, children: Children) -> None:
    stream = encode_in_order(documents(10), tokenizer.tokenizer.to_str(), 10**6, "uint16", workers=2)
    with pytest.raises(OverflowError, match="1000000"):
        next(stream)
    assert not children()


def test_workers_that_cannot_start_are_an_error(children: Children) -> None:
    with pytest.raises(DataError, match=r"a worker process died \(exit code 1"):
        next(encode_in_order(documents(10), "no tokenizer", 0, "uint16", workers=2))
    assert not children()


def test_a_reader_that_stops_early_leaves_no_process(tokenizer: LoadedTokenizer, children: Children) -> None:
    stream = encode_in_order(documents(10**9), tokenizer.tokenizer.to_str(), 0, "uint16", workers=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not children()
