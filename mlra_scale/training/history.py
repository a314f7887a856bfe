"""What a run changed in the course of its resumes, kept in every checkpoint, so that a model card can tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlra_scale.training.resume import Change


@dataclass(frozen=True)
class History:
    """Changes of the configuration and of the layout, and the weights that the run began with.

    Attributes:
        changes: One for each field that was changed, with the step after which the new value holds; the oldest first.
        begun_from: What a checkpoint of weights says of its origin, where the run began with one.
        known_from: Changes up to this step are not recorded; 0: all are.
    """

    changes: tuple[tuple[int, Change], ...] = ()
    begun_from: Mapping[str, Any] | None = None
    known_from: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any], step: int) -> History:
        """Returns the history in a checkpoint's state.

        Args:
            state: Of the checkpoint; those of before there was a history have none.
            step: Of the checkpoint.

        Raises:
            ValueError: It is garbled.
        """
        stored = state.get("history")
        if stored is None:
            return cls(known_from=step)
        try:
            changes = [
                (int(item["step"]), Change(item["field"], item["was"], item["now"])) for item in stored["changes"]
            ]
            return cls(tuple(changes), stored["begun_from"], int(stored["known_from"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a history of changes: {error}") from error

    def followed_by(self, changes: Sequence[Change], step: int) -> History:
        """Returns the history with the changes of a start that continues from a step; before the first, none counts."""
        if step == 0:
            return self
        return replace(self, changes=(*self.changes, *((step, change) for change in changes)))

    def gone_back_to(self, step: int) -> History:
        """Returns the history of a run that does the steps after an earlier one again, with the present settings."""
        return replace(self, changes=tuple((min(at, step), change) for at, change in self.changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        changes = [{"step": at, "field": item.field, "was": item.was, "now": item.now} for at, item in self.changes]
        return {"changes": changes, "begun_from": self.begun_from, "known_from": self.known_from}
