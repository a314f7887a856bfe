"""What ranks send their node and nodes their job. A message is checked as a whole before any of it is used.

A sender has shown that it belongs to the job (channel.py), but it may run another version of this package, or be
damaged. Numbers are finite and bounded, and texts are printable and short: they end up in comparisons, in job.json and
on consoles.
"""

from __future__ import annotations

import signal
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mlra_scale.training.exit_codes import ExitCode

_LONGEST_TEXT = 2000
_LARGEST = 2**53
"""Whole numbers up to this one are exact in JSON."""


def printable(text: str) -> str:
    """Returns a text in one line; what a terminal would obey or no encoding can write becomes `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def first_error(error: ValidationError) -> str:
    """Returns the first fault that pydantic has found: where it is, and what is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


_Text = Annotated[str, AfterValidator(lambda text: printable(text[: 2 * _LONGEST_TEXT])[:_LONGEST_TEXT])]
_Count = Annotated[int, Field(ge=0, le=_LARGEST)]
_Number = Annotated[float, Field(ge=0.0, le=_LARGEST, allow_inf_nan=False)]


class _Message(BaseModel):
    # Fields that only a newer version has are ignored, so that its node can be named by its versions.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Reads a message.

        Raises:
            ValueError: It has the wrong form; the text says where.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(printable(first_error(error))) from error


class Heartbeat(_Message):
    """A sign of life of a rank, by its global number.

    `phase` is one of `waiting`, `starting`, `connecting`, `checking`, `preparing`, `training`, `evaluating`, `saving`,
    `rolling back`, `exporting`, `ending`, and began `seconds` ago; a step of training begins it anew. `location` is
    where the main thread is.
    """

    rank: _Count
    local_rank: _Count
    pid: Annotated[int, Field(ge=1, le=2**22)]  # the kernel's own limit
    phase: _Text
    step: Annotated[int, Field(ge=-1, le=_LARGEST)]
    seconds: _Number
    location: _Text


class RankStatus(_Message):
    """The last heartbeat of a rank, and what its node knows of it.

    Attributes:
        heartbeat: The last one, `silence` seconds ago.
        state: Of its process: `stopped`, `disk-sleep`, ...; empty: there is no such process.
        node: Where it runs; the job fills it in.
    """

    heartbeat: Heartbeat
    silence: _Number
    state: _Text
    node: _Text = ""

    @property
    def idle(self) -> float:
        """Seconds since it began anything new."""
        return self.heartbeat.seconds + self.silence


class RankFailure(_Message):
    """How a rank ended that did not end well.

    Attributes:
        rank: Its global rank; None: torchrun itself failed.
        code: Exit code, or minus the signal that killed it.
        time: When, in seconds since the epoch.
        message: What it left in torchrun's error file.
        node: Where it ran; the job fills it in.
        is_ordered: Whether the job had ordered its death, after the cause; the job fills it in.
    """

    rank: _Count | None
    code: Annotated[int, Field(ge=-255, le=255)]
    time: _Number
    message: _Text
    node: _Text = ""
    is_ordered: bool = False

    def __str__(self) -> str:
        if self.rank is None:
            return f"{self.node}: {self.message}"
        if self.code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"rank {self.rank} on {self.node} was killed by {names.get(-self.code, f'signal {-self.code}')}"
        name = ExitCode(self.code).name if self.code in tuple(ExitCode) else "unknown"
        detail = f": {self.message}" if self.message and self.code == ExitCode.FAILED else ""
        return f"rank {self.rank} on {self.node} ended with exit code {self.code} ({name}){detail}"


class RankMessage(_Message):
    """A message of a rank to its node: a heartbeat, or nodes that cannot be used, with the reason."""

    heartbeat: Heartbeat | None = None
    bad_nodes: dict[_Text, _Text] | None = None


class NodeMessage(_Message):
    """A message of a node to its job.

    Attributes:
        versions: Of the libraries there (versions.py); in its first message.
        ranks: What its ranks do.
        signalled: Whether the node received a signal that asks for a stop.
        bad_nodes: Nodes that cannot be used, with the reason.
        failures: How ranks of it failed; given when all its ranks have ended.
    """

    versions: dict[_Text, _Text] | None = None
    ranks: list[RankStatus] | None = None
    signalled: bool = False
    bad_nodes: dict[_Text, _Text] | None = None
    failures: list[RankFailure] | None = None
