"""Perplexity with a sliding window: per token, per word, and bits per byte.

A document is cut into overlapping windows. Each token but the document's first is scored exactly once, by the first
window that holds it, with all tokens before it in that window as context. docs/evaluation.md has the formulas.

Shape suffixes: B batch, S sequence, K scored positions (the last ones of S), V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from mlra_scale.evaluation import EvaluationError

_IGNORED = -100


class LanguageModel(Protocol):
    """What perplexity needs of a model: number of tokens, longest input, and `logits` as of models.OpenedModel."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    def logits(self, tokens_BS: torch.Tensor, keep: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Piece:
    """A part of a document: its tokens, words (runs without white space) that begin in it, and bytes in UTF-8."""

    tokens: Sequence[int]
    num_words: int
    num_bytes: int


Document = Iterable[Piece]


class Window(NamedTuple):
    """Tokens of one forward pass, of which the last is predicted only and the last `num_new` are scored."""

    tokens: list[int]
    num_new: int


@dataclass(frozen=True)
class Perplexity:
    """The sums over a text, and the measures made of them.

    Attributes:
        num_documents: Documents with at least one token; `num_words` and `num_bytes` (in UTF-8) are theirs.
        num_tokens: Tokens that were scored.
        negative_log_likelihood: Sum over the scored tokens of -ln p(token | context), in nats.
    """

    num_documents: int
    num_tokens: int
    num_words: int
    num_bytes: int
    negative_log_likelihood: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.negative_log_likelihood / self.num_tokens

    @property
    def token_perplexity(self) -> float:
        """exp(nats per token)."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """exp(nats per word)."""
        return _exp(self.negative_log_likelihood / self.num_words) if self.num_words else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.negative_log_likelihood / math.log(2.0) / self.num_bytes if self.num_bytes else math.nan

    def figures(self) -> dict[str, float]:
        """Returns the sums and the measures under the names of `mlra-scale evaluate --json` and of the record."""
        return {
            "documents": self.num_documents,
            "tokens_scored": self.num_tokens,
            "words": self.num_words,
            "bytes": self.num_bytes,
            "negative_log_likelihood": self.negative_log_likelihood,
            "loss": self.loss,
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def windows(pieces: Iterable[Sequence[int]], size: int, stride: int) -> Iterator[Window]:
    """Cuts a stream of tokens into overlapping windows; at most one window and one piece are in memory.

    The windows are those of Hugging Face's guide to the perplexity of fixed-length models: they begin at 0, stride,
    2 stride, ..., each is `size` long (the last one ends with the stream), and each scores the tokens that no earlier
    one held. A stream of fewer than two tokens gives none.
    """
    assert 1 <= stride < size, (size, stride)
    held: list[int] = []
    num_context = 1  # the first token has nothing before it
    for piece in pieces:
        held.extend(piece)
        first = 0
        while len(held) - first >= size:
            yield Window(held[first : first + size], size - num_context)
            num_context = size - stride
            first += stride
        del held[:first]
    if len(held) > num_context:
        yield Window(held, len(held) - num_context)


def perplexity(
    model: LanguageModel,
    documents: Iterable[Document],
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    start_token: int | None = None,
) -> Perplexity:
    """Scores documents; no context crosses from one to the next.

    Args:
        model: The model.
        documents: Each a stream of pieces.
        window: Tokens of a window; None: the model's longest input.
        stride: Distance of the windows; None: half a window.
        batch_size: Windows of one forward pass.
        start_token: Context put before every document, so that its first token is scored too; None: it is not.

    Raises:
        EvaluationError: Window or stride do not fit the model, a token is not the model's, or nothing can be scored.
    """
    window, stride = checked_window(model, window, stride)
    counts: Counter[str] = Counter()
    found = counted_windows(documents, counts, model.vocab_size, window, stride, start_token)
    return perplexity_of_windows(model, found, counts, batch_size)


def perplexity_of_windows(
    model: LanguageModel, found: Iterator[Window], counts: Counter[str], batch_size: int
) -> Perplexity:
    """Scores windows, which are counted in `counts` as they are taken; raises EvaluationError as `perplexity` does."""
    total = 0.0
    while batch := list(itertools.islice(found, batch_size)):
        total += negative_log_likelihood(model, batch)
    check_counts(counts)
    if not math.isfinite(total):
        raise EvaluationError("the model gives logits that are not finite")
    return perplexity_of(counts, total)


def counted_windows(
    documents: Iterable[Document],
    counts: Counter[str],
    vocab_size: int,
    window: int,
    stride: int,
    start_token: int | None = None,
) -> Iterator[Window]:
    """Yields the windows of documents, and counts what they hold: documents, tokens, words, bytes, scored."""
    for document in documents:
        for found in windows(_counted(document, counts, vocab_size, start_token), window, stride):
            counts["scored"] += found.num_new
            yield found


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises EvaluationError if a text has a token that the model does not know."""
    if max(tokens) >= vocab_size:
        raise EvaluationError(
            f"the text has the token {max(tokens)}, but the model knows {vocab_size} tokens: text and model belong to "
            "different tokenizers"
        )


