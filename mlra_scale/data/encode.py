"""Turns documents into tokens in several processes, in order and with bounded memory.

The main process reads documents and cuts them into chunks; a pool of workers tokenizes chunks; at most four chunks per
worker are on their way, and results are taken in the order of the chunks. So memory does not grow with the input, and
the result does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.errors import DataError
from mlra_scale.data.sources import Document

_CHUNK_DOCUMENTS = 512
_CHUNK_CHARACTERS = 1 << 20
_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True)
class EncodedChunk:
    """The tokens of consecutive documents.

    Attributes:
        tokens: Token ids of all documents joined, each ended by the end-of-document token.
        lengths: Tokens of every document, int64.
        text_bytes: UTF-8 bytes of the texts.
        consumed: Bytes of the source's files that the documents stand for.
    """

    tokens: NDArray
    lengths: NDArray[np.int64]
    text_bytes: int
    consumed: int


class Encoder:
    """Tokenizes texts.

    Args:
        tokenizer_json: Content of a tokenizer.json.
        end_of_document: Id of the token to append to every document.
        dtype: Type of the tokens, such as "uint16".
    """

    def __init__(self, tokenizer_json: str, end_of_document: int, dtype: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # Text that spells a special token is text; see load_tokenizer. (The file format does not carry this setting.)
        self._tokenizer.encode_special_tokens = True
        self._end = end_of_document
        self._dtype = np.dtype(dtype)

    def __call__(self, documents: list[Document]) -> EncodedChunk:
        """Tokenizes one chunk."""
        texts = [document.text for document in documents]
        parts = []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids
            ids.append(self._end)
            parts.append(np.array(ids, dtype=self._dtype))
        return EncodedChunk(
            tokens=np.concatenate(parts),
            lengths=np.array([len(part) for part in parts], dtype=np.int64),
            text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
            consumed=sum(document.consumed for document in documents),
        )


def encode_in_order(
    documents: Iterable[Document], tokenizer_json: str, end_of_document: int, dtype: str, workers: int
) -> Iterator[EncodedChunk]:
    """Tokenizes a stream of documents.

    Args:
        documents: The documents; none may be empty.
        tokenizer_json: Content of a tokenizer.json.
        end_of_document: Id of the token to append to every document.
        dtype: Type of the tokens.
        workers: Number of processes; 1: the calling process does the work.

    Yields:
        Chunks in the order of the documents. The chunks' borders depend on the documents only.

    Raises:
        DataError: A worker process died.
    """
    if workers == 1:
        encoder = Encoder(tokenizer_json, end_of_document, dtype)
        for chunk in _chunks(documents):
            yield encoder(chunk)
        return
    # spawn: the calling process has threads (tokenizers, torch), which do not survive a fork.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_json, end_of_document, dtype),
    )
    waiting: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in _chunks(documents):
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died (out of memory? try fewer --workers); nothing was written") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if len(chunk) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


# A pool's initializer can hand its result to the tasks in no other way than through a variable of the module.
_worker_encoder: Encoder | None = None


def _start_worker(tokenizer_json: str, end_of_document: int, dtype: str) -> None:
    global _worker_encoder
    # The workers are the parallelism; and Ctrl-C is the main process's to handle.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(tokenizer_json, end_of_document, dtype)


def _end_with_parent() -> None:
    """Ends this worker when the main process is gone: the pool's pipes would keep it waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(chunk: list[Document]) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder(chunk)
