"""Which data sets a run reads from which sample on, and how far it has read each of them.

A run has one mix from its first sample on. A resumed run may continue with another one: other weights, a data set more
or less. The history of mixes, a short list, is the only state: the order of samples stays a pure function of (history,
i). A mix that begins at sample f takes sample i from data set q, the entry i - f of its pattern (blend.py). If that is
the pattern's k-th entry of q, and earlier mixes read n_q samples of q, the sample is number n_q + k of q. So every data
set continues where it stopped: over the whole run its samples are 0, 1, 2, ... in the order of its own epochs, none
twice and none left out, also after a pause.

A data set is known by its fingerprint, not by its path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlra_scale.data.blend import BlendPattern


@dataclass(frozen=True)
class Mix:
    """Data sets with their weights, and the sample from which they hold.

    Attributes:
        names: How the configuration named the data sets; a note for people.
        fingerprints: Of the data sets, in their order.
        weights: Relative, positive.
        from_sample: Global index of the first sample.
    """

    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    weights: tuple[float, ...]
    from_sample: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mix:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: Something is missing or garbled.
        """
        try:
            mix = cls(
                tuple(map(str, values["names"])),
                tuple(map(str, values["fingerprints"])),
                tuple(map(float, values["weights"])),
                int(values["from_sample"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a mix of data sets: {values!r}") from error
        if not len(mix.names) == len(mix.fingerprints) == len(mix.weights) > 0 or min(mix.weights) <= 0.0:
            raise ValueError(f"not a mix of data sets: {values!r}")
        return mix

    def renamed(self, fingerprints: Mapping[str, str]) -> Mix:
        """Returns the mix with other names for the same data sets, by the names so far."""
        return replace(self, fingerprints=tuple(fingerprints.get(name, name) for name in self.fingerprints))

    @cached_property
    def pattern(self) -> BlendPattern:
        """The pattern in which the data sets take turns."""
        return BlendPattern(self.weights)

    @property
    def data_sets(self) -> list[tuple[str, int]]:
        """Identifies the data sets: fingerprint, and a number for those that are there more than once."""
        return [(name, self.fingerprints[:index].count(name)) for index, name in enumerate(self.fingerprints)]

    def reads_like(self, other: Mix) -> bool:
        """Returns whether two mixes give the same samples: the same data sets in the same order and pattern."""
        return self.fingerprints == other.fingerprints and self.pattern.proportions == other.pattern.proportions


@dataclass(frozen=True)
class DataIdentity:
    """Identifies data by their content, whatever their path.

    Attributes:
        mix: The training data, from sample 0.
        validation: Fingerprint of separate validation data, if there are any.
        tokenizer: SHA-256 of the tokenizer that the data were made with, where a manifest has it.
        is_blend: Whether the training data were named as a blend.
        earlier: Today's fingerprint of each data set by the one that checkpoints of version 1 have of it.
    """

    mix: Mix
    validation: str | None
    tokenizer: str | None
    is_blend: bool
    earlier: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Every data set's fingerprint by the field that names it, in a blend with its number instead of its path."""
        count = len(self.mix.fingerprints)
        if self.is_blend:
            fields = [f"data.blend (data set {number} of {count})" for number in range(1, count + 1)]
        else:
            fields = ["data.path"]
        found = dict(zip(fields, self.mix.fingerprints, strict=True))
        return found | ({} if self.validation is None else {"data.validation_path": self.validation})


def continued(history: Sequence[Mix], mix: Mix) -> tuple[Mix, ...]:
    """Returns the history of a run that continues with a mix; empty is the history of a new run.

    It stays the same if its last mix reads like the new one. A mix of which nothing was read is left out.
    """
    kept = [earlier for earlier in history if earlier.from_sample < mix.from_sample]
    assert kept or mix.from_sample == 0, "a history begins with the first sample"
    return tuple(kept) if kept and kept[-1].reads_like(mix) else (*kept, mix)


class SampleOrder:
    """Where every sample of a run comes from: a data set's number, and the sample's number in that data set.

    Data sets are numbered in the order of their first appearance in the history.
    """

    def __init__(self, history: Sequence[Mix]) -> None:
        assert history and history[0].from_sample == 0
        self.history = tuple(history)
        self._starts = np.array([mix.from_sample for mix in history], dtype=np.int64)
        assert (np.diff(self._starts) > 0).all(), "mixes follow each other"
        numbers: dict[tuple[str, int], int] = {}
        self._numbers: list[NDArray[np.int64]] = []
        for mix in history:
            found = [numbers.setdefault(name, len(numbers)) for name in mix.data_sets]
            self._numbers.append(np.array(found, dtype=np.int64))
        # Samples that each data set (column) gave before each span (row).
        self._given = np.zeros((len(history), len(numbers)), dtype=np.int64)
        for span in range(1, len(history)):
            length = int(self._starts[span] - self._starts[span - 1])
            self._given[span] = self._given[span - 1]
            self._given[span, self._numbers[span - 1]] += history[span - 1].pattern.count(length)

    @property
    def num_data_sets(self) -> int:
        """Number of different data sets in the whole history."""
        return self._given.shape[1]

    @property
    def current(self) -> list[int]:
        """Numbers of the data sets of the last mix, in its order."""
        return self._numbers[-1].tolist()

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns, for global sample indices of shape [n], the data set and how many of its samples came before."""
        data_sets, local = np.empty_like(samples), np.empty_like(samples)
        spans = np.searchsorted(self._starts, samples, side="right") - 1
        for span in np.unique(spans):
            mine = spans == span
            numbers, counts = self.history[span].pattern.locate(samples[mine] - self._starts[span])
            data_sets[mine] = self._numbers[span][numbers]
            local[mine] = counts + self._given[span, data_sets[mine]]
        return data_sets, local