def check_counts(counts: Counter[str]) -> None:
    """Raises EvaluationError if a text has no token that can be scored; `counts` are of counted_windows."""
    if not counts["scored"]:
        raise EvaluationError(
            f"there is nothing to score: {counts['documents']} documents with {counts['tokens']} tokens in all, and "
            "the first token of a document has no context; give more text, or a start token"
        )


def perplexity_of(counts: Counter[str], negative_log_likelihood: float) -> Perplexity:
    """Returns the measures of a text; `counts` are of counted_windows."""
    return Perplexity(counts["documents"], counts["scored"], counts["words"], counts["bytes"], negative_log_likelihood)


def checked_window(model: LanguageModel, window: int | None, stride: int | None) -> tuple[int, int]:
    """Returns window and stride with their defaults; raises EvaluationError if they do not fit the model."""
    if window is None:
        window = max(2, model.max_positions)
    # The last token of a window is only predicted and needs no position.
    if not 2 <= window <= model.max_positions + 1:
        raise EvaluationError(f"a window of {window} tokens does not fit the model; use 2 to {model.max_positions + 1}")
    if stride is None:
        stride = max(1, window // 2)
    if not 1 <= stride < window:
        raise EvaluationError(
            f"a stride of {stride} does not fit windows of {window} tokens, of which the first is context; "
            f"use 1 to {window - 1}"
        )
    return window, stride


def negative_log_likelihood(model: LanguageModel, batch: Sequence[Window]) -> float:
    """Returns the sum over the new tokens of some windows of -ln p(token | tokens before it in the window).

    Shorter windows are padded at the end, which does not influence a causal model.
    """
    longest = max(len(window.tokens) for window in batch) - 1
    keep = longest - min(len(window.tokens) - 1 - window.num_new for window in batch)
    tokens_BS = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets_BS = torch.full((len(batch), longest), _IGNORED, dtype=torch.int64)
    for row, window in enumerate(batch):
        values = torch.tensor(window.tokens)
        stop = len(window.tokens) - 1
        tokens_BS[row, :stop] = values[:-1]
        targets_BS[row, stop - window.num_new : stop] = values[-window.num_new :]
    with torch.inference_mode():
        logits_BKV = model.logits(tokens_BS, keep)
        targets_BK = targets_BS[:, longest - keep :].to(logits_BKV.device)
        losses = functional.cross_entropy(
            logits_BKV.flatten(0, 1).float(), targets_BK.flatten(), ignore_index=_IGNORED, reduction="none"
        )
        return float(losses.sum(dtype=torch.float64))


def _counted(
    document: Document, counts: Counter[str], vocab_size: int, start_token: int | None
) -> Iterator[Sequence[int]]:
    """Yields the tokens of a document, the start token first; counts what it has and checks the tokens."""
    is_empty = True
    for piece in document:
        if not len(piece.tokens):
            continue
        if is_empty:
            counts["documents"] += 1
            is_empty = False
            if start_token is not None:
                yield [start_token]
        check_tokens(piece.tokens, vocab_size)
        counts.update(tokens=len(piece.tokens), words=piece.num_words, bytes=piece.num_bytes)
        yield piece.tokens


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
