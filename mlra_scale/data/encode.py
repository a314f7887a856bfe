"""Turns portions of documents into tokens in several processes, in order and with bounded memory.

Chunks of portions are dealt to the workers in turns, and results are taken in the order of the chunks, so the result
does not depend on the number of workers. The workers parse the portions, too: the main process only reads bytes and
writes tokens. Each worker has a pipe of its own: when it dies, even in the middle of a message, its pipe ends and the
main process notices. (The pools of the standard library share one pipe for all results; a worker killed while it writes
there can leave the reader waiting for ever.)
"""

from __future__ import annotations

import array
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data import DataError
from mlra_scale.data.readers import Portion
from mlra_scale.data.tally import Place

_CHUNK_BYTES = 1 << 20
_CHUNK_PORTIONS = 512
_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class Placed:
    """A portion of the source with the number `source`, and its place there."""

    source: int
    place: Place
    portion: Portion


@dataclass(frozen=True, slots=True)
class Count:
    """What a portion held: documents with text, empty documents, and bytes of the source's files."""

    source: int
    place: Place
    documents: int
    empty: int
    consumed: int


@dataclass(frozen=True)
class EncodedChunk:
    """The tokens of the documents of consecutive portions, without the empty documents.

    Attributes:
        tokens: Token ids of all documents joined, each ended by the end-of-document token.
        lengths: Tokens of every document, int32.
        counts: One per portion.
        text_bytes: UTF-8 bytes of the texts.
    """

    tokens: NDArray
    lengths: NDArray[np.int32]
    counts: list[Count]
    text_bytes: int


class Encoder:
    """Parses portions and tokenizes their texts.

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

    def __call__(self, portions: Sequence[Placed]) -> EncodedChunk:
        """Tokenizes one chunk.

        Raises:
            DataError: A portion holds what is no text, the tokenizer cannot encode a document, or the end-of-document
                token is a part of one, which it would end early.
        """
        texts: list[str] = []
        counts = []
        for placed in portions:
            before, empty = len(texts), 0
            for text in placed.portion.texts():
                if is_empty(text):
                    empty += 1
                else:
                    texts.append(text)
            counts.append(Count(placed.source, placed.place, len(texts) - before, empty, placed.portion.consumed))
        tokens, lengths = self._encoded(texts)
        if np.count_nonzero(tokens == self._end) != len(texts):
            parts_of_tokens = np.split(tokens, np.cumsum(lengths)[:-1])
            number = next(i for i, part in enumerate(parts_of_tokens) if np.count_nonzero(part == self._end) > 1)
            raise DataError(
                f"token {self._end} ({self._tokenizer.id_to_token(self._end)!r}) is to end documents, but it is also "
                f"a part of the text of the document that begins with {texts[number][:60]!r}; choose a token that no "
                "text gives with --end-of-document, such as a special token of the tokenizer"
            )
        return EncodedChunk(tokens, lengths, counts, sum(map(bytes_of, texts)))

    def _encoded(self, texts: list[str]) -> tuple[NDArray, NDArray[np.int32]]:
        """Returns the tokens of all texts joined, each with its end, and how many there are of each."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the Rust library raises plain Exception
            raise DataError(f"the tokenizer cannot encode every text: {error}; choose one that can") from error
        # An array takes a list of integers several times as fast as numpy does.
        ids, lengths = array.array("i"), np.empty(len(texts), dtype=np.int32)
        for number, encoding in enumerate(encodings):
            before = len(ids)
            ids.fromlist(encoding.ids)
            ids.append(self._end)
            lengths[number] = len(ids) - before
        return np.array(ids, dtype=np.int32).astype(self._dtype), lengths


def is_empty(text: str) -> bool:
    """Whether a text is nothing but white space."""
    return not text or text.isspace()


def bytes_of(text: str) -> int:
    """Returns the bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def encode_in_order(
    portions: Iterable[Placed], tokenizer_json: str, end_of_document: int, dtype: str, workers: int
) -> Iterator[EncodedChunk]:
    """Yields the chunks of a stream of portions in their order.

    Tokenizer, end and dtype are those of `Encoder`. At most four chunks per worker are on their way. With one worker
    the calling process does the work.

    Raises:
        DataError: A worker process died, or of `Encoder`.
    """
    make_encoder = partial(Encoder, tokenizer_json, end_of_document, dtype)
    if workers == 1:
        yield from map(make_encoder(), _chunks(portions))
        return
    crew: list[_Worker] = []
    try:
        crew += (_Worker(make_encoder) for _ in range(workers))
        waiting: deque[_Worker] = deque()
        for number, chunk in enumerate(_chunks(portions)):
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


def _chunks(portions: Iterable[Placed]) -> Iterator[list[Placed]]:
    chunk: list[Placed] = []
    size = 0
    for placed in portions:
        chunk.append(placed)
        size += placed.portion.size
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_PORTIONS:
            yield chunk
            chunk, size = [], 0
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

    def send(self, chunk: list[Placed]) -> None:
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
        return DataError(f"a worker process died ({how}; out of memory? try fewer --workers)")


def _work(connection: Connection, make_encoder: Callable[[], Encoder]) -> None:
    """The loop of a worker process: chunks in, results out, in order.

    Reading and writing have threads of their own. Otherwise main process and worker could both wait until the other
    reads, and a worker would be idle until the main process has time for its result.
    """
    # The workers are the parallelism; and Ctrl-C is the main process's to handle.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    chunks: queue.SimpleQueue[list[Placed]] = queue.SimpleQueue()
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
