"""Turns documents into tokens in several processes, in order and with bounded memory.

Chunks of documents are dealt to the workers in turns, and results are taken in the order of the chunks, so the result
does not depend on the number of workers. Each worker has a pipe of its own: when it dies, even in the middle of a
message, its pipe ends and the main process notices. (The pools of the standard library share one pipe for all results;
a worker killed while it writes there can leave the reader waiting for ever.)
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data import DataError
from mlra_scale.data.readers import Document

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
        """Tokenizes one chunk.

        Raises:
            DataError: The tokenizer cannot encode a document, or the end-of-document token is a part of one, which it
                would end early.
        """
        texts = [document.text for document in documents]
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the Rust library raises plain Exception
            raise DataError(f"the tokenizer cannot encode every text: {error}; choose one that can") from error
        parts = [np.array([*encoding.ids, self._end], dtype=self._dtype) for encoding in encodings]
        tokens = np.concatenate(parts)
        if np.count_nonzero(tokens == self._end) != len(parts):
            number = next(i for i, part in enumerate(parts) if np.count_nonzero(part == self._end) > 1)
            raise DataError(
                f"token {self._end} ({self._tokenizer.id_to_token(self._end)!r}) is to end documents, but it is also "
                f"a part of the text of the document that begins with {texts[number][:60]!r}; choose a token that no "
                "text gives with --end-of-document, such as a special token of the tokenizer"
            )
        return EncodedChunk(
            tokens=tokens,
            lengths=np.array([len(part) for part in parts], dtype=np.int64),
            text_bytes=sum(document.num_bytes for document in documents),
            consumed=sum(document.consumed for document in documents),
        )


def encode_in_order(
    documents: Iterable[Document], tokenizer_json: str, end_of_document: int, dtype: str, workers: int
) -> Iterator[EncodedChunk]:
    """Yields the chunks of a stream of documents, none of them empty, in their order.

    Tokenizer, end and dtype are those of `Encoder`. At most four chunks per worker are on their way. With one worker
    the calling process does the work.

    Raises:
        DataError: A worker process died, or a document holds the end-of-document token.
    """
    make_encoder = partial(Encoder, tokenizer_json, end_of_document, dtype)
    if workers == 1:
        yield from map(make_encoder(), _chunks(documents))
        return
    crew: list[_Worker] = []
    try:
        crew += (_Worker(make_encoder) for _ in range(workers))
        waiting: deque[_Worker] = deque()
        for number, chunk in enumerate(_chunks(documents)):
            worker = crew[number % workers]
            worker.send(chunk)
            waiting.append(worker)
            if len(waiting) >= _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().receive()
        while waiting:
            yield waiting.popleft().receive()
    finally:
        for worker in crew:
            worker.kill()


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


class _Worker:
    """A worker process, seen from the main process."""

    def __init__(self, make_encoder: Callable[[], Encoder]) -> None:
        # spawn: the calling process has threads (tokenizers, torch), which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, make_encoder), daemon=True)
        self._process.start()
        # The worker holds the only other end: when it is gone, reading and writing here fail instead of waiting.
        theirs.close()

    def send(self, chunk: list[Document]) -> None:
        try:
            self._connection.send(chunk)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> EncodedChunk:
        try:
            result: EncodedChunk | Exception = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(result, Exception):
            raise result
        return result

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _death(self) -> DataError:
        self._process.join(timeout=5)
        how = f"exit code {self._process.exitcode}"
        return DataError(f"a worker process died ({how}; out of memory? try fewer --workers); nothing was written")


def _work(connection: Connection, make_encoder: Callable[[], Encoder]) -> None:
    """The loop of a worker process: chunks in, results out, in order.

    Reading and writing have threads of their own. Otherwise main process and worker could both wait until the other
    reads, and a worker would be idle until the main process has time for its result.
    """
    # The workers are the parallelism; and Ctrl-C is the main process's to handle.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    chunks: queue.SimpleQueue[list[Document]] = queue.SimpleQueue()
    results: queue.SimpleQueue[EncodedChunk | Exception] = queue.SimpleQueue()
    for take, give in ((connection.recv, chunks.put), (results.get, connection.send)):
        threading.Thread(target=_transfer, args=(take, give), daemon=True).start()
    encoder = make_encoder()
    while True:
        try:
            results.put(encoder(chunks.get()))
        except Exception as error:
            results.put(error)


def _transfer(take: Callable[[], Any], give: Callable[[Any], None]) -> None:
    try:
        while True:
            give(take())
    finally:
        # The main process is gone, or a chunk cannot be read: it will notice that this process ends.
        os._exit(1)
