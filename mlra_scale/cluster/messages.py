"""What ranks tell their node and nodes their job, checked as a whole before any of it is used.

A sender has shown that it belongs to the job (channel.py), but its words may come from another version of this package,
or be damaged. Numbers are finite and bounded, and texts are printable and short: all of it ends up in comparisons,
in job.json and on a console.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mlra_scale.cluster.pulse import Beat

_T = TypeVar("_T", bound=BaseModel)
_LONGEST_TEXT = 2000
_LARGEST = 2**53
"""Whole numbers up to this one are exact in JSON."""


def printable(text: str) -> str:
    """Returns a text in one line, cut to a limit, without what a terminal would obey or no encoding can write."""
    short = " ".join(text[: 2 * _LONGEST_TEXT].split())[:_LONGEST_TEXT]
    return "".join(letter if letter.isprintable() else "?" for letter in short)


_Text = Annotated[str, AfterValidator(printable)]
_Count = Annotated[int, Field(ge=0, le=_LARGEST)]
_Number = Annotated[float, Field(ge=0.0, le=_LARGEST, allow_inf_nan=False)]


class _Part(BaseModel):
    # Fields of a newer version are passed over, so that its node can be named by its versions.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Beat(_Part):
    rank: _Count
    local_rank: _Count
    pid: Annotated[int, Field(ge=1, le=2**22)]  # the kernel's own limit
    doing: _Text
    step: Annotated[int, Field(ge=-1, le=_LARGEST)]
    seconds: _Number
    place: _Text

    def as_beat(self) -> Beat:
        """Returns it as the rest of the package has it."""
        return Beat(**self.model_dump())


class RankReport(_Part):
    """A rank as its node last heard it: see hang.Seen."""

    beat: _Beat
    silence: _Number
    state: _Text


class FailedRank(_Part):
    """How a rank ended, other than well: see failure.Failure. Without a rank: torchrun itself failed."""

    rank: _Count | None
    code: Annotated[int, Field(ge=-255, le=255)]
    time: _Number
    message: _Text


class Ended(_Part):
    """How all ranks of a node ended."""

    failures: list[FailedRank]
    bad_nodes: dict[_Text, _Text] = {}


class NodeMessage(_Part):
    """A message of a node to its job.

    Attributes:
        versions: Of the libraries there (versions.py); with its first message.
        ranks: What its ranks do.
        signalled: Whether the node was asked to stop.
        bad_nodes: Nodes that cannot be used, with the reason.
        ended: How its ranks ended.
    """

    versions: dict[_Text, _Text] | None = None
    ranks: list[RankReport] | None = None
    signalled: bool = False
    bad_nodes: dict[_Text, _Text] | None = None
    ended: Ended | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> NodeMessage:
        """Reads a message.

        Raises:
            ValueError: It has the wrong form; the text says where.
        """
        return _checked(cls, values)


class RankMessage(_Part):
    """A message of a rank to its node.

    Attributes:
        beat: Its sign of life.
        bad_nodes: Nodes that cannot be used, with the reason.
    """

    beat: _Beat | None = None
    bad_nodes: dict[_Text, _Text] | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> RankMessage:
        """Reads a message.

        Raises:
            ValueError: It has the wrong form; the text says where.
        """
        return _checked(cls, values)


def _checked(kind: type[_T], values: dict[str, Any]) -> _T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")) from error
