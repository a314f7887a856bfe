"""What a pass over a source has read, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Place(NamedTuple):
    """Where in a source a portion is: the number of its unit (a file) and its own number within that, both from 0."""

    unit: int
    portion: int


@dataclass
class Tally:
    """Counts of one source, in the order of its portions.

    Attributes:
        documents: Documents with text.
        empty: Documents of nothing but white space.
        units: Units (files) that were begun.
        without_documents: Numbers of the units that are read and hold no document, an empty one included.
    """

    documents: int = 0
    empty: int = 0
    units: int = 0
    without_documents: list[int] = field(default_factory=list)

    def add(self, unit: int, documents: int, empty: int) -> None:
        """Counts a portion of a unit: the last one, or one that was not begun."""
        if unit >= self.units:
            self.without_documents.append(unit)
            self.units = unit + 1
        if documents + empty and self.without_documents[-1:] == [unit]:
            self.without_documents.pop()
        self.documents += documents
        self.empty += empty
