"""Encoding in processes: the same chunks in the same order for any number of workers, and nobody stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from mlra_scale.data import DataError, encode
from mlra_scale.data.encode import Count, Placed, encode_in_order
from mlra_scale.data.readers import Lines, Texts
from mlra_scale.data.tally import Place
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


def text(index: int, words: int = 1) -> str:
    return f"document {index} <|endoftext|> \u00e4 " + "word " * (index % 50 * words)


def portions(count: int, words: int = 1, documents: int = 100) -> Iterator[Placed]:
    """Parts of so many documents each."""
    for number in range(count):
        texts = [text(index, words) for index in range(number * documents, (number + 1) * documents)]
        yield Placed(0, Place(number, 0), Texts(texts, 10))


def test_chunks_hold_the_documents_in_order(tokenizer: LoadedTokenizer) -> None:
    source = [*portions(70, documents=2), Placed(1, Place(0, 0), Texts(["", " \n\u2003", "last"], 7))]
    source += [Placed(1, Place(number, 0), Texts((), 0)) for number in range(1, 600)]
    chunks = list(encode_in_order(iter(source), tokenizer.tokenizer.to_str(), 0, "uint16", workers=1))
    assert [len(chunk.counts) for chunk in chunks] == [512, 158]
    counts = [count for chunk in chunks for count in chunk.counts]
    assert counts[:70] == [Count(0, Place(number, 0), 2, 0, 10) for number in range(70)]
    assert counts[70:72] == [Count(1, Place(0, 0), 1, 2, 7), Count(1, Place(1, 0), 0, 0, 0)]
    texts = [*map(text, range(140)), "last"]
    assert sum(chunk.text_bytes for chunk in chunks) == sum(len(text.encode()) for text in texts)
    assert len(chunks[1].tokens) == len(chunks[1].lengths) == 0
    pieces = np.split(chunks[0].tokens, np.cumsum(chunks[0].lengths)[:-1])
    for piece, document in zip(pieces, texts, strict=True):
        # One end-of-document token, at the end, whatever the text spells.
        assert piece.dtype == np.uint16 and (np.flatnonzero(piece == 0) == [len(piece) - 1]).all()
        assert tokenizer.tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) == document


def test_workers_do_not_change_the_result_and_do_not_run_ahead(
    tokenizer: LoadedTokenizer, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_CHUNK_BYTES", 1 << 16)
    taken = 0

    def counted() -> Iterator[Placed]:
        nonlocal taken
        for placed in portions(200):
            taken += 1
            yield placed

    ahead = []
    stream = encode_in_order(counted(), tokenizer.tokenizer.to_str(), 0, "uint16", workers=2)
    alone = encode_in_order(portions(200), tokenizer.tokenizer.to_str(), 0, "uint16", workers=1)
    done = largest = 0
    for chunk, wanted in zip(stream, alone, strict=True):
        assert chunk.tokens.tobytes() == wanted.tokens.tobytes() and (chunk.lengths == wanted.lengths).all()
        assert chunk.counts == wanted.counts and chunk.text_bytes == wanted.text_bytes
        ahead.append(taken - done)
        done += len(chunk.counts)
        largest = max(largest, len(chunk.counts))
    assert done == 200 and max(ahead) <= largest * (4 * 2 + 1)
    assert not children()


@pytest.mark.parametrize("words", [1, 20], ids=["small results", "results larger than a pipe"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_is_an_error(
    tokenizer: LoadedTokenizer, children: Children, victim: int, words: int
) -> None:
    stream = encode_in_order(portions(10**9, words), tokenizer.tokenizer.to_str(), 0, "uint16", workers=2)
    next(stream)
    time.sleep(0.02)  # results that nobody reads: large ones are caught half written
    os.kill(children()[victim].pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="a worker process died"):
        for _ in stream:
            time.sleep(0.01)
    assert not children()


def test_an_error_in_a_worker_is_raised_here(tokenizer: LoadedTokenizer, children: Children) -> None:
    bad = Placed(0, Place(0, 0), Lines(Path("a.jsonl"), 7, b'{"text": "a"}\n{"text": "b"', "text", 10))
    stream = encode_in_order(iter([bad]), tokenizer.tokenizer.to_str(), 0, "uint16", workers=2)
    with pytest.raises(DataError, match=r"a\.jsonl, line 8: not JSON"):
        next(stream)
    assert not children()


def test_workers_that_cannot_start_are_an_error(children: Children) -> None:
    with pytest.raises(DataError, match=r"a worker process died \(exit code 1"):
        next(encode_in_order(portions(10), "no tokenizer", 0, "uint16", workers=2))
    assert not children()


def test_a_reader_that_stops_early_leaves_no_process(tokenizer: LoadedTokenizer, children: Children) -> None:
    stream = encode_in_order(portions(10**9), tokenizer.tokenizer.to_str(), 0, "uint16", workers=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not children()
