"""The documents of several sources as one sequence, with the split of each."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from mlra_scale.config.json_text import printable
from mlra_scale.data import DataError
from mlra_scale.data.encode import Count, Placed, bytes_of, is_empty
from mlra_scale.data.options import PrepareOptions
from mlra_scale.data.readers import Texts
from mlra_scale.data.sources import Source
from mlra_scale.data.tally import Place, Tally


@dataclass(frozen=True)
class Position:
    """A portion of a corpus up to which it is read, and the bytes of text and of the sources' files up to there."""

    source: int
    place: Place
    text_bytes: int
    consumed: int


class Corpus:
    """The documents of all sources; a document's index is its position among those that are not empty.

    Args:
        sources: In their order.
        options: Of the preparation: seed and fraction of the split, the cap, and whether passes draw progress bars.

    Attributes:
        tallies: What was read of each source; `count` adds to them.
    """

    def __init__(self, sources: Sequence[Source], options: PrepareOptions) -> None:
        self._sources, self._options, self._max_bytes = sources, options, options.max_bytes
        self.tallies = [Tally() for _ in sources]

    def is_validation(self, index: int) -> bool:
        """Returns whether a document is in the validation split: a hash of (seed, index) against the fraction."""
        digest = hashlib.blake2b(f"{self._options.seed} {index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._options.validation_fraction * 2.0**64

    def portions(self, after: Position | None = None) -> Iterator[Placed]:
        """Yields the portions of all sources from the beginning, or after a position, the same every time."""
        portions = self._portions(after)
        return portions if self._max_bytes is None else self._capped(portions, after.text_bytes if after else 0)

    def _portions(self, after: Position | None) -> Iterator[Placed]:
        first = 0 if after is None else after.source
        for number in range(first, len(self._sources)):
            place = after.place if after is not None and number == first else None
            yield from (Placed(number, at, portion) for at, portion in self._sources[number].portions(place))

    def _capped(self, portions: Iterator[Placed], num_bytes: int) -> Iterator[Placed]:
        """Yields the portions up to the cap; they are parsed here, so that nothing behind the cap is looked at."""
        assert self._max_bytes is not None
        while num_bytes < self._max_bytes and (placed := next(portions, None)) is not None:
            texts: list[str] = []
            for text in placed.portion.texts():
                texts.append(text)
                num_bytes += 0 if is_empty(text) else bytes_of(text)
                if num_bytes >= self._max_bytes:
                    break
            yield replace(placed, portion=Texts(texts, placed.portion.consumed))

    def training_texts(self, max_bytes: int) -> Iterator[tuple[str, int]]:
        """Yields documents of the training split, each with what it moves the progress bar on, to train a tokenizer on.

        They end with the document with which they have `max_bytes` characters.

        Raises:
            DataError: The corpus holds no document.
        """
        index = size = 0
        for placed in self.portions():
            consumed = self._moves(0, placed.portion.consumed)
            for text in placed.portion.texts():
                if is_empty(text):
                    continue
                index += 1
                if self.is_validation(index - 1):
                    continue
                yield text, consumed + self._moves(len(text), 0)
                consumed = 0
                size += len(text)
                if size >= max_bytes:
                    return
        if not index:
            raise self.without_documents()

    def count(self, counts: Sequence[Count]) -> None:
        """Adds what portions held to the tallies."""
        for count in counts:
            self.tallies[count.source].add(count.place.unit, count.documents, count.empty)

    def without_documents(self) -> DataError:
        """Returns the error of a corpus that holds no document."""
        names = ", ".join(source.name for source in self._sources)
        return DataError(f"the corpus is empty: no document with any text in {names}")

    def entries(self) -> list[dict[str, Any]]:
        """Returns the manifest's entries of the sources after a pass."""
        entries = []
        for source, tally in zip(self._sources, self.tallies, strict=True):
            entry: dict[str, Any] = {"name": printable(source.name), "kind": source.kind}
            entry |= {"documents": tally.documents, "empty_documents": tally.empty}
            files = source.files(tally)
            entries.append(entry if files is None else entry | {"files": files})
        return entries

    def progress_bar(self, title: str, after: Position | None = None) -> tqdm:
        """Returns a progress bar over bytes of text up to the cap, else over the bytes of the sources' files."""
        total, totals = self._max_bytes, [source.total_bytes for source in self._sources]
        if total is None and None not in totals:
            total = sum(filter(None, totals))
        # In a log file a line every 15 seconds is enough.
        interval, is_off = 0.2 if sys.stderr.isatty() else 15.0, not self._options.progress
        return tqdm(
            total=total,
            initial=0 if after is None else self._moves(after.text_bytes, after.consumed),
            desc=title,
            unit="B",
            unit_scale=True,
            disable=is_off,
            mininterval=interval,
            dynamic_ncols=True,
        )

    def progress_of(self, text_bytes: int, counts: Sequence[Count]) -> int:
        """Returns how far portions with so many bytes of text move the progress bar on."""
        return self._moves(text_bytes, sum(count.consumed for count in counts))

    def _moves(self, text_bytes: int, consumed: int) -> int:
        return consumed if self._max_bytes is None else text_bytes
